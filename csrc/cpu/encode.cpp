// encode_topk: the k largest of pre[n, f] = <x_n - b_dec, w_f> + b_enc[f], exactly; with a scale
// the k largest of fl(pre[n, f] scale[f]), whose values are still those of pre.
//
// Screen and rescore. A GEMM of any kind (its caller's choice) gives scores s for a chunk of
// latents. With the bound e >= |s - pre| of docs/maths.md, pre lies in [s - e, s + e]; a latent
// whose upper end does not reach the k-th largest lower end of latents before it cannot be among
// the winners. The few that remain are recomputed by the one defined dot product (dot.h) and ranked
// by (value, then lower index). A row whose candidates do not fit, or that holds inf, is redone
// over all latents with the defined dot product: slower, never wrong.
//
// Access: a chunk of scores is read once, row by row, while it is still in cache; the bounds of a
// chunk (two floats a latent) stay in the first-level cache. Per 16 scores: four loads, four fused
// multiply-adds, one compare. Measured with the chunk of backends/cpu.py: 3 % of the GEMM's time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "dot.h"
#include "fastsae/scratch.h"
#include "isa_kernels.h"
#include "ranking.h"
#include "select_row.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Where a row's picks go, and what selection is among.
template <typename T>
struct Picks {
  T* values;
  int32_t* indices;
  int64_t k;
  bool relu_first;
};

// Selection among relu(pre): what is positive (or NaN) stands first already; the places left go to
// zeros, of which the lowest indices win. No further pre-activation is needed for that.
template <typename T>
void fill_with_zeros(const Key* keys, const Picks<T>& picks) {
  int64_t kept = 0;
  while (kept < picks.k && !(key_value(keys[kept]) <= 0.0f)) ++kept;
  if (kept == picks.k) return;
  Scratch<int32_t> positive(kept);
  std::copy(picks.indices, picks.indices + kept, positive.get());
  std::sort(positive.get(), positive.get() + kept);
  int64_t next = 0;
  int32_t f = 0;
  for (int64_t j = kept; j < picks.k; ++j, ++f) {
    for (; next < kept && positive[next] == f; ++next) ++f;
    assign(picks.values[j], 0.0f);
    picks.indices[j] = f;
  }
}

// What a row's latents are ranked by, and the products it takes.
template <typename T>
struct Ranking {
  const float* x;
  const T* w;
  int64_t stride;
  int64_t d;
  const float* b_enc;
  const float* scale;

  // Pre-activations of the latents index(0) to index(count - 1).
  template <typename Index>
  void preactivations(int64_t count, Index index, float* out) const {
    gathered_dots(x, w, stride, d, count, index, out);
    if (!b_enc) return;
    for (int64_t j = 0; j < count; ++j) out[j] += b_enc[index(j)];
  }
  Key key(float pre, int32_t f) const { return make_key(scale ? pre * scale[f] : pre, f); }
};

// `scratch` has room for k.
template <typename T>
void write_best(const Ranking<T>& ranking, Key* keys, int64_t count, float* scratch,
                const Picks<T>& picks) {
  std::partial_sort(keys, keys + picks.k, keys + count, Greater());
  for (int64_t j = 0; j < picks.k; ++j) {
    assign(picks.values[j], key_value(keys[j]));
    picks.indices[j] = key_index(keys[j]);
  }
  if (ranking.scale) {
    // A key holds what was ranked; the few pre-activations are computed again.
    ranking.preactivations(picks.k, [&](int64_t j) { return picks.indices[j]; }, scratch);
    for (int64_t j = 0; j < picks.k; ++j) assign(picks.values[j], scratch[j]);
  }
  if (picks.relu_first) fill_with_zeros(keys, picks);
}

// Every latent by the defined dot product, keeping the best k of what has been seen.
template <typename T>
void select_row_exactly(const Ranking<T>& ranking, int64_t d_sae, Key* keys, int64_t room,
                        float* scratch, const Picks<T>& picks) {
  const int64_t k = picks.k;
  constexpr int64_t kBlock = 64;
  float dots[kBlock];
  int64_t count = 0;
  for (int64_t f = 0; f < d_sae; f += kBlock) {
    const int64_t block = std::min(kBlock, d_sae - f);
    ranking.preactivations(block, [f](int64_t j) { return f + j; }, dots);
    if (count + block > room) {
      std::nth_element(keys, keys + (k - 1), keys + count, Greater());
      count = k;
    }
    for (int64_t j = 0; j < block; ++j)
      keys[count++] = ranking.key(dots[j], static_cast<int32_t>(f + j));
  }
  write_best(ranking, keys, count, scratch, picks);
}

