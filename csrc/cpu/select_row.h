// One row's scores of a chunk of latents, looked through for candidates (encode.cpp states the
// method).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "candidates.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// What a screen knows of the latents [f_begin, f_begin + f_count): biases and scales by their
// number, norms and residuals from the first on.
struct LatentsOfChunk {
  int64_t f_begin, f_count;
  const float* b_enc;
  const float* scale;
  const float* norm;
  const float* residual;
};

constexpr int64_t kMostFirstLatents = 1024;

// The interval of pre * scale. Scaling rounds twice more, the middle here and the value itself.
inline Interval scaled(const Interval& lanes, const RowBounds& row, F16 scale) {
  const F16 pre = mul(lanes.pre, scale);
  const F16 error = fma(mul(lanes.error, broadcast(1.0f + 0x1p-20f)), abs(scale), row.absolute);
  return {pre, fma(row.bias_rounding, abs(pre), error)};
}

template <bool kBias, typename Score>
void select_row(const Score* scores, const RowBounds& row, const LatentsOfChunk& chunk, int64_t n,
                int64_t k, const SelectionState& state) {
  Candidates c = candidates_of(state, n);
  const int64_t f_begin = chunk.f_begin, f_count = chunk.f_count;
  const float *alpha = chunk.norm, *beta = chunk.residual;
  const float* bias = kBias ? chunk.b_enc + f_begin : nullptr;
  const float* scale = chunk.scale ? chunk.scale + f_begin : nullptr;
  const auto at = [&](int64_t f) {
    const Interval lanes = interval<kBias>(row, scores + f, bias + f, alpha + f, beta + f);
    return scale ? scaled(lanes, row, load(scale + f)) : lanes;
  };
  int64_t limit = std::min(state.capacity, 2 * std::max(c.count, k) + 64);
  const auto visit = [&](const Interval& lanes, uint32_t valid, int64_t f) {
    const F16 upper = add(lanes.pre, lanes.error);
    const uint32_t mask = not_less_equal(upper, broadcast(c.threshold)) & valid;
    return !mask || append(c, limit, lanes, mask, f_begin + f, k, state.capacity);
  };
  int64_t f = 0;
  bool fits = true;
  if (c.count == 0 && f_count >= k + kLanes && f_count <= kMostFirstLatents) {
    // The first chunk sets the threshold before it is scanned: appending and pruning all of it took
    // five times as long. Ties at the threshold are safe, k of this chunk reach it and a tie is not
    // below it.
    float lowers[kMostFirstLatents];
    const int64_t whole = f_count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store(lowers + i, lower_end(at(i)));
    const float first =
        kth_largest_or_less(lowers, whole, k, -std::numeric_limits<float>::infinity());
    c.threshold = std::nextafter(first, -std::numeric_limits<float>::infinity());
  }
  for (; fits && f + kLanes <= f_count; f += kLanes) fits = visit(at(f), 0xffffu, f);
  if (fits && f < f_count) {
    const int64_t rest = f_count - f;
    Score last_scores[kLanes] = {};
    float last_bias[kLanes] = {}, last_alpha[kLanes] = {}, last_beta[kLanes] = {};
    for (int64_t l = 0; l < rest; ++l) {
      last_scores[l] = scores[f + l];
      if (kBias) last_bias[l] = bias[f + l];
      last_alpha[l] = alpha[f + l];
      last_beta[l] = beta[f + l];
    }
    Interval last = interval<kBias>(row, last_scores, last_bias, last_alpha, last_beta);
    if (scale) last = scaled(last, row, load_partial(scale + f, rest));
    fits = visit(last, (1u << rest) - 1u, f);
  }
  if (!fits) state.redo[n] = kOverflowed;
  state.counts[n] = static_cast<int32_t>(c.count);
  state.thresholds[n] = c.threshold;
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
