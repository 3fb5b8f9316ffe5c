// accumulate_rows: out[f] = sum over entries e of latent f of c_t v_e (g_t - shift), t = tokens[e],
//                  value_sums[f] = sum over the same entries of c_t v_e.
//
// Access: latent-major over the CSC, so each row of `out` is written once, by one thread, with no
// atomics; rows of g are gathered with prefetch (accumulate.h). Threads share the latents by their
// entries (balance.h), since counts differ by orders of magnitude and frequent latents may stand
// side by side. Where `dense` says that latents name a good part of the rows each, blocks of up to
// 128 latents share the reading (tiled_rows.h), with the same bits.
#include <type_traits>

#include "accumulate.h"
#include "balance.h"
#include "isa_kernels.h"
#include "tiled_rows.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Writing a latent's row, in gathered rows.
constexpr int64_t kLatentCost = 2;

// Latents of a block in tiles, and entries beyond which it takes no further latent: their weights
// are kept in order, 1 MiB.
constexpr int64_t kBlockLatents = 128;
constexpr int64_t kBlockEntries = int64_t{1} << 18;
constexpr int64_t kTiledSpansPerThread = 4;

template <typename T>
struct Accumulator {
  const T* values;
  const LatentMajor& codes;
  Matrix g;
  int64_t n_tokens, d;
  const float* shift;
  const float* row_scale;
  MutableMatrix out;
  T* value_sums;

  void finish(int64_t f, const float* total) const {
    write_row(total, d, static_cast<T*>(out.data) + f * out.stride);
  }

  float sum(int64_t f, int64_t first, int64_t columns, float* total, float* partial) const {
    return accumulate_latent<T>(values, codes, f, g, first, columns, shift, row_scale, total,
                                partial);
  }

  // The latents [first, end).
  void tiled(int64_t first, int64_t end) const {
    Scratch<float> totals(kBlockLatents * d), sums(kBlockLatents * d);
    for (int64_t f = first; f < end;) {
      int64_t count = 1;
      while (f + count < end && count < kBlockLatents &&
             codes.offsets[f + count + 1] - codes.offsets[f] <= kBlockEntries)
        ++count;
      std::memset(totals.get(), 0, static_cast<size_t>(count * d) * sizeof(float));
      std::memset(sums.get(), 0, static_cast<size_t>(count * d) * sizeof(float));
      if (shift)
        block<true>(f, count, sums.get(), totals.get());
      else
        block<false>(f, count, sums.get(), totals.get());
      for (int64_t s = 0; s < count; ++s) finish(f + s, totals.get() + s * d);
      f += count;
    }
  }

  template <bool kShifted>
  void block(int64_t f, int64_t count, float* sums, float* totals) const {
    const int64_t base = codes.offsets[f];
    Scratch<float> weights(codes.offsets[f + count] - base);
    for (int64_t s = 0; s < count; ++s) {
      double value_sum = 0.0;
      for (int64_t e = codes.offsets[f + s]; e < codes.offsets[f + s + 1]; ++e) {
        float weight = to_float(values[codes.entries[e]]);
        if (row_scale) weight *= row_scale[codes.tokens[e]];
        weights[e - base] = weight;
        value_sum += weight;
      }
      if (value_sums) assign(value_sums[f + s], static_cast<float>(value_sum));
    }
    const auto sums_of = block_of(
        count, [&](int64_t s) { return codes.offsets[f + s]; }, codes.tokens,
        [&](int64_t e) { return weights[e - base]; });
    const int64_t done = add_weighted_rows_tiled<kShifted>(
        static_cast<const T*>(g.data), n_tokens, g.stride, d, shift, sums_of, sums, totals);
    if (done == d) return;
    for (int64_t s = 0; s < count; ++s)
      sum(f + s, done, d - done, totals + s * d + done, sums + s * d + done);
  }
};

template <typename T>
void accumulate_rows_as(const Accumulator<T>& a, bool dense) {
  const auto sum = [&](int64_t f, int64_t first, int64_t columns, float* total, float* partial) {
    const float value_sum = a.sum(f, first, columns, total, partial);
    if (a.value_sums && first == 0) assign(a.value_sums[f], value_sum);
  };
  const auto finish = [&](int64_t f, const float* total) { a.finish(f, total); };
  const auto begin = [&](int64_t f) { return a.codes.offsets[f]; };
  const int64_t d_sae = a.codes.d_sae;
  if (!dense) return for_each_row(d_sae, begin, kLatentCost, a.d, sum, finish);
  const auto many = [&](int64_t first, int64_t end, float*, float*) { a.tiled(first, end); };
  for_each_span(d_sae, begin, kLatentCost, a.d, kTiledSpansPerThread, many, sum, finish);
}

}  // namespace

void accumulate_rows(const void* values, LatentMajor codes, Matrix g, int64_t n_tokens, int64_t d,
                     const float* shift, const float* row_scale, bool dense, MutableMatrix out,
                     void* value_sums) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const Accumulator<T> accumulator = {
        static_cast<const T*>(values), codes, g, n_tokens, d, shift, row_scale, out, typed};
    accumulate_rows_as(accumulator, dense);
  };
  if (g.dtype == DType::float32)
    run(static_cast<float*>(value_sums));
  else
    run(static_cast<bfloat16*>(value_sums));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