// The defined dot product of the candidates, first of k whose intervals lie highest; then, of the
// others, only those that could still reach the least value found. Returns how many keys were made.
template <typename T>
int64_t rescore(Candidates& c, const Ranking<T>& ranking, int64_t k, float* scratch, Key* keys) {
  for (int64_t j = 0; j < c.count; ++j) scratch[j] = 0.5f * c.lower[j] + 0.5f * c.upper[j];
  const float high =
      kth_largest_or_less(scratch, c.count, k, -std::numeric_limits<float>::infinity());
  int64_t first = 0;
  for (int64_t j = 0; j < c.count; ++j) {
    if (!(scratch[j] >= high)) continue;
    std::swap(c.index[first], c.index[j]);
    std::swap(c.upper[first], c.upper[j]);
    std::swap(scratch[first], scratch[j]);
    ++first;
  }
  const auto values_of = [&](int64_t begin, int64_t end) {
    ranking.preactivations(end - begin, [&](int64_t j) { return c.index[begin + j]; }, scratch);
    for (int64_t j = begin; j < end; ++j) keys[j] = ranking.key(scratch[j - begin], c.index[j]);
  };
  values_of(0, first);
  if (first < k) {
    values_of(first, c.count);
    return c.count;
  }
  uint64_t least = keys[0].bits;
  for (int64_t j = 1; j < first; ++j) least = keys[j].bits < least ? keys[j].bits : least;
  const float bound = key_value({least});
  int64_t count = first;
  for (int64_t j = first; j < c.count; ++j) {
    if (c.upper[j] < bound) continue;
    c.index[count] = c.index[j];
    c.upper[count++] = c.upper[j];
  }
  values_of(first, count);
  return count;
}

template <typename T>
void finish_rows(Matrix x, const float* b_dec, Matrix w_enc, const float* b_enc, const float* scale,
                 int64_t n_rows, int64_t d, int64_t d_sae, const SelectionState& state,
                 const Picks<T>& all) {
  const int64_t k = all.k;
  const T* w = static_cast<const T*>(w_enc.data);
  const int64_t room = std::max(state.capacity, 2 * k + 64);
#pragma omp parallel
  {
    Scratch<float> row(d), scratch(room);
    Scratch<Key> keys(room);
#pragma omp for schedule(dynamic, 4)
    for (int64_t n = 0; n < n_rows; ++n) {
      if (state.redo[n] == kLeftOut) continue;
      load_row(static_cast<const T*>(x.data) + n * x.stride, b_dec, d, row.get());
      const Picks<T> picks = {all.values + n * k, all.indices + n * k, k, all.relu_first};
      const Ranking<T> ranking = {row.get(), w, w_enc.stride, d, b_enc, scale};
      if (state.redo[n]) {
        bool nan = false;
        for (int64_t i = 0; i < d; ++i) nan |= row[i] != row[i];
        if (!nan) {
          select_row_exactly(ranking, d_sae, keys.get(), room, scratch.get(), picks);
          continue;
        }
        // Every product with this row is NaN: all latents tie, so the lowest indices win.
        for (int64_t j = 0; j < k; ++j) {
          assign(picks.values[j], std::numeric_limits<float>::quiet_NaN());
          picks.indices[j] = static_cast<int32_t>(j);
        }
        continue;
      }
      Candidates c = candidates_of(state, n);
      prune(c, k);
      const int64_t count = rescore(c, ranking, k, scratch.get(), keys.get());
      write_best(ranking, keys.get(), count, scratch.get(), picks);
    }
  }
}

}  // namespace

void select_chunk(Matrix scores, int64_t n_rows, int64_t f_begin, int64_t f_count,
                  const float* b_enc, const float* scale, ScreenBounds bounds, int64_t k,
                  SelectionState state) {
  const LatentsOfChunk chunk = {
      f_begin, f_count, b_enc, scale, bounds.latent_norm, bounds.latent_residual};
  const auto select = [&](auto* row, int64_t n) {
    if (b_enc)
      select_row<true>(row, bounds_of_row(bounds, n), chunk, n, k, state);
    else
      select_row<false>(row, bounds_of_row(bounds, n), chunk, n, k, state);
  };
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < n_rows; ++n) {
    if (state.redo[n]) continue;
    if (scores.dtype == DType::float32)
      select(static_cast<const float*>(scores.data) + n * scores.stride, n);
    else
      select(static_cast<const bfloat16*>(scores.data) + n * scores.stride, n);
  }
}

void select_finish(Matrix x, const float* b_dec, Matrix w_enc, const float* b_enc,
                   const float* scale, int64_t n, int64_t d, int64_t d_sae, int64_t k,
                   bool relu_first, SelectionState state, void* values, int32_t* indices) {
  const auto finish = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    finish_rows<T>(x, b_dec, w_enc, b_enc, scale, n, d, d_sae, state,
                   {typed, indices, k, relu_first});
  };
  if (x.dtype == DType::float32)
    finish(static_cast<float*>(values));
  else
    finish(static_cast<bfloat16*>(values));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
