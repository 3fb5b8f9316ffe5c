// accumulate_rows: out[f] = sum over entries e of latent f of c_t v_e (g_t - shift), t = tokens[e],
//                  value_sums[f] = sum over the same entries of c_t v_e.
//
// Access: latent-major over the CSC, so each row of `out` is written once, by one thread, with no
// atomics; rows of g are gathered with prefetch (accumulate.h). Latents are handed out 64 at a time
// since their counts differ by orders of magnitude.
#include "accumulate.h"
#include "fastsae/scratch.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <typename T>
void accumulate_rows_as(const T* values, LatentMajor codes, Matrix g, int64_t d, const float* shift,
                        const float* row_scale, MutableMatrix out, T* value_sums) {
#pragma omp parallel
  {
    Scratch<float> total(d), partial(d);
#pragma omp for schedule(dynamic, 64)
    for (int64_t f = 0; f < codes.d_sae; ++f) {
      T* to = static_cast<T*>(out.data) + f * out.stride;
      float value_sum = 0.0f;
      if (codes.offsets[f] == codes.offsets[f + 1]) {
        std::memset(to, 0, static_cast<size_t>(d) * sizeof(T));
      } else {
        value_sum =
            accumulate_latent(values, codes, f, g, d, shift, row_scale, total.get(), partial.get());
        write_row(total.get(), d, to);
      }
      if (value_sums) assign(value_sums[f], value_sum);
    }
  }
}

}  // namespace

void accumulate_rows(const void* values, LatentMajor codes, Matrix g, int64_t d, const float* shift,
                     const float* row_scale, MutableMatrix out, void* value_sums) {
  if (g.dtype == DType::float32)
    accumulate_rows_as(static_cast<const float*>(values), codes, g, d, shift, row_scale, out,
                       static_cast<float*>(value_sums));
  else
    accumulate_rows_as(static_cast<const bfloat16*>(values), codes, g, d, shift, row_scale, out,
                       static_cast<bfloat16*>(value_sums));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
