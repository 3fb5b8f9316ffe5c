// What a screen knows of a pre-activation: the interval that holds it, by the bounds in
// docs/maths.md, "Certified selection".
#pragma once

#include <limits>

#include "fastsae/abi.h"
#include "fastsae/simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Adding the bias rounds twice, once to the score and once to the value, and the ends of an
// interval round again: each by at most 2^-24 of what is about |pre|.
constexpr float kBiasRounding = 0x1p-21f;

// Sixteen latents of a row as the screen sees them: intervals [pre - error, pre + error].
struct RowBounds {
  F16 residual, norm, score_rounding, bias_rounding, absolute;
};
struct Interval {
  F16 pre, error;
};

// A NaN at either end says nothing about the value: the interval then reaches down to -inf, and up
// past everything (the compares with it let a NaN pass).
inline F16 lower_end(const Interval& lanes) {
  return max(sub(lanes.pre, lanes.error), broadcast(-std::numeric_limits<float>::infinity()));
}

inline RowBounds bounds_of_row(const ScreenBounds& bounds, int64_t n) {
  const float a = bounds.row_residual[n], b = bounds.row_norm[n];
  // A row of zeros is multiplied without error; a bound of exactly zero lets its ties be decided by
  // the screen (by index) where any slack would keep every latent.
  const bool exact = a == 0.0f && b == 0.0f;
  return {broadcast(a), broadcast(b), broadcast(exact ? 0.0f : bounds.score_rounding),
          broadcast(exact ? 0.0f : kBiasRounding), broadcast(exact ? 0.0f : bounds.absolute)};
}

template <bool kBias>
inline Interval interval_of(const RowBounds& row, F16 s, F16 bias, F16 alpha, F16 beta) {
  const F16 pre = kBias ? add(s, bias) : s;
  F16 error = fma(row.score_rounding, abs(s), row.absolute);
  error = fma(row.bias_rounding, abs(pre), error);
  error = fma(row.norm, beta, error);
  error = fma(row.residual, alpha, error);
  return {pre, error};
}

template <bool kBias, typename Score>
inline Interval interval(const RowBounds& row, const Score* score, const float* bias,
                         const float* alpha, const float* beta) {
  return interval_of<kBias>(row, load(score), kBias ? load(bias) : zero(), load(alpha), load(beta));
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
