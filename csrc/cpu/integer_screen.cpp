// integer_screen: the screen of encode_topk by products of int8, in one pass without scores in
// memory.
//
//   s = (sum_d (q[n, d] + 128) p[f, d] - 128 sum_d p[f, d]) x_scale[n] w_scale[f]
// is exact up to the roundings of its last three operations: sums of int32 cannot overflow while
// 255 * 127 * d < 2^31. What is known of s against the pre-activation is the bound of
// docs/maths.md, "Integer products"; from there on it is the method of encode.cpp.
//
// Access. A thread takes a block of up to 192 rows, so that its quantized rows (144 KB at d = 768),
// a panel of 64 latents (48 KB) and the scores of the first chunk stay in the second-level cache,
// and walks through all panels; W_enc as int8 is read once a block. A tile is 6 rows by 64 latents:
// 24 registers of sums, four of W_enc and one of x for 24 multiply-adds of 64 products. Its sums
// pass through the first-level cache to the comparison with each row's threshold, 4 % of the
// instructions at d = 768. The first 512 latents have no threshold yet: their scores are kept until
// they give one (select_row.h).
#include <algorithm>

#include "fastsae/scratch.h"
#include "fastsae/threading.h"
#include "isa_kernels.h"
#include "select_row.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t kTileRows = 6;
constexpr int64_t kMostRows = 192;
constexpr int64_t kFirstPanels = 8;
// Three roundings on the way from the exact sum to the score: at most 3.1 2^-24, and room to spare.
constexpr float kScoreRounding = 0x1p-21f;

#if defined(__AVX512VNNI__)
inline void tile(const uint8_t* const* x, const int8_t* w, int64_t bytes, int32_t* sums) {
  __m512i acc[kTileRows][4];
  for (auto& row : acc)
    for (__m512i& lanes : row) lanes = _mm512_setzero_si512();
  for (int64_t i = 0; i < bytes; i += 4, w += 4 * kPanel) {
    __m512i panel[4];
    for (int v = 0; v < 4; ++v) panel[v] = _mm512_loadu_si512(w + 64 * v);
    for (int64_t r = 0; r < kTileRows; ++r) {
      int32_t four;
      std::memcpy(&four, x[r] + i, 4);
      const __m512i lanes = _mm512_set1_epi32(four);
      for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], lanes, panel[v]);
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int v = 0; v < 4; ++v) _mm512_storeu_si512(sums + r * kPanel + 16 * v, acc[r][v]);
}
#else
inline void tile(const uint8_t* const* x, const int8_t* w, int64_t bytes, int32_t* sums) {
  std::memset(sums, 0, static_cast<size_t>(kTileRows * kPanel) * sizeof(int32_t));
  for (int64_t i = 0; i < bytes; i += 4, w += 4 * kPanel)
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t f = 0; f < kPanel; ++f) {
        int32_t sum = 0;
        for (int64_t j = 0; j < 4; ++j) sum += int32_t{x[r][i + j]} * w[4 * f + j];
        sums[r * kPanel + f] += sum;
      }
}
#endif

// Sixteen of `sums` less their offsets, as float32.
inline F16 centred(const int32_t* sums, const int32_t* offset) {
#if defined(__AVX512F__)
  return {
      _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_loadu_si512(offset)))};
#else
  float lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<float>(sums[l] - offset[l]);
  return load(lanes);
#endif
}

// A block of rows on one thread.
class Block {
 public:
  Block(const IntegerScreen& screen, const SelectionState& state, int64_t first, int64_t count)
      : s_(screen),
        state_(state),
        first_(first),
        count_(count),
        n_first_(std::min<int64_t>(kFirstPanels * kPanel, screen.d_sae)),
        scores_(count * n_first_),
        limits_(count) {}

