// The order of encode: larger value first, then the lower index, as one 64-bit key.
#pragma once

#include <cstring>
#include <limits>

#include "fastsae/simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Larger key first: the value in an order-preserving form (NaN above +inf, -0 with +0), then the
// complement of the index, so that one 64-bit compare is the whole order.
struct Key {
  uint64_t bits;
};
struct Greater {
  bool operator()(Key a, Key b) const { return a.bits > b.bits; }
};

inline Key make_key(float value, int32_t index) {
  uint32_t bits;
  value += 0.0f;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value)
    bits = 0xffffffffu;
  else
    bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  return {(static_cast<uint64_t>(bits) << 32) | (0xffffffffu - static_cast<uint32_t>(index))};
}
inline int32_t key_index(Key key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key.bits));
}
inline float key_value(Key key) {
  uint32_t bits = static_cast<uint32_t>(key.bits >> 32);
  if (bits == 0xffffffffu) return std::numeric_limits<float>::quiet_NaN();
  bits = (bits & 0x80000000u) ? (bits & 0x7fffffffu) : ~bits;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
