// Norms that bounds may rest on.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// A norm that is never below the true one: the float32 sum of squares is within (d/16 + 8) 2^-24 of
// exact, and squares under 2^-126 may vanish, each hiding an entry of at most 2^-63.
inline float norm_above(float sum_of_squares, int64_t d) {
  if (sum_of_squares != sum_of_squares) return std::numeric_limits<float>::infinity();
  const double slack = 1.0 + 6.0e-8 * (static_cast<double>(d) / 16 + 16);
  return static_cast<float>((std::sqrt(static_cast<double>(sum_of_squares)) * slack +
                             std::sqrt(static_cast<double>(d)) * 0x1p-63) *
                            (1.0 + 0x1p-22));
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
