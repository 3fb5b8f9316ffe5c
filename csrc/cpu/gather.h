// out[d] += sum_j weight(j) * (rows[index(j)][d] - shift[d]), in the order of j.
//
// Eight rows are summed by a chain of fused multiply-adds from zero, and their sum is added to the
// running one: against a single chain over all rows, an eighth of the roundings is of the size of
// the whole sum (at k = 80 the largest error of a decode falls from 2.0 times that of the dense
// product to 0.8), and the running sum, which lives in the first-level cache, is loaded and
// stored once for eight rows. The next eight are prefetched: the rows lie anywhere in a matrix of
// tens of megabytes, where hardware prefetch cannot guess.
#pragma once

#include "fastsae/simd.h"

namespace fastsae {
namespace FASTSAE_ISA {

template <bool kShifted>
inline F16 shifted(F16 lanes, const float* shift) {
  return kShifted ? sub(lanes, load(shift)) : lanes;
}

template <int kRows, bool kShifted, typename T>
inline void add_block(const float* weight, const T* const* row, const float* shift, int64_t d,
                      float* out) {
  F16 w[kRows];
  for (int l = 0; l < kRows; ++l) w[l] = broadcast(weight[l]);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    F16 sum = mul(w[0], shifted<kShifted>(load(row[0] + i), shift + i));
    for (int l = 1; l < kRows; ++l)
      sum = fma(w[l], shifted<kShifted>(load(row[l] + i), shift + i), sum);
    store(out + i, add(load(out + i), sum));
  }
  for (; i < d; ++i) {
    const float s = kShifted ? shift[i] : 0.0f;
    float sum = weight[0] * (to_float(row[0][i]) - s);
    for (int l = 1; l < kRows; ++l) sum = std::fma(weight[l], to_float(row[l][i]) - s, sum);
    out[i] += sum;
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

// A group of up to eight rows.
template <bool kShifted, typename T>
inline void add_group(int64_t count, const float* weight, const T* const* row, const float* shift,
                      int64_t d, float* out) {
  if (count == 8) return add_block<8, kShifted>(weight, row, shift, d, out);
  int64_t at = 0;
  if (count & 4) {
    add_block<4, kShifted>(weight, row, shift, d, out);
    at = 4;
  }
  if (count & 2) {
    add_block<2, kShifted>(weight + at, row + at, shift, d, out);
    at += 2;
  }
  if (count & 1) add_row<kShifted>(weight[at], row[at], shift, d, out);
}

template <bool kShifted, typename T, typename Weight, typename Index>
inline void add_weighted_rows(const T* rows, int64_t stride, int64_t d, const float* shift,
                              int64_t count, Weight weight, Index index, float* out) {
  constexpr int64_t kBlock = 8;
  float w[kBlock];
  const T* row[kBlock];
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t block = count - j < kBlock ? count - j : kBlock;
    for (int64_t l = 0; l < block; ++l) {
      w[l] = weight(j + l);
      row[l] = rows + static_cast<int64_t>(index(j + l)) * stride;
      if (j + kBlock + l < count)
        prefetch_row(rows + static_cast<int64_t>(index(j + kBlock + l)) * stride, d);
    }
    add_group<kShifted>(block, w, row, shift, d, out);
  }
}

template <typename T>
inline void write_row(const float* from, int64_t d, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(to + i, load(from + i));
  for (; i < d; ++i) assign(to[i], from[i]);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
