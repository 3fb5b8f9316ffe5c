// A fingerprint of memory: 64 bits that another content gives with a chance of about 2^-64.
//
// Eight lanes of 64 bits. Each word is mixed with a key of its lane and place and its halves are
// multiplied, as in NH (Black, Halevi, Krawczyk, Krovetz, Rogaway 1999, "UMAC") and XXH3; the lanes
// then pass a finaliser each. Not against an adversary: against weights that have changed.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

inline uint64_t scrambled(uint64_t h) {
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdULL;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return h ^ (h >> 33);
}

class Fingerprint {
 public:
  explicit Fingerprint(uint64_t seed) {
    for (uint64_t l = 0; l < kWords; ++l) {
      sums_[l] = scrambled(seed + l);
      keys_[l] = scrambled(seed ^ (0x9e3779b97f4a7c15ULL * (l + 1)));
    }
  }

  void add(const void* data, int64_t bytes) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    int64_t i = 0;
    uint64_t words[kWords];
    for (; i + kBlock <= bytes; i += kBlock) {
      std::memcpy(words, p + i, kBlock);
      add_words(words);
    }
    if (i == bytes) return;
    std::memset(words, 0, kBlock);
    std::memcpy(words, p + i, static_cast<size_t>(bytes - i));
    add_words(words);
  }

  uint64_t value() const {
    uint64_t h = 0;
    for (uint64_t l = 0; l < kWords; ++l) h = scrambled(h + sums_[l] + l);
    return h;
  }

 private:
  static constexpr uint64_t kWords = 8;
  static constexpr int64_t kBlock = 64;

  void add_words(const uint64_t* words) {
    for (uint64_t l = 0; l < kWords; ++l) {
      const uint64_t mixed = words[l] ^ keys_[l];
      sums_[l] += (mixed & 0xffffffffULL) * (mixed >> 32) + words[l];
      keys_[l] += 0x9fb21c651e98df25ULL;
    }
  }

  uint64_t sums_[kWords], keys_[kWords];
};

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
