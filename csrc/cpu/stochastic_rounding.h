// float32 to bfloat16, up or down at random so that the mean is right: 16 random bits are added
// below the bits that stay, and what is below is cut off. A number that bfloat16 holds stays
// itself.
//
// The bits are a function of a parameter's stream (made of seed, step and the parameter's number),
// the row and the column, all in whole numbers: the same on every instruction set, in every thread
// and in every other backend. The mixer is Wellons' lowbias32, two multiplications for 32 bits, of
// which the first moment takes the lower half and the second the upper. A row has two keys, one
// added before and one inside, so that no two rows run through the same sequence.
#pragma once

#include "fastsae/simd.h"

namespace fastsae {
namespace FASTSAE_ISA {

inline uint32_t mix(uint32_t x, uint32_t key) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x += key;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

class RandomRow {
 public:
  RandomRow(const RandomStream& stream, int64_t row)
      : first_(mix(static_cast<uint32_t>(row) + stream.first, 0)),
        second_(mix(static_cast<uint32_t>(row) ^ stream.second, 0)) {}

  // Those of the columns [column, column + kLanes). A plain loop: every compiler makes vectors of
  // it.
  void bits(int64_t column, uint32_t* out) const {
    const uint32_t first = first_ + static_cast<uint32_t>(column);
    for (uint32_t l = 0; l < kLanes; ++l) out[l] = mix(first + l, second_);
  }

 private:
  uint32_t first_, second_;
};

// Rounds `count` lanes; kShift picks the half of the random bits.
template <int kShift>
inline void store_stochastic(bfloat16* to, const F16& value, const uint32_t* random,
                             int64_t count) {
  float lanes[kLanes];
  uint32_t bits[kLanes];
  uint16_t rounded[kLanes];
  store(lanes, value);
  std::memcpy(bits, lanes, sizeof(bits));
  for (int64_t l = 0; l < kLanes; ++l) {
    const uint32_t drawn = (random[l] >> kShift) & 0xffffu;
    const bool nan = (bits[l] & 0x7fffffffu) > 0x7f800000u;
    rounded[l] = static_cast<uint16_t>((nan ? bits[l] | 0x400000u : bits[l] + drawn) >> 16);
  }
  std::memcpy(to, rounded, static_cast<size_t>(count) * sizeof(uint16_t));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
