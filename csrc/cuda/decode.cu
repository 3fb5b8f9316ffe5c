// decode:        y_n = sum_j v_nj W_dec[i_nj] + b_dec
// squared_error: r_n = y_n - target_n, and |r_n|^2, without y ever being written.
//
// Access: token-major, a block a token; each thread owns 16 bytes of the row (two or more such
// pieces where a row has more than 256) and keeps their sum in registers. Values and indices are
// staged in shared memory 64 at a time and the named rows of W_dec gathered eight at a time
// (gather.cuh). A row of W_dec is read once for each entry and a row of y written once: the floor
// is nnz rows at the rate of random row reads. b_dec is added last: a chain that starts from it
// rounds at its magnitude in every step. No GPU has run this yet.
#include "gather.cuh"
#include "kernels.h"

namespace fastsae {
namespace cuda {
namespace {

template <typename T>
struct Decode {
  const T* values;
  Codes codes;
  int64_t nnz;
  const T* w_dec;
  int64_t w_stride;
  int64_t d_sae;
  int64_t d;
  const float* b_dec;
};

// y_n at the columns of one thread. Every thread of the block must call it, for it waits for all.
template <int kVector, typename T>
__device__ inline void decode_columns(const Decode<T>& of, int64_t n, int64_t column, bool inside,
                                      float (&sum)[kVector]) {
  __shared__ Staged staged;
  const int64_t begin = max(of.codes.begin(n), static_cast<int64_t>(0));
  const int64_t end = min(of.codes.begin(n + 1), of.nnz);
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum[i] = 0.0f;
  const float shift[kVector] = {};
  for (int64_t at = begin; at < end; at += kStaged) {
    const int count = static_cast<int>(min(end - at, static_cast<int64_t>(kStaged)));
    __syncthreads();
    for (int j = threadIdx.x; j < count; j += blockDim.x) {
      const int32_t latent = of.codes.indices[at + j];
      stage_one(staged, j, latent >= 0 && latent < of.d_sae, to_float(of.values[at + j]), latent);
    }
    __syncthreads();
    if (inside) add_rows(staged, count, of.w_dec, of.w_stride, column, shift, sum);
  }
  if (!inside) return;
  float bias[kVector];
  load_floats(of.b_dec, column, bias);
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum[i] += bias[i];
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    decode_kernel(Decode<T> of, T* __restrict__ out, int64_t out_stride) {
  const int64_t n = blockIdx.x;
  for (int64_t base = 0; base < of.d; base += blockDim.x * kVector) {
    const int64_t column = base + threadIdx.x * kVector;
    float sum[kVector];
    decode_columns(of, n, column, column < of.d, sum);
    if (column < of.d) store(out + n * out_stride + column, sum);
  }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks)
    squared_error_kernel(Decode<T> of, const T* __restrict__ target, int64_t target_stride,
                         T* __restrict__ residual, int64_t residual_stride,
                         float* __restrict__ squared_error) {
  const int64_t n = blockIdx.x;
  float squares[1] = {0.0f};
  for (int64_t base = 0; base < of.d; base += blockDim.x * kVector) {
    const int64_t column = base + threadIdx.x * kVector;
    float sum[kVector];
    decode_columns(of, n, column, column < of.d, sum);
    if (column >= of.d) continue;
    float wanted[kVector];
    load(target + n * target_stride + column, wanted);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum[i] -= wanted[i];
      squares[0] = fmaf(sum[i], sum[i], squares[0]);
    }
    store(residual + n * residual_stride + column, sum);
  }
  block_sum(squares);
  if (threadIdx.x == 0) squared_error[n] = squares[0];
}

template <typename T>
Decode<T> operands(const void* values, Codes codes, int64_t nnz, Matrix w_dec, int64_t d_sae,
                   int64_t d, const float* b_dec) {
  // Without a latent there is no row 0 to stand in for a wrong index.
  return {static_cast<const T*>(values),
          codes,
          d_sae == 0 ? 0 : nnz,
          static_cast<const T*>(w_dec.data),
          w_dec.stride,
          d_sae,
          d,
          b_dec};
}

}  // namespace

void decode(Where where, const void* values, Codes codes, int64_t nnz, Matrix w_dec, int64_t d_sae,
            int64_t d, const float* b_dec, MutableMatrix out) {
  const Call call =
      call_of("decode", where, {"n_tokens", codes.n_tokens}, {"nnz", nnz}, {"d_sae", d_sae},
              {"d", d}, {"dtype", static_cast<int64_t>(w_dec.dtype)});
  with_type(w_dec.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Decode<T> of = operands<T>(values, codes, nnz, w_dec, d_sae, d, b_dec);
    T* to = static_cast<T*>(out.data);
    const bool wide = is_wide(w_dec, d) && is_wide(out, d);
    launch(call, wide ? decode_kernel<T, kWide<T>> : decode_kernel<T, 1>, codes.n_tokens,
           threads_for(d, wide ? kWide<T> : 1), 0, of, to, out.stride);
  });
}

void squared_error(Where where, const void* values, Codes codes, int64_t nnz, Matrix w_dec,
                   int64_t d_sae, int64_t d, const float* b_dec, Matrix target,
                   MutableMatrix residual, float* squared_error) {
  const Call call =
      call_of("squared_error", where, {"n_tokens", codes.n_tokens}, {"nnz", nnz}, {"d_sae", d_sae},
              {"d", d}, {"dtype", static_cast<int64_t>(w_dec.dtype)});
  with_type(w_dec.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Decode<T> of = operands<T>(values, codes, nnz, w_dec, d_sae, d, b_dec);
    const T* wanted = static_cast<const T*>(target.data);
    T* to = static_cast<T*>(residual.data);
    const bool wide = is_wide(w_dec, d) && is_wide(target, d) && is_wide(residual, d);
    launch(call, wide ? squared_error_kernel<T, kWide<T>> : squared_error_kernel<T, 1>,
           codes.n_tokens, threads_for(d, wide ? kWide<T> : 1), 0, of, wanted, target.stride, to,
           residual.stride, squared_error);
  });
}

}  // namespace cuda
}  // namespace fastsae
