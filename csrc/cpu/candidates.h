// What a screen keeps of a row: the latents that could still be among the k largest, each with the
// interval that holds its pre-activation, and the threshold below which nothing can win.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "interval.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// One row's candidates, in the order of their indices.
struct Candidates {
  float* lower;
  float* upper;
  int32_t* index;
  int64_t count;
  float threshold;
};

Candidates candidates_of(const SelectionState& state, int64_t n) {
  const int64_t at = n * state.capacity;
  return {state.lower + at, state.upper + at, state.indices + at, state.counts[n],
          state.thresholds[n]};
}

int64_t count_at_least(const float* values, int64_t count, float bound) {
  const F16 lanes_bound = broadcast(bound);
  int64_t found = 0, j = 0;
  for (; j + kLanes <= count; j += kLanes)
    found += __builtin_popcount(greater_equal(load(values + j), lanes_bound));
  for (; j < count; ++j) found += values[j] >= bound;
  return found;
}

// One of `values` that at least k of them reach, at or just below the k-th largest; `floor` if
// fewer than k reach that, -inf if fewer than k are above it. `floor`, or -inf, is where the search
// starts: k latents of the row are known to reach it, which need not be among `values` yet.
// Bisection, 16 passes over a few cache lines, where nth_element spent ten times as long on
// branches that cannot be predicted; any such value is a valid threshold, a closer one only prunes
// more.
float kth_largest_or_less(const float* values, int64_t count, int64_t k, float floor) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  F16 highest = broadcast(-kInf);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) highest = max(load(values + j), highest);
  float lanes[kLanes], high = -kInf, low = floor;
  store(lanes, highest);
  for (float lane : lanes) high = lane > high ? lane : high;
  for (; j < count; ++j) high = values[j] > high ? values[j] : high;
  if (low == -kInf) {
    low = kInf;
    for (j = 0; j < count; ++j) low = values[j] < low && values[j] > -kInf ? values[j] : low;
  }
  if (count_at_least(values, count, low) < k) return floor;
  if (count_at_least(values, count, high) >= k) return high;
  for (int pass = 0; pass < 16; ++pass) {
    const float middle = 0.5f * low + 0.5f * high;
    if (!(middle > low && middle < high)) break;
    (count_at_least(values, count, middle) >= k ? low : high) = middle;
  }
  // No value lies between `low` and the least one that reaches it, so that one serves as well; ties
  // end here.
  float reached = kInf;
  for (j = 0; j < count; ++j)
    reached = values[j] >= low && values[j] < reached ? values[j] : reached;
  return reached;
}

// Raises the threshold towards the k-th largest lower end and drops what cannot win any more.
void prune(Candidates& c, int64_t k) {
  if (c.count <= k) return;
  c.threshold = std::max(c.threshold, kth_largest_or_less(c.lower, c.count, k, c.threshold));
  int64_t kept = 0, certain = 0;
  for (int64_t j = 0; j < c.count; ++j) {
    const float upper = c.upper[j], lower = c.lower[j];
    // At equality a later index loses to k earlier ones that are at least as large.
    const bool loses = upper < c.threshold || (upper == c.threshold && certain >= k);
    certain += lower >= c.threshold;
    c.lower[kept] = lower;
    c.upper[kept] = upper;
    c.index[kept] = c.index[j];
    kept += !loses;
  }
  c.count = kept;
}

// Appends the lanes of `mask`; false if they do not fit even after pruning.
inline bool append(Candidates& c, int64_t& limit, const Interval& lanes, uint32_t mask, int64_t f,
                   int64_t k, int64_t capacity) {
  if (c.count + kLanes > limit) {
    prune(c, k);
    limit = std::min(capacity, 2 * std::max(c.count, k) + 64);
    if (c.count + kLanes > limit) return false;
  }
  store_packed(c.lower + c.count, lower_end(lanes), mask);
  store_packed(c.upper + c.count, add(lanes.pre, lanes.error), mask);
  store_packed_numbers(c.index + c.count, static_cast<int32_t>(f), mask);
  c.count += __builtin_popcount(mask);
  return true;
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
