// One latent's weighted sum of rows, for accumulate_rows and fused_update alike:
//   total = sum over entries e of latent f of c_t v_e (g_t - shift), t = tokens[e]
// or some columns of it.
//
// Entries are summed in blocks of 64 whose sums are then added in order: one chain of thousands of
// float32 additions would lose accuracy that a GEMM, which blocks its sums too, keeps.
#pragma once

#include "gather.h"

namespace fastsae {
namespace FASTSAE_ISA {

// Writes the columns [first, first + d) to `total` [d] and returns the sum of c_t v_e. `partial`
// [d] is working memory.
template <typename T>
inline float accumulate_latent(const T* values, const LatentMajor& codes, int64_t f, Matrix g,
                               int64_t first, int64_t d, const float* shift, const float* row_scale,
                               float* total, float* partial) {
  constexpr int64_t kBlock = 64;
  const int64_t begin = codes.offsets[f], end = codes.offsets[f + 1];
  const T* rows = static_cast<const T*>(g.data) + first;
  float weights[kBlock];
  // In double: the sum of a latent's values costs nothing beside its rows, and is a gradient of its
  // own.
  double value_sum = 0.0;
  std::memset(total, 0, static_cast<size_t>(d) * sizeof(float));
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    float* sum = at == begin ? total : partial;
    if (sum == partial) std::memset(partial, 0, static_cast<size_t>(d) * sizeof(float));
    for (int64_t j = 0; j < count; ++j) {
      weights[j] = to_float(values[codes.entries[at + j]]);
      if (row_scale) weights[j] *= row_scale[codes.tokens[at + j]];
      value_sum += weights[j];
    }
    const auto weight = [&](int64_t j) { return weights[j]; };
    const auto token = [&](int64_t j) { return codes.tokens[at + j]; };
    if (shift)
      add_weighted_rows<true>(rows, g.stride, d, shift + first, count, weight, token, sum);
    else
      add_weighted_rows<false>(rows, g.stride, d, nullptr, count, weight, token, sum);
    if (sum == partial)
      for (int64_t i = 0; i < d; ++i) total[i] += partial[i];
  }
  return static_cast<float>(value_sum);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
