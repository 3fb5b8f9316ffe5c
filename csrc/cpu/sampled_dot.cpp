// sampled_dot: out_nj = c_n <g_n, W_dec[i_nj]>, the defined dot product of dot.h, c_n = 1 by
// default.
//
// Access: token-major, like decode. g_n is widened to float32 once a row and stays in the
// first-level cache; each named row of W_dec is read once, four at a time, the next four
// prefetched.
#include "dot.h"
#include "fastsae/scratch.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <typename T>
void sampled_dot_as(Matrix g, Codes codes, Matrix w_dec, int64_t d, const float* row_scale,
                    T* out) {
  constexpr int64_t kBlock = 64;
#pragma omp parallel
  {
    Scratch<float> row(d);
    float dots[kBlock];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < codes.n_tokens; ++n) {
      load_row(static_cast<const T*>(g.data) + n * g.stride, nullptr, d, row.get());
      const float scale = row_scale ? row_scale[n] : 1.0f;
      const int64_t end = codes.begin(n + 1);
      for (int64_t at = codes.begin(n); at < end; at += kBlock) {
        const int64_t count = end - at < kBlock ? end - at : kBlock;
        gathered_dots(
            row.get(), static_cast<const T*>(w_dec.data), w_dec.stride, d, count,
            [&](int64_t j) { return codes.indices[at + j]; }, dots);
        for (int64_t j = 0; j < count; ++j) assign(out[at + j], scale * dots[j]);
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
