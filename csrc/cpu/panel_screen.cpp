// panel_screen, panel_survivors: the screens of encode_topk and encode_threshold in one pass,
// without scores in memory.
//
//   s = <packed x_n, packed w_f>                                      in bfloat16,
//   s = (sum_d (q[n, d] + 128) p[f, d] - 128 sum_d p[f, d]) a_n c_f   in int8,
//   s = (sum_d q[n, d] p[f, d]) a_n c_f                               in int16,
// where sums of whole numbers are exact. What is known of s against the pre-activation is the bound
// of docs/maths.md, "Certified selection"; from there on it is the method of encode.cpp and
// encode_threshold.cpp.
//
// Access. A thread takes a block of up to 256 rows, whose packed form (384 KB in bfloat16 at d =
// 768), a panel of 64 latents (96 KB) and the scores of the first chunk (512 KB) stay in the
// second-level cache, and walks through all panels; W_enc is read once a block. Measured with
// tile registers: 34 ms with blocks of 192 to 384, 63 with 96, 50 with 512. The sums of a tile pass
// through the first-level cache to the comparison with each row's threshold. The first 512 latents
// of encode_topk have no threshold yet: their scores are kept until they give one (select_row.h).
#include <algorithm>

#include "fastsae/scratch.h"
#include "fastsae/threading.h"
#include "isa_kernels.h"
#include "panel_products.h"
#include "select_row.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t kMostRows = 256;
constexpr int64_t kFirstPanels = 8;

#if defined(__AVX512F__)
inline F16 float_sums(const int32_t* sums) {
  return {_mm512_castsi512_ps(_mm512_loadu_si512(sums))};
}
inline F16 whole_numbers(const int32_t* sums, const int32_t* offset) {
  const __m512i lanes = _mm512_loadu_si512(sums);
  if (!offset) return {_mm512_cvtepi32_ps(lanes)};
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(lanes, _mm512_loadu_si512(offset)))};
}
#else
inline F16 float_sums(const int32_t* sums) {
  float lanes[kLanes];
  std::memcpy(lanes, sums, sizeof(lanes));
  return load(lanes);
}
inline F16 whole_numbers(const int32_t* sums, const int32_t* offset) {
  float lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l)
    lanes[l] = static_cast<float>(offset ? sums[l] - offset[l] : sums[l]);
  return load(lanes);
}
#endif

template <ScreenKind kKind>
inline F16 score(const PanelScreen& s, int64_t n, int64_t f, const int32_t* sums) {
  if (kKind == ScreenKind::bfloat16) return float_sums(sums);
  // In this order no scale underflows before the result does.
  const F16 number = whole_numbers(sums, kKind == ScreenKind::int8 ? s.w_offset + f : nullptr);
  return mul(mul(number, broadcast(s.x_scale[n])), load(s.w_scale + f));
}

inline RowBounds bounds_of(const PanelScreen& s, int64_t n) {
  const float a = s.x_residual[n], b = s.x_norm[n];
  const bool exact = a == 0.0f && b == 0.0f;
  return {broadcast(a), broadcast(b), broadcast(exact ? 0.0f : s.score_rounding),
          broadcast(exact ? 0.0f : kBiasRounding), broadcast(exact ? 0.0f : s.x_absolute[n])};
}

template <bool kBias>
inline Interval interval_at(const PanelScreen& s, const RowBounds& row, F16 score, int64_t f) {
  return interval_of<kBias>(row, score, kBias ? load(s.b_enc + f) : zero(), load(s.w_norm + f),
                            load(s.w_residual + f));
}

// A score plus bias below this is below `threshold` with any error that a latent of the panel may
// have: two instructions a vector settle nearly all of them. With t = threshold - e for the largest
// e of the panel, P + 2^-20 |P| + e > threshold implies P > t - 2^-19 |t|; what is beyond that
// makes up for the roundings here.
template <bool kBias>
inline float least_of_panel(const PanelScreen& s, int64_t n, int64_t panel, float threshold) {
  float error =
      s.x_residual[n] * s.most_norm[panel] + s.x_norm[n] * s.most_residual[panel] + s.x_absolute[n];
  if (kBias) error += 0x1p-20f * s.most_bias[panel];
  error *= 1.0f + 0x1p-18f;
  const float least = threshold - error;
  return least - 0x1p-18f * std::fabs(least) - 0x1p-18f * std::fabs(threshold);
}

