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

// Sixteen 32-bit words. Left to itself the compiler makes no vectors of the rounding: an update
// with such moments then takes twice as long.
#if defined(__AVX512F__)

struct U16 {
  __m512i v;
};
inline U16 words(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
inline U16 words_from(uint32_t first) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(lanes, words(first).v)};
}
inline U16 bits_of(F16 a) { return {_mm512_castps_si512(a.v)}; }
inline U16 add(U16 a, U16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline U16 mul(U16 a, U16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
template <int kBits>
inline U16 shift_right(U16 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
inline U16 exclusive_or(U16 a, U16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline U16 lower_half(U16 a) { return {_mm512_and_si512(a.v, words(0xffff).v)}; }
// The upper halves of `sum`, or of `value` made quiet where it is a NaN.
inline void store_upper(uint16_t* to, U16 value, U16 sum) {
  const __m512 lanes = _mm512_castsi512_ps(value.v);
  const __mmask16 nan = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(value.v, words(0x400000).v);
  const __m512i upper = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, sum.v, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(upper));
}

#elif defined(__AVX2__)

struct U16 {
  __m256i lo, hi;
};
inline U16 words(uint32_t value) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(value));
  return {v, v};
}
inline U16 add(U16 a, U16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline U16 words_from(uint32_t first) {
  return add(
      {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)},
      words(first));
}
inline U16 bits_of(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline U16 mul(U16 a, U16 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
template <int kBits>
inline U16 shift_right(U16 a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
inline U16 exclusive_or(U16 a, U16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline U16 lower_half(U16 a) {
  const __m256i mask = words(0xffff).lo;
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline __m256i upper_or_quiet(__m256i value, __m256i sum) {
  const __m256 lanes = _mm256_castsi256_ps(value);
  const __m256 nan = _mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(value, words(0x400000).lo);
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(quiet), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}
inline void store_upper(uint16_t* to, U16 value, U16 sum) {
  const __m256i packed =
      _mm256_packus_epi32(upper_or_quiet(value.lo, sum.lo), upper_or_quiet(value.hi, sum.hi));
  // Packing goes by halves of a register.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

#else

struct U16 {
  uint32_t v[kLanes];
};
template <typename Word>
inline U16 each_word(Word word) {
  U16 r;
  for (int64_t l = 0; l < kLanes; ++l) r.v[l] = word(l);
  return r;
}
inline U16 words(uint32_t value) {
  return each_word([&](int64_t) { return value; });
}
inline U16 words_from(uint32_t first) {
  return each_word([&](int64_t l) { return first + static_cast<uint32_t>(l); });
}
inline U16 bits_of(const F16& a) {
  U16 r;
  std::memcpy(r.v, a.v, sizeof(r.v));
  return r;
}
inline U16 add(const U16& a, const U16& b) {
  return each_word([&](int64_t l) { return a.v[l] + b.v[l]; });
}
inline U16 mul(const U16& a, const U16& b) {
  return each_word([&](int64_t l) { return a.v[l] * b.v[l]; });
}
template <int kBits>
inline U16 shift_right(const U16& a) {
  return each_word([&](int64_t l) { return a.v[l] >> kBits; });
}
inline U16 exclusive_or(const U16& a, const U16& b) {
  return each_word([&](int64_t l) { return a.v[l] ^ b.v[l]; });
}
inline U16 lower_half(const U16& a) {
  return each_word([&](int64_t l) { return a.v[l] & 0xffffu; });
}
inline void store_upper(uint16_t* to, const U16& value, const U16& sum) {
  for (int64_t l = 0; l < kLanes; ++l) {
    const bool nan = (value.v[l] & 0x7fffffffu) > 0x7f800000u;
    to[l] = static_cast<uint16_t>((nan ? value.v[l] | 0x400000u : sum.v[l]) >> 16);
  }
}

#endif

inline U16 mix(U16 x, U16 key) {
  x = mul(exclusive_or(x, shift_right<16>(x)), words(0x7feb352d));
  x = mul(add(exclusive_or(x, shift_right<15>(x)), key), words(0x846ca68b));
  return exclusive_or(x, shift_right<16>(x));
}

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

class RandomRow {
 public:
  RandomRow(const RandomStream& stream, int64_t row)
      : first_(mix(static_cast<uint32_t>(row) + stream.first)),
        second_(words(mix(static_cast<uint32_t>(row) ^ stream.second))) {}

  // Those of the columns [column, column + kLanes).
  U16 bits(int64_t column) const {
    return mix(words_from(first_ + static_cast<uint32_t>(column)), second_);
  }

 private:
  uint32_t first_;
  U16 second_;
};

// Rounds `count` lanes; `random` is below 2^16.
inline void store_stochastic(bfloat16* to, const F16& value, const U16& random, int64_t count) {
  const U16 bits = bits_of(value), sum = add(bits, random);
  if (count == kLanes) return store_upper(&to->bits, bits, sum);
  uint16_t rounded[kLanes];
  store_upper(rounded, bits, sum);
  std::memcpy(to, rounded, static_cast<size_t>(count) * sizeof(uint16_t));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
