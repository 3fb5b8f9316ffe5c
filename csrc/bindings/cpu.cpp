// The CPU kernels as Python sees them: addresses as integers, sizes, dtypes as 0 (float32) and
// 1 (bfloat16). fastsae/backends/cpu.py is the only caller and checks every tensor before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <tuple>

#include "../cpu/kernels.h"
#include "fastsae/threading.h"

namespace py = pybind11;

namespace {

using fastsae::DType;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

fastsae::Matrix matrix(Address data, int64_t stride, int dtype) {
  return {at<const void>(data), stride, static_cast<DType>(dtype)};
}
fastsae::MutableMatrix mutable_matrix(Address data, int64_t stride, int dtype) {
  return {at<void>(data), stride, static_cast<DType>(dtype)};
}
fastsae::Codes codes(Address indices, Address offsets, int64_t n_tokens, int64_t k) {
  return {at<const int32_t>(indices), at<const int64_t>(offsets), n_tokens, k};
}
fastsae::SelectionState state(Address lower, Address upper, Address indices, Address counts,
                              Address thresholds, Address redo, int64_t capacity) {
  return {at<float>(lower),
          at<float>(upper),
          at<int32_t>(indices),
          at<int32_t>(counts),
          at<float>(thresholds),
          at<uint8_t>(redo),
          capacity};
}

// kind, x and its four vectors, W_enc and its four, the three of panels, score_rounding, n, bytes,
// d_sae, b_enc.
using PanelArguments =
    std::tuple<int, std::array<Address, 5>, std::array<Address, 5>, std::array<Address, 3>, float,
               int64_t, int64_t, int64_t, Address>;
fastsae::PanelScreen panel_screen(const PanelArguments& arguments) {
  const auto& [kind, x, w, most, score_rounding, n, bytes, d_sae, b_enc] = arguments;
  return {static_cast<fastsae::ScreenKind>(kind),
          at<const uint8_t>(x[0]),
          at<const float>(x[1]),
          at<const float>(x[2]),
          at<const float>(x[3]),
          at<const float>(x[4]),
          at<const uint8_t>(w[0]),
          at<const float>(w[1]),
          at<const int32_t>(w[2]),
          at<const float>(w[3]),
          at<const float>(w[4]),
          at<const float>(most[0]),
          at<const float>(most[1]),
          at<const float>(most[2]),
          score_rounding,
          n,
          bytes,
          d_sae,
          at<const float>(b_enc),
          nullptr,
          0};
}

struct Memory {
  explicit Memory(py::ssize_t size)
      : data(fastsae::take_memory(static_cast<size_t>(size))), bytes(size) {}
  ~Memory() { fastsae::give_memory(data, static_cast<size_t>(bytes)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data;
  py::ssize_t bytes;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fastsae; called through fastsae.ops.";
  using release_gil = py::call_guard<py::gil_scoped_release>;

  m.def("isa", [] { return std::string(fastsae::kernels().isa); });
  m.def("select_isa", [](const std::string& isa) { return fastsae::select_isa(isa.c_str()); });
  m.def("isas", [] {
    py::list list;
    for (int i = 0; const auto* status = fastsae::isa_status(i); ++i)
      list.append(py::make_tuple(status->name, status->built, status->runs_here));
    return list;
  });
  m.def("max_threads", [] { return fastsae::max_threads(); });

  py::class_<Memory>(m, "Memory", py::buffer_protocol(), "Bytes that go back when it is deleted.")
      .def(py::init<py::ssize_t>(), py::arg("bytes"))
      .def_buffer([](Memory& memory) {
        return py::buffer_info(static_cast<uint8_t*>(memory.data), memory.bytes);
      });
  m.def(
      "pack_rows",
      [](Address rows, int64_t stride, int dtype, Address shift, int64_t n, int64_t d,
         Address packed, int packed_dtype, Address norm, Address residual_norm,
         Address not_finite) {
        fastsae::kernels().pack_rows(matrix(rows, stride, dtype), at<const float>(shift), n, d,
                                     at<void>(packed), static_cast<DType>(packed_dtype),
                                     at<float>(norm), at<float>(residual_norm),
                                     at<uint8_t>(not_finite));
      },
      release_gil());
  m.def(
      "select_chunk",
      [](Address scores, int64_t stride, int dtype, int64_t n, int64_t f_begin, int64_t f_count,
         Address b_enc, Address scale, Address row_residual, Address row_norm, Address latent_norm,
         Address latent_residual, float score_rounding, float absolute, int64_t k, Address lower,
         Address upper, Address indices, Address counts, Address thresholds, Address redo,
         int64_t capacity) {
        const fastsae::ScreenBounds bounds = {at<const float>(row_residual),
                                              at<const float>(row_norm),
                                              at<const float>(latent_norm),
                                              at<const float>(latent_residual),
                                              score_rounding,
                                              absolute};
        fastsae::kernels().select_chunk(
            matrix(scores, stride, dtype), n, f_begin, f_count, at<const float>(b_enc),
            at<const float>(scale), bounds, k,
            state(lower, upper, indices, counts, thresholds, redo, capacity));
      },
      release_gil());
  m.def(
      "select_finish",
      [](Address x, int64_t x_stride, int dtype, Address b_dec, Address w_enc, int64_t w_stride,
         Address b_enc, Address scale, int64_t n, int64_t d, int64_t d_sae, int64_t k,
         bool relu_first, Address lower, Address upper, Address candidates, Address counts,
         Address thresholds, Address redo, int64_t capacity, Address values, Address indices) {
        fastsae::kernels().select_finish(
            matrix(x, x_stride, dtype), at<const float>(b_dec), matrix(w_enc, w_stride, dtype),
            at<const float>(b_enc), at<const float>(scale), n, d, d_sae, k, relu_first,
            state(lower, upper, candidates, counts, thresholds, redo, capacity), at<void>(values),
            at<int32_t>(indices));
      },
      release_gil());
  m.def(
      "pack_panels",
      [](Address rows, int64_t stride, int dtype, Address shift, Address powers, int64_t n,
         int64_t d, int kind, bool by_panels, Address packed, int64_t bytes, Address scale,
         Address norm, Address residual, Address true_norm, Address offset, Address not_finite,
         Address fingerprints) {
        fastsae::kernels().pack_panels(
            matrix(rows, stride, dtype), at<const float>(shift), at<const float>(powers), n, d,
            static_cast<fastsae::ScreenKind>(kind), by_panels,
            {at<void>(packed), bytes, at<float>(scale), at<float>(norm), at<float>(residual),
             at<float>(true_norm), at<int32_t>(offset), at<uint8_t>(not_finite),
             at<uint64_t>(fingerprints)});
      },
      release_gil());
  m.def(
      "panel_screen",
      [](const PanelArguments& screen, int64_t k, Address scale, Address lower, Address upper,
         Address indices, Address counts, Address thresholds, Address redo, int64_t capacity) {
        fastsae::PanelScreen s = panel_screen(screen);
        s.k = k;
        s.scale = at<const float>(scale);
        const auto& kernels = fastsae::kernels();
        kernels.panel_screen(s, kernels.panel_products[static_cast<int>(s.kind)],
                             state(lower, upper, indices, counts, thresholds, redo, capacity));
      },
      release_gil());
  m.def(
      "panel_survivors",
      [](const PanelArguments& screen, Address threshold, Address indices, int64_t capacity,
         Address counts) {
        const fastsae::PanelScreen s = panel_screen(screen);
        const auto& kernels = fastsae::kernels();
        kernels.panel_survivors(
            s, kernels.panel_products[static_cast<int>(s.kind)],
            {at<const float>(threshold), at<int32_t>(indices), capacity, at<int32_t>(counts)});
      },
      release_gil());
  m.def(
      "survivors_finish",
      [](Address x, int64_t x_stride, int dtype, Address b_dec, Address w_enc, int64_t w_stride,
         Address b_enc, int64_t n, int64_t d, Address threshold, Address indices, int64_t capacity,
         Address counts, Address values) {
        fastsae::kernels().survivors_finish(
            matrix(x, x_stride, dtype), at<const float>(b_dec), matrix(w_enc, w_stride, dtype),
            at<const float>(b_enc), n, d,
            {at<const float>(threshold), at<int32_t>(indices), capacity, at<int32_t>(counts)},
            at<float>(values));
      },
      release_gil());
  m.def(
      "threshold_chunk",
      [](Address scores, int scores_dtype, int64_t n, int64_t f_begin, int64_t f_count,
         Address row_residual, Address row_norm, Address latent_norm, Address latent_residual,
         float score_rounding, float absolute, Address threshold, Address x, int64_t x_stride,
         int dtype, Address b_dec, Address w_enc, int64_t w_stride, Address b_enc, int64_t d,
         Address not_finite, Address values, Address indices, Address counts) {
        const fastsae::ScreenBounds bounds = {at<const float>(row_residual),
                                              at<const float>(row_norm),
                                              at<const float>(latent_norm),
                                              at<const float>(latent_residual),
                                              score_rounding,
                                              absolute};
        fastsae::kernels().threshold_chunk(
            matrix(scores, f_count, scores_dtype), n,
            {f_begin, f_count, bounds, at<const float>(threshold), matrix(x, x_stride, dtype),
             at<const float>(b_dec), matrix(w_enc, w_stride, dtype), at<const float>(b_enc), d,
             at<const uint8_t>(not_finite), at<float>(values), at<int32_t>(indices),
             at<int32_t>(counts)});
      },
      release_gil());
  m.def(
      "group_chunk",
      [](Address scores, int scores_dtype, int64_t n, int64_t f_begin, int64_t f_count,
         int64_t size, int64_t k, Address row_residual, Address row_norm, Address latent_norm,
         Address latent_residual, float score_rounding, float absolute, Address x, int64_t x_stride,
         int dtype, Address b_dec, Address w_enc, int64_t w_stride, Address b_enc, int64_t d,
         Address not_finite, Address values, Address indices) {
        const fastsae::ScreenBounds bounds = {at<const float>(row_residual),
                                              at<const float>(row_norm),
                                              at<const float>(latent_norm),
                                              at<const float>(latent_residual),
                                              score_rounding,
                                              absolute};
        fastsae::kernels().group_chunk(
            matrix(scores, f_count, scores_dtype), n,
            {f_begin, f_count, size, k, bounds, matrix(x, x_stride, dtype), at<const float>(b_dec),
             matrix(w_enc, w_stride, dtype), at<const float>(b_enc), d,
             at<const uint8_t>(not_finite), at<float>(values), at<int32_t>(indices)});
      },
      release_gil());
  m.def(
      "move_rows",
      [](Address values, Address indices, Address from, Address counts, int64_t n, Address to,
         Address out, int dtype, Address out_indices) {
        fastsae::kernels().move_rows(at<const float>(values), at<const int32_t>(indices),
                                     at<const int64_t>(from), at<const int32_t>(counts), n,
                                     at<const int64_t>(to), at<void>(out),
                                     static_cast<DType>(dtype), at<int32_t>(out_indices));
      },
      release_gil());
  m.def(
      "decode",
      [](Address values, Address indices, Address offsets, int64_t n, int64_t k, Address w_dec,
         int64_t w_stride, int dtype, int64_t d_sae, int64_t d, Address b_dec, bool dense,
         Address out, int64_t out_stride) {
        fastsae::kernels().decode(at<const void>(values), codes(indices, offsets, n, k),
                                  matrix(w_dec, w_stride, dtype), d_sae, d, at<const float>(b_dec),
                                  dense, mutable_matrix(out, out_stride, dtype));
      },
      release_gil());
  m.def(
      "squared_error",
      [](Address values, Address indices, Address offsets, int64_t n, int64_t k, Address w_dec,
         int64_t w_stride, int dtype, int64_t d_sae, int64_t d, Address b_dec, bool dense,
         Address target, int64_t target_stride, Address residual, int64_t residual_stride,
         Address squared_error) {
        fastsae::kernels().squared_error(
            at<const void>(values), codes(indices, offsets, n, k), matrix(w_dec, w_stride, dtype),
            d_sae, d, at<const float>(b_dec), dense, matrix(target, target_stride, dtype),
            mutable_matrix(residual, residual_stride, dtype), at<float>(squared_error));
      },
      release_gil());
  m.def(
      "sampled_dot",
      [](Address g, int64_t g_stride, Address indices, Address offsets, int64_t n, int64_t k,
         Address w_dec, int64_t w_stride, int dtype, int64_t d_sae, int64_t d, Address row_scale,
         bool dense, Address out) {
        fastsae::kernels().sampled_dot(matrix(g, g_stride, dtype), codes(indices, offsets, n, k),
                                       matrix(w_dec, w_stride, dtype), d_sae, d,
                                       at<const float>(row_scale), dense, at<void>(out));
      },
      release_gil());
  m.def(
      "transpose",
      [](Address indices, Address offsets, int64_t n, int64_t k, int64_t d_sae,
         Address latent_offsets, Address tokens, Address entries) {
        fastsae::transpose(codes(indices, offsets, n, k), d_sae, at<int64_t>(latent_offsets),
                           at<int32_t>(tokens), at<int64_t>(entries));
      },
      release_gil());
  m.def(
      "ascending",
      [](Address indices, Address offsets, int64_t n, int64_t k) {
        return fastsae::ascending(codes(indices, offsets, n, k));
      },
      release_gil());
  m.def(
      "indices_within",
      [](Address indices, int64_t nnz, int64_t d_sae) {
        return fastsae::indices_within(at<const int32_t>(indices), nnz, d_sae);
      },
      release_gil());
  m.def(
      "accumulate_rows",
      [](Address values, Address latent_offsets, Address tokens, Address entries, int64_t d_sae,
         Address g, int64_t g_stride, int dtype, int64_t n_tokens, int64_t d, Address shift,
         Address row_scale, bool dense, Address out, int64_t out_stride, Address value_sums) {
        const fastsae::LatentMajor latent_major = {at<const int64_t>(latent_offsets),
                                                   at<const int32_t>(tokens),
                                                   at<const int64_t>(entries), d_sae};
        fastsae::kernels().accumulate_rows(
            at<const void>(values), latent_major, matrix(g, g_stride, dtype), n_tokens, d,
            at<const float>(shift), at<const float>(row_scale), dense,
            mutable_matrix(out, out_stride, dtype), at<void>(value_sums));
      },
      release_gil());
  m.def(
      "gradient_norm",
      [](Address values, Address grad_values, Address latent_offsets, Address tokens,
         Address entries, int64_t d_sae, Address g, int64_t g_stride, Address row_scale, Address x,
         int64_t x_stride, Address b_dec, int64_t d_in, int64_t d_out, int dtype, Address w_dec,
         int64_t w_dec_stride, int weight_dtype, bool unit_norm, float clip_value,
         float clip_row_norm) {
        return fastsae::kernels().gradient_norm(
            {at<const void>(values),
             at<const void>(grad_values),
             {at<const int64_t>(latent_offsets), at<const int32_t>(tokens),
              at<const int64_t>(entries), d_sae},
             matrix(g, g_stride, dtype),
             at<const float>(row_scale),
             matrix(x, x_stride, dtype),
             at<const float>(b_dec),
             d_in,
             d_out,
             mutable_matrix(w_dec, w_dec_stride, weight_dtype),
             unit_norm,
             clip_value,
             clip_row_norm});
      },
      release_gil());
  m.def(
      "fused_update",
      [](Address values, Address grad_values, Address latent_offsets, Address tokens,
         Address entries, int64_t d_sae, Address g, int64_t g_stride, Address row_scale, Address x,
         int64_t x_stride, Address b_dec, int64_t d_in, int64_t d_out, int dtype,
         std::array<Address, 3> w_enc, std::array<int64_t, 3> w_enc_strides,
         std::array<Address, 3> b_enc, std::array<Address, 3> w_dec,
         std::array<int64_t, 3> w_dec_strides, int weight_dtype, int moment_dtype,
         std::array<Address, 3> copies, std::array<int64_t, 3> copy_strides, double lr,
         double beta1, double beta2, double eps, double weight_decay, int64_t step, bool unit_norm,
         float clip_value, float clip_row_norm, float gradient_scale, bool lazy,
         std::array<uint32_t, 6> streams) {
        const double correction1 = 1 - std::pow(beta1, static_cast<double>(step));
        const double correction2 = 1 - std::pow(beta2, static_cast<double>(step));
        fastsae::FusedUpdate update = {};
        update.values = at<const void>(values);
        update.grad_values = at<const void>(grad_values);
        update.codes = {at<const int64_t>(latent_offsets), at<const int32_t>(tokens),
                        at<const int64_t>(entries), d_sae};
        update.g = matrix(g, g_stride, dtype);
        update.row_scale = at<const float>(row_scale);
        update.x = matrix(x, x_stride, dtype);
        update.b_dec = at<const float>(b_dec);
        update.d_in = d_in;
        update.d_out = d_out;
        update.unit_norm = unit_norm;
        update.clip_value = clip_value;
        update.clip_row_norm = clip_row_norm;
        update.w_enc = mutable_matrix(w_enc[0], w_enc_strides[0], weight_dtype);
        update.w_enc_first = mutable_matrix(w_enc[1], w_enc_strides[1], moment_dtype);
        update.w_enc_second = mutable_matrix(w_enc[2], w_enc_strides[2], moment_dtype);
        update.b_enc = mutable_matrix(b_enc[0], 1, weight_dtype);
        update.b_enc_first = mutable_matrix(b_enc[1], 1, moment_dtype);
        update.b_enc_second = mutable_matrix(b_enc[2], 1, moment_dtype);
        update.w_dec = mutable_matrix(w_dec[0], w_dec_strides[0], weight_dtype);
        update.w_dec_first = mutable_matrix(w_dec[1], w_dec_strides[1], moment_dtype);
        update.w_dec_second = mutable_matrix(w_dec[2], w_dec_strides[2], moment_dtype);
        update.w_enc_stream = {streams[0], streams[1]};
        update.b_enc_stream = {streams[2], streams[3]};
        update.w_dec_stream = {streams[4], streams[5]};
        update.w_enc_copy = mutable_matrix(copies[0], copy_strides[0], dtype);
        update.b_enc_copy = mutable_matrix(copies[1], copy_strides[1], dtype);
        update.w_dec_copy = mutable_matrix(copies[2], copy_strides[2], dtype);
        // torch.optim.SparseAdam adds eps to the root before it is corrected.
        const double scale_of_eps = lazy ? 1 / std::sqrt(correction2) : 1.0;
        update.adam = {static_cast<float>(1 - beta1),
                       static_cast<float>(beta2),
                       static_cast<float>(1 - beta2),
                       static_cast<float>(lr / correction1),
                       static_cast<float>(1 / std::sqrt(correction2)),
                       static_cast<float>(eps * scale_of_eps),
                       static_cast<float>(weight_decay)};
        update.gradient_scale = gradient_scale;
        update.lazy = lazy;
        fastsae::kernels().fused_update(update);
      },
      release_gil());
  m.def(
      "normalize_rows",
      [](Address rows, int64_t stride, int dtype, int64_t n, int64_t d, float eps) {
        fastsae::kernels().normalize_rows(mutable_matrix(rows, stride, dtype), n, d, eps);
      },
      release_gil());
  m.def(
      "project_rows",
      [](Address grad, int64_t grad_stride, Address rows, int64_t stride, int dtype, int64_t n,
         int64_t d) {
        fastsae::kernels().project_rows(mutable_matrix(grad, grad_stride, dtype),
                                        matrix(rows, stride, dtype), n, d);
      },
      release_gil());
}
