// Every row of x with every row of w: the defined dot product of dot.h, to the bit, at the speed of
// a matrix product.
//
// A tile of kTileRows x kTileLatents products has its accumulators in registers: on AVX-512 2 x 8,
// sixteen chains that hide the latency of the fused multiply-add, ten loads for sixteen of them,
// and sixteen reductions made at once by shuffles (one after the other they took as long as a
// product over 300 dimensions). Eight rows of w (24 KB at d = 768) stay in the first-level cache
// while the rows of x pass.
#pragma once

#include "dot.h"

namespace fastsae {
namespace FASTSAE_ISA {

#if defined(__AVX512F__)
constexpr int64_t kTileRows = 2, kTileLatents = 8;

// Lane i is reduce(a[i]).
inline F16 reduce_each(const F16 a[kLanes]) {
  __m512 quarters[4];
  for (int j = 0; j < 4; ++j) {
    const auto halves = [](__m512 p, __m512 q) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
    };
    const __m512 p = halves(a[j].v, a[4 + j].v), q = halves(a[8 + j].v, a[12 + j].v);
    quarters[j] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
  }
  const auto eighths = [](__m512 p, __m512 q) {
    const __m512d x = _mm512_castps_pd(p), y = _mm512_castps_pd(q);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const __m512 p = eighths(quarters[0], quarters[1]), q = eighths(quarters[2], quarters[3]);
  return {_mm512_add_ps(_mm512_shuffle_ps(p, q, 0x88), _mm512_shuffle_ps(p, q, 0xdd))};
}

inline void reduce_tile(const F16 sums[kTileRows * kTileLatents], float* out, int64_t stride) {
  float lanes[kLanes];
  store(lanes, reduce_each(sums));
  for (int64_t r = 0; r < kTileRows; ++r)
    std::memcpy(out + r * stride, lanes + r * kTileLatents, kTileLatents * sizeof(float));
}
#else
constexpr int64_t kTileRows = 2, kTileLatents = 2;

inline void reduce_tile(const F16 sums[kTileRows * kTileLatents], float* out, int64_t stride) {
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t c = 0; c < kTileLatents; ++c)
      out[r * stride + c] = reduce(sums[r * kTileLatents + c]);
}
#endif

inline void dot_tile(const float* x, const float* w, int64_t w_stride, int64_t d, float* out,
                     int64_t out_stride) {
  F16 sums[kTileRows * kTileLatents];
  for (F16& sum : sums) sum = zero();
  const auto step = [&](auto load_lanes, int64_t i) {
    F16 rows[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) rows[r] = load_lanes(x + r * d + i);
    for (int64_t c = 0; c < kTileLatents; ++c) {
      const F16 lanes = load_lanes(w + c * w_stride + i);
      for (int64_t r = 0; r < kTileRows; ++r)
        sums[r * kTileLatents + c] = fma(rows[r], lanes, sums[r * kTileLatents + c]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) step([](const float* p) { return load(p); }, i);
  if (i < d) step([&](const float* p) { return load_partial(p, d - i); }, i);
  reduce_tile(sums, out, out_stride);
}

// The rows of a tile of w as float32: where they are, or widened into `memory`.
inline const float* widened(const float* w, int64_t, int64_t, float*) { return w; }
inline const float* widened(const bfloat16* w, int64_t stride, int64_t d, float* memory) {
  for (int64_t c = 0; c < kTileLatents; ++c) load_row(w + c * stride, nullptr, d, memory + c * d);
  return memory;
}

// out[n][f] = <x_n, w_f>: x [n_rows, d] and out [n_rows, f_count] contiguous, `memory`
// [kTileLatents * d] working memory.
template <typename T>
inline void dot_block(const float* x, int64_t n_rows, const T* w, int64_t stride, int64_t f_count,
                      int64_t d, float* memory, float* out) {
  int64_t f = 0;
  for (; f + kTileLatents <= f_count; f += kTileLatents) {
    const float* tile = widened(w + f * stride, stride, d, memory);
    const int64_t tile_stride = tile == memory ? d : stride;
    int64_t n = 0;
    for (; n + kTileRows <= n_rows; n += kTileRows)
      dot_tile(x + n * d, tile, tile_stride, d, out + n * f_count + f, f_count);
    for (; n < n_rows; ++n)
      for (int64_t c = 0; c < kTileLatents; ++c)
        out[n * f_count + f + c] = dot(x + n * d, tile + c * tile_stride, d);
  }
  for (; f < f_count; ++f)
    for (int64_t n = 0; n < n_rows; ++n) out[n * f_count + f] = dot(x + n * d, w + f * stride, d);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