  void run() {
    const int64_t panels = (s_.d_sae + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels; ++p) {
      if (p == kFirstPanels) select_first();
      for (int64_t r = 0; r < count_; r += kTileRows) {
        const int64_t rows = std::min(kTileRows, count_ - r);
        const uint8_t* x[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i)
          x[i] = s_.x + (first_ + r + std::min(i, rows - 1)) * s_.bytes;
        int32_t sums[kTileRows * kPanel];
        tile(x, s_.w + p * kPanel * s_.bytes, s_.bytes, sums);
        for (int64_t i = 0; i < rows; ++i) {
          if (state_.redo[first_ + r + i]) continue;
          if (p < kFirstPanels)
            keep(r + i, p, sums + i * kPanel);
          else if (s_.b_enc)
            filter<true>(r + i, p, sums + i * kPanel);
          else
            filter<false>(r + i, p, sums + i * kPanel);
        }
      }
    }
    if (panels <= kFirstPanels) select_first();
  }

 private:
  RowBounds bounds(int64_t n) const {
    const float a = s_.x_residual[n], b = s_.x_norm[n];
    const bool exact = a == 0.0f && b == 0.0f;
    return {broadcast(a), broadcast(b), broadcast(exact ? 0.0f : kScoreRounding),
            broadcast(exact ? 0.0f : kBiasRounding), broadcast(exact ? 0.0f : s_.x_absolute[n])};
  }

  F16 score(int64_t n, int64_t f, const int32_t* sums) const {
    return mul(centred(sums, s_.w_offset + f), mul(load(s_.w_scale + f), broadcast(s_.x_scale[n])));
  }

  void keep(int64_t row, int64_t p, const int32_t* sums) {
    const int64_t f = p * kPanel;
    float lanes[kPanel];
    for (int64_t l = 0; l < kPanel; l += kLanes)
      store(lanes + l, score(first_ + row, f + l, sums + l));
    std::memcpy(scores_.get() + row * n_first_ + f, lanes,
                static_cast<size_t>(std::min(kPanel, n_first_ - f)) * sizeof(float));
  }

  void select_first() {
    const LatentsOfChunk chunk = {0, n_first_, s_.b_enc, s_.scale, s_.w_norm, s_.w_residual};
    for (int64_t row = 0; row < count_; ++row) {
      const int64_t n = first_ + row;
      if (state_.redo[n]) continue;
      const float* scores = scores_.get() + row * n_first_;
      if (s_.b_enc)
        select_row<true>(scores, bounds(n), chunk, n, s_.k, state_);
      else
        select_row<false>(scores, bounds(n), chunk, n, s_.k, state_);
      limits_[row] = limit(state_.counts[n]);
    }
  }

  int64_t limit(int64_t count) const {
    return std::min(state_.capacity, 2 * std::max(count, s_.k) + 64);
  }

  template <bool kBias>
  void filter(int64_t row, int64_t p, const int32_t* sums) {
    const int64_t n = first_ + row;
    const RowBounds of_row = bounds(n);
    const F16 threshold = broadcast(state_.thresholds[n]);
    for (int64_t l = 0; l < kPanel; l += kLanes) {
      const int64_t f = p * kPanel + l;
      if (f >= s_.d_sae) return;
      const F16 bias = kBias ? load(s_.b_enc + f) : zero();
      Interval lanes = interval_of<kBias>(of_row, score(n, f, sums + l), bias, load(s_.w_norm + f),
                                          load(s_.w_residual + f));
      if (s_.scale) lanes = scaled(lanes, of_row, load(s_.scale + f));
      const uint32_t valid = s_.d_sae - f < kLanes ? (1u << (s_.d_sae - f)) - 1u : 0xffffu;
      uint32_t mask = not_less_equal(add(lanes.pre, lanes.error), threshold) & valid;
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

  const IntegerScreen& s_;
  const SelectionState& state_;
  int64_t first_, count_, n_first_;
  Scratch<float> scores_;
  Scratch<int64_t> limits_;
};

}  // namespace

void integer_screen(const IntegerScreen& screen, SelectionState state) {
  // Blocks of equal size, as many for each thread.
  const int64_t threads = max_threads(), share = (screen.n_rows + threads - 1) / threads;
  const int64_t a_thread = (share + kMostRows - 1) / kMostRows;
  const int64_t rows =
      std::max<int64_t>(1, (share + a_thread - 1) / std::max<int64_t>(1, a_thread));
  const int64_t in_tiles = (rows + kTileRows - 1) / kTileRows * kTileRows;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t first = 0; first < screen.n_rows; first += in_tiles)
    Block(screen, state, first, std::min(in_tiles, screen.n_rows - first)).run();
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