inline uint32_t valid_lanes(const PanelScreen& s, int64_t f) {
  return s.d_sae - f < kLanes ? (1u << (s.d_sae - f)) - 1u : 0xffffu;
}

// The k largest of a row: a block's candidates, and the scores from which the first threshold
// comes.
template <ScreenKind kKind, bool kBias>
class TopK {
 public:
  TopK(const PanelScreen& screen, const SelectionState& state, int64_t first, int64_t count)
      : s_(screen),
        state_(state),
        first_(first),
        count_(count),
        n_first_(std::min<int64_t>(kFirstPanels * kPanel, screen.d_sae)),
        scores_(count * n_first_),
        limits_(count) {}

  bool left_out(int64_t row) const { return state_.redo[first_ + row] != kScreened; }

  void visit(int64_t row, int64_t panel, const int32_t* sums) {
    if (panel < kFirstPanels)
      keep(row, panel, sums);
    else
      filter(row, panel, sums);
  }

  void after(int64_t panel, bool last) {
    if (panel + 1 == kFirstPanels || (last && panel < kFirstPanels)) select_first();
  }

 private:
  void keep(int64_t row, int64_t panel, const int32_t* sums) {
    const int64_t f = panel * kPanel;
    float lanes[kPanel];
    for (int64_t l = 0; l < kPanel; l += kLanes)
      store(lanes + l, score<kKind>(s_, first_ + row, f + l, sums + l));
    std::memcpy(scores_.get() + row * n_first_ + f, lanes,
                static_cast<size_t>(std::min(kPanel, n_first_ - f)) * sizeof(float));
  }

  void select_first() {
    const LatentsOfChunk chunk = {0, n_first_, s_.b_enc, s_.scale, s_.w_norm, s_.w_residual};
    for (int64_t row = 0; row < count_; ++row) {
      const int64_t n = first_ + row;
      if (left_out(row)) continue;
      select_row<kBias>(scores_.get() + row * n_first_, bounds_of(s_, n), chunk, n, s_.k, state_);
      limits_[row] = std::min(state_.capacity, 2 * std::max<int64_t>(state_.counts[n], s_.k) + 64);
    }
  }

  void filter(int64_t row, int64_t panel, const int32_t* sums) {
    const int64_t n = first_ + row, begin = panel * kPanel;
    uint32_t near[kPanel / kLanes], any = 0;
    if (s_.scale) {
      for (uint32_t& mask : near) mask = any = 0xffffu;
    } else {
      const F16 least = broadcast(least_of_panel<kBias>(s_, n, panel, state_.thresholds[n]));
      for (int64_t v = 0; v < kPanel / kLanes; ++v) {
        const int64_t f = begin + v * kLanes;
        const F16 sum = score<kKind>(s_, n, f, sums + v * kLanes);
        near[v] = not_less_equal(kBias ? add(sum, load(s_.b_enc + f)) : sum, least);
        any |= near[v];
      }
    }
    if (!any) return;
    const RowBounds of_row = bounds_of(s_, n);
    for (int64_t v = 0; v < kPanel / kLanes; ++v) {
      const int64_t f = begin + v * kLanes;
      if (!near[v] || f >= s_.d_sae) continue;
      Interval lanes = interval_at<kBias>(s_, of_row, score<kKind>(s_, n, f, sums + v * kLanes), f);
      if (s_.scale) lanes = scaled(lanes, of_row, load(s_.scale + f));
      const F16 threshold = broadcast(state_.thresholds[n]);
      const uint32_t mask =
          not_less_equal(add(lanes.pre, lanes.error), threshold) & valid_lanes(s_, f);
      if (mask && !add_candidates(row, lanes, mask, f)) return;
    }
  }

  bool add_candidates(int64_t row, const Interval& lanes, uint32_t mask, int64_t f) {
    const int64_t n = first_ + row;
    Candidates c = candidates_of(state_, n);
    const bool fits = append(c, limits_[row], lanes, mask, f, s_.k, state_.capacity);
    state_.counts[n] = static_cast<int32_t>(c.count);
    state_.thresholds[n] = c.threshold;
    if (!fits) state_.redo[n] = kOverflowed;
    return fits;
  }

  const PanelScreen& s_;
  const SelectionState& state_;
  int64_t first_, count_, n_first_;
  Scratch<float> scores_;
  Scratch<int64_t> limits_;
};

