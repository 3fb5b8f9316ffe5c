// sampled_dot: out_nj = c_n <g_n, W_dec[i_nj]>, c_n = 1 by default.
//
// Access: token-major, a block a token, a warp for four entries at a time. A lane takes 16 bytes of
// g_n and of the four named rows of W_dec at a time, so four gathered rows are in flight a warp and
// 32 a block; g_n is read once for four rows and comes from the first-level cache after the first
// time. Eight warps: with 32 or 64 entries a token each warp has work once or twice. A lane's
// products are one chain of fused multiply-adds, the lanes are summed by a fixed tree. No GPU has
// run this yet.
#include "kernels.h"
#include "rows.cuh"

namespace fastsae {
namespace cuda {
namespace {

constexpr int kRows = 4;

template <typename T>
struct SampledDot {
  const T* g;
  int64_t g_stride;
  Codes codes;
  int64_t nnz;
  const T* w_dec;
  int64_t w_stride;
  int64_t d_sae;
  int64_t d;
  const float* row_scale;
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    sampled_dot_kernel(SampledDot<T> of, T* __restrict__ out) {
  const int64_t n = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = max(of.codes.begin(n), static_cast<int64_t>(0));
  const int64_t end = min(of.codes.begin(n + 1), of.nnz);
  const float scale = of.row_scale ? of.row_scale[n] : 1.0f;
  const T* g = of.g + n * of.g_stride;
  for (int64_t at = begin + warp * kRows; at < end; at += blockDim.x / kWarp * kRows) {
    // Places behind the last entry repeat it, a wrong index reads row 0: neither result is used.
    const T* row[kRows];
    bool sound[kRows];
    float dots[kRows];
#pragma unroll
    for (int l = 0; l < kRows; ++l) {
      const int32_t latent = of.codes.indices[min(at + l, end - 1)];
      sound[l] = latent >= 0 && latent < of.d_sae;
      row[l] = of.w_dec + (sound[l] ? latent : 0) * of.w_stride;
      dots[l] = 0.0f;
    }
    for (int64_t column = lane * kVector; column < of.d; column += kWarp * kVector) {
      Packet<kVector, T> packets[kRows];
#pragma unroll
      for (int l = 0; l < kRows; ++l) packets[l] = read<kVector>(row[l] + column);
      float of_g[kVector];
      load(g + column, of_g);
#pragma unroll
      for (int l = 0; l < kRows; ++l) {
        float of_row[kVector];
        widen<kVector, T>(packets[l], of_row);
#pragma unroll
        for (int i = 0; i < kVector; ++i) dots[l] = fmaf(of_g[i], of_row[i], dots[l]);
      }
    }
#pragma unroll
    for (int l = 0; l < kRows; ++l) {
      for (int other = kWarp / 2; other > 0; other /= 2)
        dots[l] += __shfl_xor_sync(kWholeWarp, dots[l], other);
      if (lane == l && at + l < end)
        assign(out[at + l], sound[l] ? scale * dots[l] : __int_as_float(0x7fffffff));
    }
  }
}

}  // namespace

void sampled_dot(Where where, Matrix g, Codes codes, int64_t nnz, Matrix w_dec, int64_t d_sae,
                 int64_t d, const float* row_scale, void* out) {
  const Call call = call_of("sampled_dot", where, {"n_tokens", codes.n_tokens}, {"nnz", nnz},
                            {"d_sae", d_sae}, {"d", d}, {"dtype", static_cast<int64_t>(g.dtype)});
  with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    const SampledDot<T> of = {static_cast<const T*>(g.data),
                              g.stride,
                              codes,
                              d_sae == 0 ? 0 : nnz,
                              static_cast<const T*>(w_dec.data),
                              w_dec.stride,
                              d_sae,
                              d,
                              row_scale};
    const bool wide = is_wide(g, d) && is_wide(w_dec, d);
    launch(call, wide ? sampled_dot_kernel<T, kWide<T>> : sampled_dot_kernel<T, 1>, codes.n_tokens,
           kMostThreads, 0, of, static_cast<T*>(out));
  });
}

}  // namespace cuda
}  // namespace fastsae
