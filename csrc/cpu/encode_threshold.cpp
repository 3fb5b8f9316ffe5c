// encode_threshold: every latent whose pre-activation is above its own threshold,
//   pre[n, f] = <x_n - b_dec, w_f> + b_enc[f] > threshold[f]   (or NaN),
// with the same screen and the same defined dot product as encode.cpp.
//
// A latent whose interval does not reach above its threshold is out; what remains of a chunk is
// recomputed at once, while the chunk's weights are in the second-level cache, and compared
// exactly. Where few remain, each is a gathered dot product; where many do, all products of 32 rows
// with the chunk are made together (dot_block.h), and without scores they always are. A row has
// room for the whole chunk, so nothing overflows however many latents fire.
//
// Access: a chunk of scores is read once, row by row; the survivors of a row gather rows of a chunk
// of W_enc. Rows differ in their numbers of survivors, hence the dynamic schedule.
#include <limits>

#include "dot_block.h"
#include "fastsae/scratch.h"
#include "interval.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <bool kBias, typename Score>
int64_t screen_row(const Score* scores, int64_t f_count, const float* bias, const float* threshold,
                   const RowBounds& row, const ScreenBounds& bounds, int32_t* kept) {
  const float* alpha = bounds.latent_norm;
  const float* beta = bounds.latent_residual;
  int64_t count = 0;
  const auto visit = [&](const Interval& lanes, F16 least, uint32_t valid, int64_t f) {
    const uint32_t mask = not_less_equal(add(lanes.pre, lanes.error), least) & valid;
    store_packed_numbers(kept + count, static_cast<int32_t>(f), mask);
    count += __builtin_popcount(mask);
  };
  int64_t f = 0;
  for (; f + kLanes <= f_count; f += kLanes)
    visit(interval<kBias>(row, scores + f, bias + f, alpha + f, beta + f), load(threshold + f),
          0xffffu, f);
  if (f == f_count) return count;
  const int64_t rest = f_count - f;
  Score last_scores[kLanes] = {};
  float last_bias[kLanes] = {}, last_alpha[kLanes] = {}, last_beta[kLanes] = {};
  for (int64_t l = 0; l < rest; ++l) {
    last_scores[l] = scores[f + l];
    if (kBias) last_bias[l] = bias[f + l];
    last_alpha[l] = alpha[f + l];
    last_beta[l] = beta[f + l];
  }
  visit(interval<kBias>(row, last_scores, last_bias, last_alpha, last_beta),
        load_partial(threshold + f, rest), (1u << rest) - 1u, f);
  return count;
}

// Rows whose survivors are looked at together, and the share of them from which on all products
// take less time than those that survived: measured between 0.12 and 0.24.
constexpr int64_t kRows = 32;
constexpr double kDenseShare = 0.18;

// What one thread works in.
struct Workplace {
  Workplace(int64_t d, int64_t f_count)
      // Sixteen places more: lanes are packed to the front and stored whole.
      : row_capacity(f_count + kLanes),
        survivors(kRows * row_capacity),
        counts(kRows),
        x(kRows * d),
        dots(kRows * f_count),
        tile(kTileLatents * d),
        kept(row_capacity),
        kept_latents(row_capacity) {}

  int64_t row_capacity;
  Scratch<int32_t> survivors;
  Scratch<int64_t> counts;
  Scratch<float> x, dots, tile, kept;
  Scratch<int32_t> kept_latents;
};

template <typename T>
void load_x(const ThresholdChunk& c, int64_t n, float* x) {
  load_row(static_cast<const T*>(c.x.data) + n * c.x.stride, c.b_dec, c.d, x);
}

template <typename T>
void gathered_rows(const ThresholdChunk& c, int64_t begin, int64_t end, Workplace& work) {
  for (int64_t n = begin; n < end; ++n) {
    const int32_t* survivors = work.survivors.get() + (n - begin) * work.row_capacity;
    const int64_t count = work.counts[n - begin];
    float* dots = work.dots.get();
    if (count) {
      load_x<T>(c, n, work.x.get());
      gathered_dots(
          work.x.get(), static_cast<const T*>(c.w_enc.data), c.w_enc.stride, c.d, count,
          [&](int64_t j) { return survivors[j]; }, dots);
    }
    float* values = c.values + n * c.f_count;
    int32_t* indices = c.indices + n * c.f_count;
    int64_t kept = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int32_t f = survivors[j];
      const float pre = c.b_enc ? dots[j] + c.b_enc[f] : dots[j];
      if (pre <= c.threshold[f]) continue;
      values[kept] = pre;
      indices[kept++] = f + static_cast<int32_t>(c.f_begin);
    }
    c.counts[n] = static_cast<int32_t>(kept);
  }
}

