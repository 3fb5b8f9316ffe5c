// encode_groupmax: of each group of `size` neighbouring latents the largest
//   relu(pre[n, f]), pre[n, f] = <x_n - b_dec, w_f> + b_enc[f],
// ties by the lower index, with the same screen and the same defined dot product as encode.cpp.
//
// A group keeps its best value so far, zero to begin with. Of a chunk's part of a group a latent is
// out if its interval ends below the highest lower end there, or does not reach above the best; the
// few that remain are recomputed while the chunk's weights are in the second-level cache. Latents
// come in ascending order and replace only what is smaller, so a tie stays with the lower index.
//
// Access: a chunk of scores is read once, row by row; the ends of its intervals (two floats a
// latent) stay in the first-level cache for the second look at each group. Without scores all
// products of 32 rows with the chunk are made together (dot_block.h).
#include <algorithm>
#include <cmath>
#include <limits>

#include "dot_block.h"
#include "fastsae/scratch.h"
#include "interval.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t kRows = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one thread works in; ends and survivors have sixteen places more than latents, so that lanes
// are loaded and stored whole.
struct Workplace {
  explicit Workplace(const GroupChunk& c)
      : x(kRows * c.d),
        dots(kRows * c.f_count),
        tile(kTileLatents * c.d),
        lower(c.f_count + kLanes),
        upper(c.f_count + kLanes),
        survivors(c.f_count + kLanes) {}

  Scratch<float> x, dots, tile, lower, upper;
  Scratch<int32_t> survivors;
};

// The intervals' ends of a row's latents.
template <bool kBias, typename Score>
void ends_of(const Score* scores, const GroupChunk& c, const RowBounds& row, Workplace& work) {
  const float *alpha = c.bounds.latent_norm, *beta = c.bounds.latent_residual, *bias = c.b_enc;
  const auto keep = [&](const Interval& lanes, int64_t f) {
    store(work.lower.get() + f, lower_end(lanes));
    store(work.upper.get() + f, add(lanes.pre, lanes.error));
  };
  int64_t f = 0;
  for (; f + kLanes <= c.f_count; f += kLanes)
    keep(interval<kBias>(row, scores + f, bias + f, alpha + f, beta + f), f);
  if (f == c.f_count) return;
  Score last_scores[kLanes] = {};
  float last_bias[kLanes] = {}, last_alpha[kLanes] = {}, last_beta[kLanes] = {};
  for (int64_t l = 0; f + l < c.f_count; ++l) {
    last_scores[l] = scores[f + l];
    if (kBias) last_bias[l] = bias[f + l];
    last_alpha[l] = alpha[f + l];
    last_beta[l] = beta[f + l];
  }
  keep(interval<kBias>(row, last_scores, last_bias, last_alpha, last_beta), f);
}

float largest(const float* values, int64_t count) {
  if (count < kLanes) return *std::max_element(values, values + count);
  F16 most = load(values + count - kLanes);
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) most = max(most, load(values + i));
  float lanes[kLanes];
  store(lanes, most);
  return *std::max_element(lanes, lanes + kLanes);
}

// Calls each(g, begin, end) for the parts of groups that lie in the chunk, in latents of the chunk.
template <typename Each>
void for_each_group(const GroupChunk& c, Each each) {
  for (int64_t begin = 0; begin < c.f_count;) {
    const int64_t g = (c.f_begin + begin) / c.size;
    const int64_t end = std::min(c.f_count, (g + 1) * c.size - c.f_begin);
    each(g, begin, end);
    begin = end;
  }
}

