// accumulate_rows: out[f] = sum over entries e of latent f of c_t v_e (g_t - shift), t = tokens[e],
//                  value_sums[f] = sum over the same entries of c_t v_e.
//
// Access: latent-major over the CSC, so each row of `out` is written once, by one thread, with no
// atomics; rows of g are gathered with prefetch (accumulate.h). Threads share the latents by their
// entries (balance.h), since counts differ by orders of magnitude and frequent latents may stand
// side by side.
#include "accumulate.h"
#include "balance.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Writing a latent's row, in gathered rows.
constexpr int64_t kLatentCost = 2;

template <typename T>
void accumulate_rows_as(const T* values, LatentMajor codes, Matrix g, int64_t d, const float* shift,
                        const float* row_scale, MutableMatrix out, T* value_sums) {
  const auto sum = [&](int64_t f, int64_t first, int64_t columns, float* total, float* partial) {
    const float value_sum =
        accumulate_latent<T>(values, codes, f, g, first, columns, shift, row_scale, total, partial);
    if (value_sums && first == 0) assign(value_sums[f], value_sum);
  };
  const auto finish = [&](int64_t f, const float* total) {
    write_row(total, d, static_cast<T*>(out.data) + f * out.stride);
  };
  const auto begin = [&](int64_t f) { return codes.offsets[f]; };
  for_each_row(codes.d_sae, begin, kLatentCost, d, sum, finish);
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