template <typename T>
void dense_rows(const ThresholdChunk& c, int64_t begin, int64_t end, Workplace& work) {
  for (int64_t n = begin; n < end; ++n) load_x<T>(c, n, work.x.get() + (n - begin) * c.d);
  dot_block(work.x.get(), end - begin, static_cast<const T*>(c.w_enc.data), c.w_enc.stride,
            c.f_count, c.d, work.tile.get(), work.dots.get());
  for (int64_t n = begin; n < end; ++n) {
    const float* dots = work.dots.get() + (n - begin) * c.f_count;
    int64_t kept = 0;
    for (int64_t f = 0; f < c.f_count; f += kLanes) {
      const int64_t rest = c.f_count - f;
      const bool whole = rest >= kLanes;
      const auto lanes = [&](const float* p) { return whole ? load(p) : load_partial(p, rest); };
      const F16 pre = c.b_enc ? add(lanes(dots + f), lanes(c.b_enc + f)) : lanes(dots + f);
      const uint32_t valid = whole ? 0xffffu : (1u << rest) - 1u;
      const uint32_t mask = not_less_equal(pre, lanes(c.threshold + f)) & valid;
      store_packed(work.kept.get() + kept, pre, mask);
      store_packed_numbers(work.kept_latents.get() + kept, static_cast<int32_t>(c.f_begin + f),
                           mask);
      kept += __builtin_popcount(mask);
    }
    std::memcpy(c.values + n * c.f_count, work.kept.get(),
                static_cast<size_t>(kept) * sizeof(float));
    std::memcpy(c.indices + n * c.f_count, work.kept_latents.get(),
                static_cast<size_t>(kept) * sizeof(int32_t));
    c.counts[n] = static_cast<int32_t>(kept);
  }
}

// The survivors of each row, and how many there are in all.
template <typename Score>
int64_t screen_rows(const Score* scores, const ThresholdChunk& c, int64_t begin, int64_t end,
                    Workplace& work) {
  int64_t total = 0;
  for (int64_t n = begin; n < end; ++n) {
    int32_t* survivors = work.survivors.get() + (n - begin) * work.row_capacity;
    int64_t count = c.f_count;
    if (c.not_finite[n]) {
      for (int64_t f = 0; f < count; ++f) survivors[f] = static_cast<int32_t>(f);
    } else {
      const RowBounds row = bounds_of_row(c.bounds, n);
      const Score* row_scores = scores + n * c.f_count;
      count = c.b_enc ? screen_row<true>(row_scores, c.f_count, c.b_enc, c.threshold, row, c.bounds,
                                         survivors)
                      : screen_row<false>(row_scores, c.f_count, nullptr, c.threshold, row,
                                          c.bounds, survivors);
    }
    work.counts[n - begin] = count;
    total += count;
  }
  return total;
}

template <typename T, typename Score>
void threshold_chunk_as(const Score* scores, int64_t n_rows, const ThresholdChunk& c) {
#pragma omp parallel
  {
    Workplace work(c.d, c.f_count);
#pragma omp for schedule(dynamic, 1)
    for (int64_t begin = 0; begin < n_rows; begin += kRows) {
      const int64_t end = n_rows - begin < kRows ? n_rows : begin + kRows;
      const double all = static_cast<double>((end - begin) * c.f_count);
      if (!scores || screen_rows(scores, c, begin, end, work) >= kDenseShare * all)
        dense_rows<T>(c, begin, end, work);
      else
        gathered_rows<T>(c, begin, end, work);
    }
  }
}

}  // namespace

void threshold_chunk(Matrix scores, int64_t n_rows, const ThresholdChunk& chunk) {
  const auto run = [&](auto* typed) {
    if (chunk.x.dtype == DType::float32)
      threshold_chunk_as<float>(typed, n_rows, chunk);
    else
      threshold_chunk_as<bfloat16>(typed, n_rows, chunk);
  };
  if (scores.dtype == DType::float32)
    run(static_cast<const float*>(scores.data));
  else
    run(static_cast<const bfloat16*>(scores.data));
}

void survivors_finish(Matrix x, const float* b_dec, Matrix w_enc, const float* b_enc,
                      int64_t n_rows, int64_t d, Survivors survivors, float* values) {
  const auto finish = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const T* w = static_cast<const T*>(w_enc.data);
    const int64_t stride = survivors.capacity + kLanes;
#pragma omp parallel
    {
      Scratch<float> row(d), dots(survivors.capacity);
#pragma omp for schedule(dynamic, 4)
      for (int64_t n = 0; n < n_rows; ++n) {
        int32_t* indices = survivors.indices + n * stride;
        const int64_t count = survivors.counts[n];
        if (count <= 0) continue;
        load_row(static_cast<const T*>(x.data) + n * x.stride, b_dec, d, row.get());
        gathered_dots(
            row.get(), w, w_enc.stride, d, count, [&](int64_t j) { return indices[j]; },
            dots.get());
        int64_t kept = 0;
        for (int64_t j = 0; j < count; ++j) {
          const int32_t f = indices[j];
          const float pre = b_enc ? dots[j] + b_enc[f] : dots[j];
          if (pre <= survivors.threshold[f]) continue;
          values[n * stride + kept] = pre;
          indices[kept++] = f;
        }
        survivors.counts[n] = static_cast<int32_t>(kept);
      }
    }
  };
  if (x.dtype == DType::float32)
    finish(static_cast<float*>(nullptr));
  else
    finish(static_cast<bfloat16*>(nullptr));
}

void move_rows(const float* values, const int32_t* indices, const int64_t* from,
               const int32_t* counts, int64_t n_rows, const int64_t* to, void* out, DType dtype,
               int32_t* out_indices) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < n_rows; ++n) {
    for (int64_t j = 0; j < counts[n]; ++j) {
      const float value = values[from[n] + j];
      if (dtype == DType::float32)
        static_cast<float*>(out)[to[n] + j] = value;
      else
        assign(static_cast<bfloat16*>(out)[to[n] + j], value);
      out_indices[to[n] + j] = indices[from[n] + j];
    }
  }
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
