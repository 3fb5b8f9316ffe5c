// Sixteen float32 lanes on every instruction set: one zmm, two ymm, or a plain array. Each source
// file that includes this is compiled once per instruction set, inside its own namespace, so that
// no inline function compiled with wider instructions can be linked into narrower code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "fastsae/abi.h"

#ifndef FASTSAE_ISA
#error \
    "FASTSAE_ISA names the namespace of this instruction set: portable, avx2, avx512, avx512_bf16"
#endif

namespace fastsae {
namespace FASTSAE_ISA {

constexpr int64_t kLanes = 16;

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Round to nearest even; a NaN stays a NaN (the rounding carry could turn its mantissa into inf).
inline bfloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline void assign(float& to, float value) { to = value; }
inline void assign(bfloat16& to, float value) { to = to_bfloat16(value); }

#if defined(__AVX512F__)

struct F16 {
  __m512 v;
};
inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load(const bfloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
// Bit l is set where !(a <= b), so that a NaN on either side counts as greater.
inline uint32_t not_less_equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
inline uint32_t greater_equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
// a > b ? a : b, so that a NaN in a gives b.
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
// The lanes of `mask`, packed to the front; sixteen places are written. Compressing in a register
// and storing it whole: the store that compresses by itself is microcoded on Zen 4.
inline void store_packed(float* p, F16 a, uint32_t mask) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), a.v));
}
// As store_packed, of the numbers first, first + 1, ...
inline void store_packed_numbers(int32_t* p, int32_t first, uint32_t mask) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), numbers));
}
inline void store(bfloat16* p, F16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}

#elif defined(__AVX2__)

struct F16 {
  __m256 lo, hi;
};
inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F16 load(const bfloat16* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F16 abs(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline uint32_t not_less_equal(F16 a, F16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLE_UQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLE_UQ));
  return static_cast<uint32_t>(lo) | (static_cast<uint32_t>(hi) << 8);
}
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline uint32_t greater_equal(F16 a, F16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
  return static_cast<uint32_t>(lo) | (static_cast<uint32_t>(hi) << 8);
}
inline void store(bfloat16* p, F16 a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int64_t l = 0; l < kLanes; ++l) p[l] = to_bfloat16(lanes[l]);
}

#else

// Written with std::fma so that the lanes round as the fused instruction does: the defined dot
// product then has the same bits here as on AVX2 and AVX-512.
struct F16 {
  float v[kLanes];
};
inline F16 zero() { return {}; }
inline F16 broadcast(float value) {
  F16 r;
  for (float& lane : r.v) lane = value;
  return r;
}
template <typename T>
inline F16 load(const T* p) {
  F16 r;
  for (int64_t l = 0; l < kLanes; ++l) r.v[l] = to_float(p[l]);
  return r;
}
template <typename T>
inline void store(T* p, const F16& a) {
  for (int64_t l = 0; l < kLanes; ++l) assign(p[l], a.v[l]);
}
inline F16 fma(const F16& a, const F16& b, const F16& c) {
  F16 r;
  for (int64_t l = 0; l < kLanes; ++l) r.v[l] = std::fma(a.v[l], b.v[l], c.v[l]);
  return r;
}
#define FASTSAE_LANEWISE(name, expression)                      \
  inline F16 name(const F16& a, const F16& b) {                 \
    F16 r;                                                      \
    for (int64_t l = 0; l < kLanes; ++l) r.v[l] = (expression); \
    return r;                                                   \
  }
FASTSAE_LANEWISE(add, a.v[l] + b.v[l])
FASTSAE_LANEWISE(sub, a.v[l] - b.v[l])
FASTSAE_LANEWISE(mul, a.v[l] * b.v[l])
FASTSAE_LANEWISE(div, a.v[l] / b.v[l])
#undef FASTSAE_LANEWISE
inline F16 sqrt(const F16& a) {
  F16 r;
  for (int64_t l = 0; l < kLanes; ++l) r.v[l] = std::sqrt(a.v[l]);
  return r;
}
inline F16 abs(const F16& a) {
  F16 r;
  for (int64_t l = 0; l < kLanes; ++l) r.v[l] = std::fabs(a.v[l]);
  return r;
}
inline F16 max(const F16& a, const F16& b) {
  F16 r;
  for (int64_t l = 0; l < kLanes; ++l) r.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l];
  return r;
}
inline uint32_t not_less_equal(const F16& a, const F16& b) {
  uint32_t mask = 0;
  for (int64_t l = 0; l < kLanes; ++l) mask |= static_cast<uint32_t>(!(a.v[l] <= b.v[l])) << l;
  return mask;
}
inline uint32_t greater_equal(const F16& a, const F16& b) {
  uint32_t mask = 0;
  for (int64_t l = 0; l < kLanes; ++l) mask |= static_cast<uint32_t>(a.v[l] >= b.v[l]) << l;
  return mask;
}

#endif

#if !defined(__AVX512F__)
inline void store_packed(float* p, const F16& a, uint32_t mask) {
  float lanes[kLanes];
  store(lanes, a);
  for (; mask; mask &= mask - 1) *p++ = lanes[__builtin_ctz(mask)];
}
inline void store_packed_numbers(int32_t* p, int32_t first, uint32_t mask) {
  for (; mask; mask &= mask - 1) *p++ = first + __builtin_ctz(mask);
}
#endif

// The first `count` lanes from memory, zeros beyond them. On every instruction set a tail is a
// zero-padded vector, never a shorter loop: the order of a sum must not depend on the width.
template <typename T>
inline F16 load_partial(const T* p, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) lanes[l] = to_float(p[l]);
  return load(lanes);
}

template <typename T>
inline void store_partial(T* p, const F16& a, int64_t count) {
  float lanes[kLanes];
  store(lanes, a);
  for (int64_t l = 0; l < count; ++l) assign(p[l], lanes[l]);
}

// The one tree that ends every dot product: halves, quarters, eighths, sixteenths.
inline float reduce(const F16& a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

// Asks for every cache line of a row before it is needed.
template <typename T>
inline void prefetch_row(const T* row, int64_t d) {
  const char* begin = reinterpret_cast<const char*>(row);
  const int64_t bytes = d * static_cast<int64_t>(sizeof(T));
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(begin + b, 0, 2);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
