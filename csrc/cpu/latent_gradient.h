// A latent's gradients in one row of floats, for fused_update and gradient_norm alike:
//   [ sum_e c_t v_e g_t  (d_out) | sum_e u_e (x_t - b_dec)  (d_in) | sum_e u_e ]
// that of the decoder, of the encoder and of the bias, with v the codes' values and u the gradient
// of them. Then, in this order:
//   G_dec -= (<G_dec, w> / <w, w>) w     with unit_norm
//   G      = min(max(G, -clip_value), clip_value)
//   G_row *= min(1, clip_row_norm / (|G_row| + 1e-6))   for the encoder's row and the decoder's
// The small number is that of torch.nn.utils.clip_grad_norm_. A NaN stays one.
#pragma once

#include <cmath>
#include <limits>

#include "accumulate.h"
#include "dot.h"

namespace fastsae {
namespace FASTSAE_ISA {

inline void scale_row(float scale, int64_t d, float* row) {
  for (int64_t i = 0; i < d; ++i) row[i] *= scale;
}

// T is the dtype of activations and codes, Weight that of the decoder.
template <typename T, typename Weight>
class LatentGradient {
 public:
  explicit LatentGradient(const LatentGradients& of) : of_(of) {}

  int64_t width() const { return of_.d_out + of_.d_in + 1; }
  int64_t begin(int64_t f) const { return of_.codes.offsets[f]; }
  bool empty(int64_t f) const { return begin(f) == begin(f + 1); }

  // Writes the columns [first, first + columns) of the sums to `out`; `partial` [columns] is
  // working memory.
  void sum(int64_t f, int64_t first, int64_t columns, float* out, float* partial) const {
    const int64_t end = first + columns, d_out = of_.d_out, both = d_out + of_.d_in;
    if (first < d_out)
      accumulate_latent(static_cast<const T*>(of_.values), of_.codes, f, of_.g, first,
                        (end < d_out ? end : d_out) - first, nullptr, of_.row_scale, out, partial);
    if (end <= d_out) return;
    const int64_t from = first > d_out ? first : d_out, to = end < both ? end : both;
    const float bias =
        accumulate_latent(static_cast<const T*>(of_.grad_values), of_.codes, f, of_.x, from - d_out,
                          to - from, of_.b_dec, nullptr, out + from - first, partial);
    if (end > both) out[both - first] = bias;
  }

  void project_and_clip(int64_t f, float* gradient) const {
    if (of_.unit_norm) {
      const Weight* w = static_cast<const Weight*>(of_.w_dec.data) + f * of_.w_dec.stride;
      const float squared = dot(w, w, of_.d_out);
      const float along = dot(w, gradient, of_.d_out);
      if (squared != 0.0f) add_row<false>(-along / squared, w, nullptr, of_.d_out, gradient);
    }
    if (of_.clip_value < kNone) {
      const float most = of_.clip_value;
      for (int64_t i = 0; i < width(); ++i) {
        gradient[i] = gradient[i] > most ? most : gradient[i];
        gradient[i] = gradient[i] < -most ? -most : gradient[i];
      }
    }
    if (of_.clip_row_norm < kNone) {
      clip_row(of_.d_out, gradient);
      clip_row(of_.d_in, gradient + of_.d_out);
    }
  }

 private:
  static constexpr float kNone = std::numeric_limits<float>::infinity();

  void clip_row(int64_t d, float* row) const {
    const float share = of_.clip_row_norm / (std::sqrt(dot(row, row, d)) + 1e-6f);
    // A NaN takes the whole row with it, as torch's clipping does.
    if (!(share >= 1.0f)) scale_row(share, d, row);
  }

  const LatentGradients& of_;
};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
