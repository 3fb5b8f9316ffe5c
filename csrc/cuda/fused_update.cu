// fused_update: for every latent f, both weights' gradients and their Adam step in one pass,
//   G_dec = sum_e c_t v_e g_t             G_enc = sum_e u_e (x_t - b_dec)       G_b = sum_e u_e
//   G_dec -= (<G_dec, w> / <w, w>) w      where the decoder keeps unit norm
//   m <- m + (1 - beta1)(G - m),  s <- beta2 s + (1 - beta2) G^2,  p <- p - a m / (sqrt(s) / b +
//   eps) W_dec[f] <- W_dec[f] / |W_dec[f]|
// with v the codes' values, u the gradient of them, a = lr / (1 - beta1^t), b = sqrt(1 - beta2^t),
// as torch.optim.Adam computes it, each operation as csrc/cpu/fused_update.cpp has it.
//
// Access: latent-major, a block a latent. A gradient never leaves the block: that of W_enc stays in
// registers from its sum to its use, that of W_dec too unless the decoder keeps unit norm, which
// needs two sums over the whole row first; it then waits in shared memory (4 bytes a column), where
// the new row waits for its norm. Each parameter and moment is read and written once in device
// memory, the floor for the rows that no token names, the great majority; W_dec[f] is read again
// for the projection, a few microseconds after the first time and so from a cache. Moments stream
// past the second-level cache so that rows of g and x, which 32 to 64 latents each gather, stay in
// it. What a latent has beyond 512 entries is summed by blocks of a kernel before (segments.cuh).
// No GPU has run this yet.
#include "kernels.h"
#include "segments.cuh"

namespace fastsae {
namespace cuda {
namespace {

template <typename T>
struct Parameter {
  T *value, *first, *second;
  int64_t stride, first_stride, second_stride;
};

template <typename T>
struct Update {
  Terms<T> decoder, encoder;
  Parameter<T> w_enc, b_enc, w_dec;
  Adam adam;
};

__device__ inline void adam(const Adam& a, float g, float& p, float& m, float& s) {
  g = fmaf(a.weight_decay, p, g);
  m = fmaf(a.one_minus_beta1, g - m, m);
  s = fmaf(a.one_minus_beta2 * g, g, a.beta2 * s);
  p = p - a.step_size * (m / fmaf(sqrtf(s), a.inverse_correction, a.eps));
}

// Adam at the columns of one thread: writes the moments and leaves the new parameters in `p`.
template <int kVector, typename T>
__device__ inline void adam_columns(const Adam& a, const Parameter<T>& of, int64_t f,
                                    int64_t column, const float (&gradient)[kVector],
                                    float (&p)[kVector]) {
  float m[kVector], s[kVector];
  T* first = of.first + f * of.first_stride + column;
  T* second = of.second + f * of.second_stride + column;
  load_streaming(first, m);
  load_streaming(second, s);
#pragma unroll
  for (int i = 0; i < kVector; ++i) adam(a, gradient[i], p[i], m[i], s[i]);
  store_streaming(first, m);
  store_streaming(second, s);
}

// One weight whose norm is free; returns this thread's share of the sum of its values.
template <int kVector, typename T>
__device__ inline double update_free(const Terms<T>& terms, const Parameter<T>& of, const Adam& a,
                                     int64_t f) {
  double sum = 0.0;
  for (int64_t base = 0; base < terms.d || base == 0; base += blockDim.x * kVector) {
    const int64_t column = base + threadIdx.x * kVector;
    float gradient[kVector];
    double values = 0.0;
    sum_latent(terms, f, column, column < terms.d, gradient, values);
    if (base == 0) sum = values;
    if (column >= terms.d) continue;
    T* weights = of.value + f * of.stride + column;
    float p[kVector];
    load_streaming(weights, p);
    adam_columns(a, of, f, column, gradient, p);
    store_streaming(weights, p);
  }
  return sum;
}

// W_dec[f] where it keeps unit norm. `row` [d] is shared memory; a thread reads there only what it
// has written.
template <int kVector, typename T>
__device__ inline void update_unit_norm(const Terms<T>& terms, const Parameter<T>& of,
                                        const Adam& a, int64_t f, float* row) {
  T* weights = of.value + f * of.stride;
  float dots[2] = {0.0f, 0.0f};
  for (int64_t base = 0; base < terms.d; base += blockDim.x * kVector) {
    const int64_t column = base + threadIdx.x * kVector;
    float gradient[kVector];
    double values = 0.0;
    sum_latent(terms, f, column, column < terms.d, gradient, values);
    if (column >= terms.d) continue;
    float w[kVector];
    load(weights + column, w);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dots[0] = fmaf(w[i], w[i], dots[0]);
      dots[1] = fmaf(w[i], gradient[i], dots[1]);
      row[column + i] = gradient[i];
    }
  }
  block_sum(dots);
  const float along = dots[0] != 0.0f ? -dots[1] / dots[0] : 0.0f;
  float squares[1] = {0.0f};
  for (int64_t column = threadIdx.x * kVector; column < terms.d; column += blockDim.x * kVector) {
    float p[kVector], gradient[kVector];
    load(weights + column, p);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // A row of zeros keeps its gradient even where that is not finite.
      gradient[i] = dots[0] != 0.0f ? fmaf(along, p[i], row[column + i]) : row[column + i];
    }
    adam_columns(a, of, f, column, gradient, p);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      squares[0] = fmaf(p[i], p[i], squares[0]);
      row[column + i] = p[i];
    }
  }
  block_sum(squares);
  const float norm = sqrtf(squares[0]);
  const float scale = 1.0f / (norm < 1e-12f ? 1e-12f : norm);
  for (int64_t column = threadIdx.x * kVector; column < terms.d; column += blockDim.x * kVector) {
    float p[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) p[i] = row[column + i] * scale;
    store_streaming(weights + column, p);
  }
}

