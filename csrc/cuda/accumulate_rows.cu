// accumulate_rows: out[f] = sum over entries e of latent f of c_t v_e (g_t - shift), t = tokens[e],
//                  value_sums[f] = sum over the same entries of c_t v_e.
//
// Access: latent-major over the CSC, a block a latent, so each row of `out` is written once and
// needs no atomics; rows of g are gathered eight at a time, and what a latent has beyond 512
// entries is summed by blocks of a kernel before (segments.cuh). `out` is written past the caches
// as far as it can be: nothing reads it again before they have turned over. No GPU has run this
// yet.
#include "kernels.h"
#include "segments.cuh"

namespace fastsae {
namespace cuda {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    accumulate_rows_kernel(Terms<T> of, T* __restrict__ out, int64_t out_stride,
                           T* __restrict__ value_sums) {
  const int64_t f = blockIdx.x;
  // Once, whatever the width: without a column there is a sum of values all the same.
  for (int64_t base = 0; base < of.d || base == 0; base += blockDim.x * kVector) {
    const int64_t column = base + threadIdx.x * kVector;
    float total[kVector];
    double values[1] = {0.0};
    sum_latent(of, f, column, column < of.d, total, values[0]);
    if (column < of.d) store_streaming(out + f * out_stride + column, total);
    if (base > 0) continue;
    block_sum(values);
    if (threadIdx.x == 0) assign(value_sums[f], static_cast<float>(values[0]));
  }
}

}  // namespace

void accumulate_rows(Where where, const void* values, LatentMajor codes, int64_t nnz, Matrix g,
                     int64_t n_tokens, int64_t d, const float* shift, const float* row_scale,
                     MutableMatrix out, void* value_sums, PieceSums pieces) {
  const Call call =
      call_of("accumulate_rows", where, {"n_tokens", n_tokens}, {"nnz", nnz},
              {"d_sae", codes.d_sae}, {"d", d}, {"dtype", static_cast<int64_t>(g.dtype)});
  with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Terms<T> of = terms<T>(values, codes, nnz, g, n_tokens, d, shift, row_scale, pieces);
    T* to = static_cast<T*>(out.data);
    T* sums = static_cast<T*>(value_sums);
    const bool wide = is_wide(g, d) && is_wide(out, d);
    sum_pieces(call, of, wide);
    launch(call, wide ? accumulate_rows_kernel<T, kWide<T>> : accumulate_rows_kernel<T, 1>,
           codes.d_sae, threads_for(d, wide ? kWide<T> : 1), 0, of, to, out.stride, sums);
  });
}

}  // namespace cuda
}  // namespace fastsae
