// sampled_dot: out_nj = c_n <g_n, W_dec[i_nj]>, the defined dot product of dot.h, c_n = 1 by
// default.
//
// Access: token-major, like decode. g_n is widened to float32 once a row and stays in the
// first-level cache; each named row of W_dec is read once, four at a time, the next four
// prefetched. Threads share the entries, wherever a token begins.
#include <algorithm>

#include "dot.h"
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
void sampled_dot_as(Matrix g, Codes codes, Matrix w_dec, int64_t d, const float* row_scale,
                    T* out) {
  constexpr int64_t kBlock = 64;
  const int64_t nnz = codes.begin(codes.n_tokens);
  const int64_t pieces = std::min<int64_t>(nnz, 16 * max_threads());
#pragma omp parallel
  {
    Scratch<float> row(d);
    float dots[kBlock];
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const auto cut = [&](int64_t i) { return nnz / pieces * i + nnz % pieces * i / pieces; };
      const int64_t end = cut(piece + 1);
      int64_t at = cut(piece);
      for (int64_t n = token_of(codes, at); at < end; ++n) {
        load_row(static_cast<const T*>(g.data) + n * g.stride, nullptr, d, row.get());
        const float scale = row_scale ? row_scale[n] : 1.0f;
        const int64_t row_end = std::min(codes.begin(n + 1), end);
        for (; at < row_end; at += std::min(kBlock, row_end - at)) {
          const int64_t count = std::min(kBlock, row_end - at);
          gathered_dots(
              row.get(), static_cast<const T*>(w_dec.data), w_dec.stride, d, count,
              [&](int64_t j) { return codes.indices[at + j]; }, dots);
          for (int64_t j = 0; j < count; ++j) assign(out[at + j], scale * dots[j]);
        }
      }
    }
  }
}

}  // namespace

void sampled_dot(Matrix g, Codes codes, Matrix w_dec, int64_t d, const float* row_scale,
                 void* out) {
  if (w_dec.dtype == DType::float32)
    sampled_dot_as(g, codes, w_dec, d, row_scale, static_cast<float*>(out));
  else
    sampled_dot_as(g, codes, w_dec, d, row_scale, static_cast<bfloat16*>(out));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
