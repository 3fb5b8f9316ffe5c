// The CUDA kernels as Python sees them: addresses of device memory as integers, sizes, dtypes as 0
// (float32), 1 (bfloat16) and 2 (float16), the device's number and its stream's handle.
// fastsae/backends/cuda.py is the only caller and checks every tensor before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "../cuda/kernels.h"

#ifndef FASTSAE_CUDA_ARCHS
#define FASTSAE_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

using fastsae::DType;
using fastsae::cuda::PieceSums;
using fastsae::cuda::Where;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Where where(int device, Address stream) { return {device, at<void>(stream)}; }
fastsae::Matrix matrix(Address data, int64_t stride, int dtype) {
  return {at<const void>(data), stride, static_cast<DType>(dtype)};
}
fastsae::MutableMatrix mutable_matrix(Address data, int64_t stride, int dtype) {
  return {at<void>(data), stride, static_cast<DType>(dtype)};
}
fastsae::Codes codes(Address indices, Address offsets, int64_t n_tokens, int64_t k) {
  return {at<const int32_t>(indices), at<const int64_t>(offsets), n_tokens, k};
}
fastsae::LatentMajor latent_major(Address offsets, Address tokens, Address entries, int64_t d_sae) {
  return {at<const int64_t>(offsets), at<const int32_t>(tokens), at<const int64_t>(entries), d_sae};
}
PieceSums piece_sums(std::array<Address, 2> rows_and_values) {
  return {at<float>(rows_and_values[0]), at<double>(rows_and_values[1])};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastsae; called through fastsae.ops.";
  using release_gil = py::call_guard<py::gil_scoped_release>;
  namespace kernels = fastsae::cuda;

  m.def("architectures", [] { return std::string(FASTSAE_CUDA_ARCHS); });
  m.def("entries_of_a_piece", &kernels::entries_of_a_piece);
  m.def(
      "decode",
      [](int device, Address stream, Address values, Address indices, Address offsets, int64_t n,
         int64_t k, int64_t nnz, Address w_dec, int64_t w_stride, int dtype, int64_t d_sae,
         int64_t d, Address b_dec, Address out, int64_t out_stride) {
        kernels::decode(where(device, stream), at<const void>(values),
                        codes(indices, offsets, n, k), nnz, matrix(w_dec, w_stride, dtype), d_sae,
                        d, at<const float>(b_dec), mutable_matrix(out, out_stride, dtype));
      },
      release_gil());
  m.def(
      "squared_error",
      [](int device, Address stream, Address values, Address indices, Address offsets, int64_t n,
         int64_t k, int64_t nnz, Address w_dec, int64_t w_stride, int dtype, int64_t d_sae,
         int64_t d, Address b_dec, Address target, int64_t target_stride, Address residual,
         int64_t residual_stride, Address squared_error) {
        kernels::squared_error(
            where(device, stream), at<const void>(values), codes(indices, offsets, n, k), nnz,
            matrix(w_dec, w_stride, dtype), d_sae, d, at<const float>(b_dec),
            matrix(target, target_stride, dtype), mutable_matrix(residual, residual_stride, dtype),
            at<float>(squared_error));
      },
      release_gil());
  m.def(
      "sampled_dot",
      [](int device, Address stream, Address g, int64_t g_stride, Address indices, Address offsets,
         int64_t n, int64_t k, int64_t nnz, Address w_dec, int64_t w_stride, int dtype,
         int64_t d_sae, int64_t d, Address row_scale, Address out) {
        kernels::sampled_dot(where(device, stream), matrix(g, g_stride, dtype),
                             codes(indices, offsets, n, k), nnz, matrix(w_dec, w_stride, dtype),
                             d_sae, d, at<const float>(row_scale), at<void>(out));
      },
      release_gil());
  m.def("transpose_bytes", [](int device, Address stream, int64_t nnz, int64_t d_sae) {
    return kernels::transpose_bytes(where(device, stream), nnz, d_sae);
  });
  m.def(
      "transpose",
      [](int device, Address stream, Address indices, Address offsets, int64_t n, int64_t k,
         int64_t nnz, int64_t d_sae, Address latent_offsets, Address tokens, Address entries,
         Address scratch, size_t scratch_bytes) {
        kernels::transpose(where(device, stream), codes(indices, offsets, n, k), nnz, d_sae,
                           at<int64_t>(latent_offsets), at<int32_t>(tokens), at<int64_t>(entries),
                           at<void>(scratch), scratch_bytes);
      },
      release_gil());
  m.def(
      "accumulate_rows",
      [](int device, Address stream, Address values, Address latent_offsets, Address tokens,
         Address entries, int64_t nnz, int64_t d_sae, Address g, int64_t g_stride, int dtype,
         int64_t n_tokens, int64_t d, Address shift, Address row_scale, Address out,
         int64_t out_stride, Address value_sums, std::array<Address, 2> pieces) {
        kernels::accumulate_rows(where(device, stream), at<const void>(values),
                                 latent_major(latent_offsets, tokens, entries, d_sae), nnz,
                                 matrix(g, g_stride, dtype), n_tokens, d, at<const float>(shift),
                                 at<const float>(row_scale), mutable_matrix(out, out_stride, dtype),
                                 at<void>(value_sums), piece_sums(pieces));
      },
      release_gil());
  m.def(
      "fused_update",
      [](int device, Address stream, Address values, Address grad_values, Address latent_offsets,
         Address tokens, Address entries, int64_t nnz, int64_t d_sae, int64_t n_tokens, Address g,
         int64_t g_stride, Address row_scale, Address x, int64_t x_stride, Address b_dec,
         int64_t d_in, int64_t d_out, int dtype, std::array<Address, 3> w_enc,
         std::array<int64_t, 3> w_enc_strides, std::array<Address, 3> b_enc,
         std::array<int64_t, 3> b_enc_strides, std::array<Address, 3> w_dec,
         std::array<int64_t, 3> w_dec_strides, double lr, double beta1, double beta2, double eps,
         double weight_decay, int64_t step, bool unit_norm, std::array<Address, 2> decoder_pieces,
         std::array<Address, 2> encoder_pieces) {
        const double correction1 = 1 - std::pow(beta1, static_cast<double>(step));
        const double correction2 = 1 - std::pow(beta2, static_cast<double>(step));
        fastsae::FusedUpdate update = {};
        update.values = at<const void>(values);
        update.grad_values = at<const void>(grad_values);
        update.codes = latent_major(latent_offsets, tokens, entries, d_sae);
        update.g = matrix(g, g_stride, dtype);
        update.row_scale = at<const float>(row_scale);
        update.x = matrix(x, x_stride, dtype);
        update.b_dec = at<const float>(b_dec);
        update.d_in = d_in;
        update.d_out = d_out;
        update.w_enc = mutable_matrix(w_enc[0], w_enc_strides[0], dtype);
        update.w_enc_first = mutable_matrix(w_enc[1], w_enc_strides[1], dtype);
        update.w_enc_second = mutable_matrix(w_enc[2], w_enc_strides[2], dtype);
        update.b_enc = mutable_matrix(b_enc[0], b_enc_strides[0], dtype);
        update.b_enc_first = mutable_matrix(b_enc[1], b_enc_strides[1], dtype);
        update.b_enc_second = mutable_matrix(b_enc[2], b_enc_strides[2], dtype);
        update.w_dec = mutable_matrix(w_dec[0], w_dec_strides[0], dtype);
        update.w_dec_first = mutable_matrix(w_dec[1], w_dec_strides[1], dtype);
        update.w_dec_second = mutable_matrix(w_dec[2], w_dec_strides[2], dtype);
        update.adam = {static_cast<float>(1 - beta1),
                       static_cast<float>(beta2),
                       static_cast<float>(1 - beta2),
                       static_cast<float>(lr / correction1),
                       static_cast<float>(1 / std::sqrt(correction2)),
                       static_cast<float>(eps),
                       static_cast<float>(weight_decay)};
        update.unit_norm = unit_norm;
        kernels::fused_update(where(device, stream), update, nnz, n_tokens,
                              piece_sums(decoder_pieces), piece_sums(encoder_pieces));
      },
      release_gil());
}
