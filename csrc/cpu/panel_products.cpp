// The products of panel_screen.cpp by vectors: a few rows of x with a panel of 64 latents,
//   sums[r][l] = sum_d x[r][d] w[d][l],
// in int8 (x as unsigned bytes, W_enc signed: VPDPBUSD), int16 (VPDPWSSD, or VPMADDWD and an
// addition) and bfloat16 (VDPBF16PS).
//
// Access: x row by row, four bytes at a time; the panel as [bytes / 4][64][4 bytes], once for a
// tile. On AVX-512 a tile is 6 rows by 4 vectors: 24 registers of sums, four of W_enc, one of x;
// 12 x 2 took as long in int8 and a quarter longer in int16. On AVX2 5 rows by 2 vectors, six times
// for each quarter of a panel, which then stays in the first-level cache: a fifth less time than
// with all quarters for 5 rows.
#include "panel_products.h"

#include "isa_kernels.h"

// Loops over registers are unrolled early: left to itself GCC 12 keeps a copy of the sums in
// memory, and the products take twice as long.
#define FASTSAE_UNROLL _Pragma("GCC unroll 8")

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

inline int32_t four_bytes(const uint8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return bytes;
}

void nothing() {}

// What a processor has no instruction for: lane by lane.
constexpr int64_t kPlainRows = 4;

inline void add_products(const uint8_t* x, const int8_t* w, int32_t& sum) {
  for (int j = 0; j < 4; ++j) sum += int32_t{x[j]} * w[j];
}
inline void add_products(const int16_t* x, const int16_t* w, int32_t& sum) {
  for (int j = 0; j < 2; ++j) sum += int32_t{x[j]} * w[j];
}
inline void add_products(const bfloat16* x, const bfloat16* w, float& sum) {
  for (int j = 0; j < 2; ++j) sum += to_float(x[j]) * to_float(w[j]);
}

template <typename X, typename W, typename Sum>
void plain(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* out) {
  Sum sums[kPlainRows * kPanel] = {};
  for (int64_t i = 0; i < bytes; i += 4)
    for (int64_t r = 0; r < kPlainRows; ++r)
      for (int64_t l = 0; l < kPanel; ++l)
        add_products(reinterpret_cast<const X*>(x + r * bytes + i),
                     reinterpret_cast<const W*>(panel + i * kPanel + 4 * l), sums[r * kPanel + l]);
  std::memcpy(out, sums, sizeof(sums));
}

#if defined(__AVX512F__)
constexpr int64_t kTileRows = 6;

inline void store_sums(int32_t* to, __m512i sums) { _mm512_storeu_si512(to, sums); }
inline void store_sums(int32_t* to, __m512 sums) { _mm512_storeu_ps(to, sums); }

template <typename Sums, typename Add>
inline void tile(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* out, Sums none,
                 Add add) {
  Sums acc[kTileRows][4];
  FASTSAE_UNROLL for (auto& row : acc) FASTSAE_UNROLL for (Sums& lanes : row) lanes = none;
  for (int64_t i = 0; i < bytes; i += 4, panel += 4 * kPanel) {
    __m512i w[4];
    FASTSAE_UNROLL for (int v = 0; v < 4; ++v) w[v] = _mm512_loadu_si512(panel + 64 * v);
    FASTSAE_UNROLL for (int64_t r = 0; r < kTileRows; ++r) {
      const __m512i lanes = _mm512_set1_epi32(four_bytes(x + r * bytes + i));
      FASTSAE_UNROLL for (int v = 0; v < 4; ++v) acc[r][v] = add(acc[r][v], lanes, w[v]);
    }
  }
  FASTSAE_UNROLL for (int64_t r = 0; r < kTileRows; ++r) FASTSAE_UNROLL for (int v = 0; v < 4; ++v)
      store_sums(out + r * kPanel + 16 * v, acc[r][v]);
}

void int16(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* out) {
  tile(x, panel, bytes, out, _mm512_setzero_si512(), [](__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
  });
}
constexpr PanelProducts kInt16 = {kTileRows, nothing, int16, nothing};
#elif defined(__AVX2__)
constexpr int64_t kTileRows = 30, kRowsAtOnce = 5;

inline void few_rows(const uint8_t* x, const uint8_t* w, int64_t bytes, int32_t* out) {
  __m256i acc[kRowsAtOnce][2];
  FASTSAE_UNROLL for (auto& row : acc) FASTSAE_UNROLL for (__m256i& lanes : row) lanes =
      _mm256_setzero_si256();
  for (int64_t i = 0; i < bytes; i += 4, w += 4 * kPanel) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
    FASTSAE_UNROLL for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      const __m256i lanes = _mm256_set1_epi32(four_bytes(x + r * bytes + i));
      acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(lanes, low));
      acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(lanes, high));
    }
  }
  FASTSAE_UNROLL for (int64_t r = 0; r < kRowsAtOnce; ++r) {
    auto* to = reinterpret_cast<__m256i*>(out + r * kPanel);
    _mm256_storeu_si256(to, acc[r][0]);
    _mm256_storeu_si256(to + 1, acc[r][1]);
  }
}

void int16(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* out) {
  for (int64_t part = 0; part < kPanel; part += 16)
    for (int64_t r = 0; r < kTileRows; r += kRowsAtOnce)
      few_rows(x + r * bytes, panel + 4 * part, bytes, out + r * kPanel + part);
}
constexpr PanelProducts kInt16 = {kTileRows, nothing, int16, nothing};
#else
constexpr PanelProducts kInt16 = {kPlainRows, nothing, plain<int16_t, int16_t, int32_t>, nothing};
#endif

#if defined(__AVX512VNNI__)
void int8(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* out) {
  tile(x, panel, bytes, out, _mm512_setzero_si512(),
       [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); });
}
constexpr PanelProducts kInt8 = {kTileRows, nothing, int8, nothing};
#else
constexpr PanelProducts kInt8 = {kPlainRows, nothing, plain<uint8_t, int8_t, int32_t>, nothing};
#endif

#if defined(__AVX512BF16__)
void bf16(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* out) {
  tile(x, panel, bytes, out, _mm512_setzero_ps(), [](__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  });
}
constexpr PanelProducts kBf16 = {kTileRows, nothing, bf16, nothing};
#else
constexpr PanelProducts kBf16 = {kPlainRows, nothing, plain<bfloat16, bfloat16, float>, nothing};
#endif

}  // namespace

const PanelProducts panel_products[3] = {kBf16, kInt8, kInt16};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
