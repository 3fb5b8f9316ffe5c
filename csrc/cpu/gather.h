// out[d] (+)= sum_j weight(j) * (rows[index(j)][d] - shift[d]), in the order of j, as one chain of
// fused multiply-adds for each d. Four rows are taken at a time so that the running sum, which
// lives in the first-level cache, is loaded and stored once for four rows; the next four are
// prefetched (the rows lie anywhere in a matrix of tens of megabytes, where hardware prefetch
// cannot guess).
#pragma once

#include "fastsae/simd.h"

namespace fastsae {
namespace FASTSAE_ISA {

template <bool kShifted>
inline F16 shifted(F16 lanes, const float* shift) {
  return kShifted ? sub(lanes, load(shift)) : lanes;
}

template <bool kShifted, typename T>
inline void add_four_rows(const float weight[4], const T* const row[4], const float* shift,
                          int64_t d, float* out) {
  const F16 w0 = broadcast(weight[0]), w1 = broadcast(weight[1]);
  const F16 w2 = broadcast(weight[2]), w3 = broadcast(weight[3]);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    F16 sum = load(out + i);
    sum = fma(w0, shifted<kShifted>(load(row[0] + i), shift + i), sum);
    sum = fma(w1, shifted<kShifted>(load(row[1] + i), shift + i), sum);
    sum = fma(w2, shifted<kShifted>(load(row[2] + i), shift + i), sum);
    sum = fma(w3, shifted<kShifted>(load(row[3] + i), shift + i), sum);
    store(out + i, sum);
  }
  for (; i < d; ++i) {
    const float s = kShifted ? shift[i] : 0.0f;
    float sum = out[i];
    for (int64_t l = 0; l < 4; ++l) sum = std::fma(weight[l], to_float(row[l][i]) - s, sum);
    out[i] = sum;
  }
}

template <bool kShifted, typename T>
inline void add_row(float weight, const T* row, const float* shift, int64_t d, float* out) {
  const F16 w = broadcast(weight);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes)
    store(out + i, fma(w, shifted<kShifted>(load(row + i), shift + i), load(out + i)));
  for (; i < d; ++i) {
    const float s = kShifted ? shift[i] : 0.0f;
    out[i] = std::fma(weight, to_float(row[i]) - s, out[i]);
  }
}

template <bool kShifted, typename T, typename Weight, typename Index>
inline void add_weighted_rows(const T* rows, int64_t stride, int64_t d, const float* shift,
                              int64_t count, Weight weight, Index index, float* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    float w[4];
    const T* row[4];
    for (int64_t l = 0; l < 4; ++l) {
      w[l] = weight(j + l);
      row[l] = rows + static_cast<int64_t>(index(j + l)) * stride;
      if (j + 4 + l < count)
        prefetch_row(rows + static_cast<int64_t>(index(j + 4 + l)) * stride, d);
    }
    add_four_rows<kShifted>(w, row, shift, d, out);
  }
  for (; j < count; ++j)
    add_row<kShifted>(weight(j), rows + static_cast<int64_t>(index(j)) * stride, shift, d, out);
}

template <typename T>
inline void write_row(const float* from, int64_t d, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(to + i, load(from + i));
  for (; i < d; ++i) assign(to[i], from[i]);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