// Which latents could be the best of their groups; returns how many.
int64_t survivors_of(const GroupChunk& c, const float* best, Workplace& work) {
  int64_t count = 0;
  for_each_group(c, [&](int64_t g, int64_t begin, int64_t end) {
    // NaN is above all.
    if (best[g] != best[g]) return;
    // What ties with the highest lower end may stand before it.
    const float high = std::nextafter(largest(work.lower.get() + begin, end - begin), -kInfinity);
    const F16 bound = broadcast(std::max(best[g], high));
    for (int64_t f = begin; f < end; f += kLanes) {
      const uint32_t valid = end - f < kLanes ? (1u << (end - f)) - 1u : 0xffffu;
      const uint32_t mask = not_less_equal(load(work.upper.get() + f), bound) & valid;
      store_packed_numbers(work.survivors.get() + count, static_cast<int32_t>(f), mask);
      count += __builtin_popcount(mask);
    }
  });
  return count;
}

// A value of latent f of the chunk, after those of all lower latents.
inline void keep_best(const GroupChunk& c, int64_t n, int64_t f, float dot) {
  const float pre = c.b_enc ? dot + c.b_enc[f] : dot;
  const int64_t at = n * c.k + (c.f_begin + f) / c.size;
  // Written so that a NaN replaces all but a NaN.
  if (pre <= c.values[at] || c.values[at] != c.values[at]) return;
  c.values[at] = pre;
  c.indices[at] = static_cast<int32_t>(c.f_begin + f);
}

template <typename T>
void load_x(const GroupChunk& c, int64_t n, float* x) {
  load_row(static_cast<const T*>(c.x.data) + n * c.x.stride, c.b_dec, c.d, x);
}

template <typename T, typename Score>
void screened_row(const Score* scores, const GroupChunk& c, int64_t n, Workplace& work) {
  int32_t* survivors = work.survivors.get();
  int64_t count = c.f_count;
  if (c.not_finite[n]) {
    for (int64_t f = 0; f < count; ++f) survivors[f] = static_cast<int32_t>(f);
  } else {
    const RowBounds row = bounds_of_row(c.bounds, n);
    if (c.b_enc)
      ends_of<true>(scores, c, row, work);
    else
      ends_of<false>(scores, c, row, work);
    count = survivors_of(c, c.values + n * c.k, work);
  }
  if (count == 0) return;
  load_x<T>(c, n, work.x.get());
  gathered_dots(
      work.x.get(), static_cast<const T*>(c.w_enc.data), c.w_enc.stride, c.d, count,
      [&](int64_t j) { return survivors[j]; }, work.dots.get());
  for (int64_t j = 0; j < count; ++j) keep_best(c, n, survivors[j], work.dots[j]);
}

template <typename T>
void dense_rows(const GroupChunk& c, int64_t begin, int64_t end, Workplace& work) {
  for (int64_t n = begin; n < end; ++n) load_x<T>(c, n, work.x.get() + (n - begin) * c.d);
  dot_block(work.x.get(), end - begin, static_cast<const T*>(c.w_enc.data), c.w_enc.stride,
            c.f_count, c.d, work.tile.get(), work.dots.get());
  for (int64_t n = begin; n < end; ++n)
    for (int64_t f = 0; f < c.f_count; ++f)
      keep_best(c, n, f, work.dots[(n - begin) * c.f_count + f]);
}

template <typename T, typename Score>
void group_chunk_as(const Score* scores, int64_t n_rows, const GroupChunk& c) {
#pragma omp parallel
  {
    Workplace work(c);
#pragma omp for schedule(dynamic, 1)
    for (int64_t begin = 0; begin < n_rows; begin += kRows) {
      const int64_t end = std::min(n_rows, begin + kRows);
      if (!scores) {
        dense_rows<T>(c, begin, end, work);
        continue;
      }
      for (int64_t n = begin; n < end; ++n) screened_row<T>(scores + n * c.f_count, c, n, work);
    }
  }
}

}  // namespace

void group_chunk(Matrix scores, int64_t n_rows, const GroupChunk& chunk) {
  const auto run = [&](auto* typed) {
    if (chunk.x.dtype == DType::float32)
      group_chunk_as<float>(typed, n_rows, chunk);
    else
      group_chunk_as<bfloat16>(typed, n_rows, chunk);
  };
  if (scores.dtype == DType::float32)
    run(static_cast<const float*>(scores.data));
  else
    run(static_cast<const bfloat16*>(scores.data));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
