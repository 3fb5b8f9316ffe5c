// sampled_dot: out_nj = c_n <g_n, W_dec[i_nj]>, the defined dot product of dot.h, c_n = 1 by
// default.
//
// Access: token-major, like decode. g_n is widened to float32 once a row and stays in the
// first-level cache; each named row of W_dec is read once, four at a time, the next four
// prefetched. Threads share the entries, wherever a token begins. Where `dense` says that tokens
// name a good part of the rows each, all products of 32 tokens with the rows are made (dot_block.h)
// and those wanted are picked, with the same bits.
#include <algorithm>
#include <type_traits>

#include "dot_block.h"
#include "fastsae/scratch.h"
#include "fastsae/threading.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// The token that owns entry e.
int64_t token_of(const Codes& codes, int64_t e) {
  if (!codes.offsets) return e / codes.k;
  return std::upper_bound(codes.offsets, codes.offsets + codes.n_tokens + 1, e) - codes.offsets - 1;
}

template <typename T>
struct SampledDot {
  Matrix g;
  const Codes& codes;
  const T* w;
  int64_t stride, d_sae, d;
  const float* row_scale;
  T* out;

  void load_g(int64_t n, float* row) const {
    load_row(static_cast<const T*>(g.data) + n * g.stride, nullptr, d, row);
  }
  float scale_of(int64_t n) const { return row_scale ? row_scale[n] : 1.0f; }

  // The entries [begin, end) one by one; `row` [d] is working memory.
  void gathered(int64_t begin, int64_t end, float* row) const {
    constexpr int64_t kBlock = 64;
    float dots[kBlock];
    int64_t at = begin;
    for (int64_t n = at < end ? token_of(codes, at) : 0; at < end; ++n) {
      load_g(n, row);
      const int64_t row_end = std::min(codes.begin(n + 1), end);
      while (at < row_end) {
        const int64_t count = std::min(kBlock, row_end - at);
        gathered_dots(
            row, w, stride, d, count, [&](int64_t j) { return codes.indices[at + j]; }, dots);
        for (int64_t j = 0; j < count; ++j) assign(out[at + j], scale_of(n) * dots[j]);
        at += count;
      }
    }
  }

  // The entries of the latents [first, first + count) of token n, from entry e on, whose products
  // are in `dots`. An entry out of order is computed by itself. Returns the entry to go on with.
  int64_t picked(int64_t n, int64_t e, int64_t first, int64_t count, const float* row,
                 const float* dots) const {
    const int64_t end = codes.begin(n + 1);
    for (; e < end && codes.indices[e] < first + count; ++e) {
      const int64_t place = codes.indices[e] - first;
      const float product = place >= 0 ? dots[place] : dot(row, w + (place + first) * stride, d);
      assign(out[e], scale_of(n) * product);
    }
    return e;
  }
};

template <typename T>
void by_entries(const SampledDot<T>& op) {
  const int64_t first = op.codes.begin(0), nnz = op.codes.begin(op.codes.n_tokens) - first;
  const int64_t pieces = std::min<int64_t>(nnz, 16 * max_threads());
#pragma omp parallel
  {
    Scratch<float> row(op.d);
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const auto cut = [&](int64_t i) {
        return first + nnz / pieces * i + nnz % pieces * i / pieces;
      };
      op.gathered(cut(piece), cut(piece + 1), row.get());
    }
  }
}

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kBlockLatents = 128;
// All products of a block take as long as this part of them one by one.
constexpr int64_t kMostLatentsPerEntry = 4;

template <typename T>
void by_blocks(const SampledDot<T>& op) {
  const Codes& codes = op.codes;
#pragma omp parallel
  {
    Scratch<float> rows(kBlockTokens * op.d), tile(kTileLatents * op.d);
    Scratch<float> dots(kBlockTokens * kBlockLatents);
    int64_t next[kBlockTokens];
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < codes.n_tokens; n += kBlockTokens) {
      const int64_t count = std::min(kBlockTokens, codes.n_tokens - n);
      const int64_t begin = codes.begin(n), end = codes.begin(n + count);
      if ((end - begin) * kMostLatentsPerEntry < count * op.d_sae) {
        op.gathered(begin, end, rows.get());
        continue;
      }
      for (int64_t s = 0; s < count; ++s) {
        op.load_g(n + s, rows.get() + s * op.d);
        next[s] = codes.begin(n + s);
      }
      for (int64_t f = 0; f < op.d_sae; f += kBlockLatents) {
        const int64_t latents = std::min(kBlockLatents, op.d_sae - f);
        dot_block(rows.get(), count, op.w + f * op.stride, op.stride, latents, op.d, tile.get(),
                  dots.get());
        for (int64_t s = 0; s < count; ++s)
          next[s] = op.picked(n + s, next[s], f, latents, rows.get() + s * op.d,
                              dots.get() + s * latents);
      }
    }
  }
}

}  // namespace

void sampled_dot(Matrix g, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
                 const float* row_scale, bool dense, void* out) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const SampledDot<T> op = {
        g, codes, static_cast<const T*>(w_dec.data), w_dec.stride, d_sae, d, row_scale, typed};
    return dense ? by_blocks(op) : by_entries(op);
  };
  if (w_dec.dtype == DType::float32)
    run(static_cast<float*>(out));
  else
    run(static_cast<bfloat16*>(out));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