template <typename T, int kVector, bool kUnitNorm>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks) fused_update_kernel(Update<T> u) {
  const int64_t f = blockIdx.x;
  if (kUnitNorm)
    update_unit_norm<kVector>(u.decoder, u.w_dec, u.adam, f, dynamic_shared<float>());
  else
    update_free<kVector>(u.decoder, u.w_dec, u.adam, f);
  double sum[1] = {update_free<kVector>(u.encoder, u.w_enc, u.adam, f)};
  block_sum(sum);
  if (threadIdx.x > 0) return;
  float p[1];
  load(u.b_enc.value + f * u.b_enc.stride, p);
  adam_columns(u.adam, u.b_enc, f, 0, {static_cast<float>(sum[0])}, p);
  store(u.b_enc.value + f * u.b_enc.stride, p);
}

template <typename T>
Parameter<T> parameter(const MutableMatrix& value, const MutableMatrix& first,
                       const MutableMatrix& second) {
  return {static_cast<T*>(value.data),
          static_cast<T*>(first.data),
          static_cast<T*>(second.data),
          value.stride,
          first.stride,
          second.stride};
}

template <int kVector, typename T>
void launch_update(const Call& call, const FusedUpdate& update, const Update<T>& u) {
  const int64_t widest = update.d_in > update.d_out ? update.d_in : update.d_out;
  const int threads = threads_for(widest, kVector);
  if (update.unit_norm)
    launch(call, fused_update_kernel<T, kVector, true>, update.codes.d_sae, threads,
           static_cast<size_t>(update.d_out) * sizeof(float), u);
  else
    launch(call, fused_update_kernel<T, kVector, false>, update.codes.d_sae, threads, 0, u);
}

}  // namespace

void fused_update(Where where, const FusedUpdate& update, int64_t nnz, int64_t n_tokens,
                  PieceSums decoder, PieceSums encoder) {
  const DType dtype = update.w_dec.dtype;
  const Call call = call_of("fused_update", where, {"nnz", nnz}, {"d_sae", update.codes.d_sae},
                            {"d_in", update.d_in}, {"d_out", update.d_out},
                            {"dtype", static_cast<int64_t>(dtype)});
  bool wide = is_wide(update.g, update.d_out) && is_wide(update.x, update.d_in);
  for (const MutableMatrix* m : {&update.w_dec, &update.w_dec_first, &update.w_dec_second})
    wide = wide && is_wide(*m, update.d_out);
  for (const MutableMatrix* m : {&update.w_enc, &update.w_enc_first, &update.w_enc_second})
    wide = wide && is_wide(*m, update.d_in);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Update<T> u = {terms<T>(update.values, update.codes, nnz, update.g, n_tokens,
                                  update.d_out, nullptr, update.row_scale, decoder),
                         terms<T>(update.grad_values, update.codes, nnz, update.x, n_tokens,
                                  update.d_in, update.b_dec, nullptr, encoder),
                         parameter<T>(update.w_enc, update.w_enc_first, update.w_enc_second),
                         parameter<T>(update.b_enc, update.b_enc_first, update.b_enc_second),
                         parameter<T>(update.w_dec, update.w_dec_first, update.w_dec_second),
                         update.adam};
    sum_pieces(call, u.decoder, wide);
    sum_pieces(call, u.encoder, wide);
    if (wide)
      launch_update<kWide<T>>(call, update, u);
    else
      launch_update<1>(call, update, u);
  });
}

}  // namespace cuda
}  // namespace fastsae