// Every latent that may lie above its own threshold.
template <ScreenKind kKind, bool kBias>
class AboveThreshold {
 public:
  AboveThreshold(const PanelScreen& screen, const Survivors& survivors, int64_t first, int64_t)
      : s_(screen), survivors_(survivors), first_(first) {}

  bool left_out(int64_t row) const { return survivors_.counts[first_ + row] < 0; }

  void visit(int64_t row, int64_t panel, const int32_t* sums) {
    const int64_t n = first_ + row;
    const RowBounds of_row = bounds_of(s_, n);
    int32_t* kept = survivors_.indices + n * (survivors_.capacity + kLanes);
    int32_t& count = survivors_.counts[n];
    const int64_t begin = panel * kPanel, end = std::min(begin + kPanel, s_.d_sae);
    for (int64_t f = begin; f < end; f += kLanes) {
      const Interval lanes =
          interval_at<kBias>(s_, of_row, score<kKind>(s_, n, f, sums + (f - begin)), f);
      const uint32_t mask =
          not_less_equal(add(lanes.pre, lanes.error), load(survivors_.threshold + f)) &
          valid_lanes(s_, f);
      if (!mask) continue;
      if (count + __builtin_popcount(mask) > survivors_.capacity) {
        count = -1;
        return;
      }
      store_packed_numbers(kept + count, static_cast<int32_t>(f), mask);
      count += __builtin_popcount(mask);
    }
  }

  void after(int64_t, bool) {}

 private:
  const PanelScreen& s_;
  const Survivors& survivors_;
  int64_t first_;
};

// All panels for a block of rows, on one thread.
template <typename Rule>
void run_block(const PanelScreen& s, const PanelProducts& products, Rule& rule, int64_t first,
               int64_t count) {
  alignas(64) int32_t sums[kMostTileRows * kPanel];
  const int64_t panels = (s.d_sae + kPanel - 1) / kPanel;
  products.begin();
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t r = 0; r < count; r += products.rows) {
      products.multiply(s.x + (first + r) * s.bytes, s.w + p * kPanel * s.bytes, s.bytes, sums);
      const int64_t rows = std::min(products.rows, count - r);
      for (int64_t i = 0; i < rows; ++i)
        if (!rule.left_out(r + i)) rule.visit(r + i, p, sums + i * kPanel);
    }
    rule.after(p, p + 1 == panels);
  }
  products.end();
}

// Blocks of equal size, as many for each thread, of whole tiles.
int64_t rows_of_block(int64_t n_rows, int64_t tile_rows) {
  const int64_t threads = max_threads(), share = (n_rows + threads - 1) / threads;
  const int64_t blocks = std::max<int64_t>(1, (share + kMostRows - 1) / kMostRows);
  const int64_t rows = std::max<int64_t>(1, (share + blocks - 1) / blocks);
  return (rows + tile_rows - 1) / tile_rows * tile_rows;
}

template <template <ScreenKind, bool> class Rule, ScreenKind kKind, typename State>
void run_kind(const PanelScreen& s, const PanelProducts& products, const State& state) {
  const int64_t rows = rows_of_block(s.n_rows, products.rows);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t first = 0; first < s.n_rows; first += rows) {
    const int64_t count = std::min(rows, s.n_rows - first);
    if (s.b_enc) {
      Rule<kKind, true> rule(s, state, first, count);
      run_block(s, products, rule, first, count);
    } else {
      Rule<kKind, false> rule(s, state, first, count);
      run_block(s, products, rule, first, count);
    }
  }
}

template <template <ScreenKind, bool> class Rule, typename State>
void run(const PanelScreen& s, const PanelProducts& products, const State& state) {
  if (s.kind == ScreenKind::bfloat16)
    run_kind<Rule, ScreenKind::bfloat16>(s, products, state);
  else if (s.kind == ScreenKind::int8)
    run_kind<Rule, ScreenKind::int8>(s, products, state);
  else
    run_kind<Rule, ScreenKind::int16>(s, products, state);
}

}  // namespace

void panel_screen(const PanelScreen& screen, const PanelProducts& products, SelectionState state) {
  run<TopK>(screen, products, state);
}

void panel_survivors(const PanelScreen& screen, const PanelProducts& products,
                     Survivors survivors) {
  run<AboveThreshold>(screen, products, survivors);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
