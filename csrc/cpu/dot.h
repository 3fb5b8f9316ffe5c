// The one dot product of the numerics contract: sixteen interleaved chains of fused multiply-adds,
//   p[l] = fma(x[16 t + l], w[16 t + l], p[l]),   t = 0, 1, ...
// then one fixed tree over the lanes. Its bits depend on x and w alone: not on the instruction set,
// the batch, the thread or which path asked for it.
#pragma once

#include "fastsae/simd.h"

namespace fastsae {
namespace FASTSAE_ISA {

template <typename X, typename T>
inline float dot(const X* x, const T* w, int64_t d) {
  F16 sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) sum = fma(load(x + i), load(w + i), sum);
  if (i < d) sum = fma(load_partial(x + i, d - i), load_partial(w + i, d - i), sum);
  return reduce(sum);
}

// Four at once: one chain is bound by the latency of the fused multiply-add (4 cycles a step, two
// units), four independent chains share each load of x and hide most of it.
template <typename T>
inline void dot4(const float* x, const T* const w[4], int64_t d, float out[4]) {
  F16 s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const F16 lanes = load(x + i);
    s0 = fma(lanes, load(w[0] + i), s0);
    s1 = fma(lanes, load(w[1] + i), s1);
    s2 = fma(lanes, load(w[2] + i), s2);
    s3 = fma(lanes, load(w[3] + i), s3);
  }
  if (i < d) {
    const F16 lanes = load_partial(x + i, d - i);
    s0 = fma(lanes, load_partial(w[0] + i, d - i), s0);
    s1 = fma(lanes, load_partial(w[1] + i, d - i), s1);
    s2 = fma(lanes, load_partial(w[2] + i, d - i), s2);
    s3 = fma(lanes, load_partial(w[3] + i, d - i), s3);
  }
  out[0] = reduce(s0);
  out[1] = reduce(s1);
  out[2] = reduce(s2);
  out[3] = reduce(s3);
}

// out[j] = <x, rows[index(j)]> for j in [0, count), prefetching the rows of the next four.
template <typename T, typename Index>
inline void gathered_dots(const float* x, const T* rows, int64_t stride, int64_t d, int64_t count,
                          Index index, float* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T* w[4];
    for (int64_t l = 0; l < 4; ++l) {
      w[l] = rows + static_cast<int64_t>(index(j + l)) * stride;
      if (j + 4 + l < count)
        prefetch_row(rows + static_cast<int64_t>(index(j + 4 + l)) * stride, d);
    }
    dot4(x, w, d, out + j);
  }
  for (; j < count; ++j) out[j] = dot(x, rows + static_cast<int64_t>(index(j)) * stride, d);
}

// A row as float32, less `shift` where there is one: fl(x - b_dec).
template <typename T>
inline void load_row(const T* row, const float* shift, int64_t d, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const F16 lanes = load(row + i);
    store(out + i, shift ? sub(lanes, load(shift + i)) : lanes);
  }
  for (; i < d; ++i) out[i] = to_float(row[i]) - (shift ? shift[i] : 0.0f);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
