// gradient_norm: the norm of the gradients of W_enc, b_enc and W_dec together, projected and
// clipped by latent (latent_gradient.h), none of which is kept: the first of the two passes that
// clipping to a global norm takes.
//
// Access: that of fused_update, less the parameters and moments; latents without an entry cost
// nothing. A latent's squares are the defined dot product, those of all latents are added in order
// in double: the same bits with any number of threads.
#include "balance.h"
#include "isa_kernels.h"
#include "latent_gradient.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <typename T, typename Weight>
double gradient_norm_as(const LatentGradients& of) {
  const LatentGradient<T, Weight> gradients(of);
  const int64_t d_sae = of.codes.d_sae;
  Scratch<double> squares(d_sae);
  std::memset(squares.get(), 0, static_cast<size_t>(d_sae) * sizeof(double));
  const auto begin = [&](int64_t f) { return gradients.begin(f); };
  const auto sum = [&](int64_t f, int64_t first, int64_t columns, float* out, float* partial) {
    if (!gradients.empty(f)) gradients.sum(f, first, columns, out, partial);
  };
  const auto square = [&](int64_t f, float* gradient) {
    if (gradients.empty(f)) return;
    gradients.project_and_clip(f, gradient);
    const float *encoder = gradient + of.d_out, bias = encoder[of.d_in];
    squares[f] = static_cast<double>(dot(gradient, gradient, of.d_out)) +
                 static_cast<double>(dot(encoder, encoder, of.d_in)) +
                 static_cast<double>(bias) * static_cast<double>(bias);
  };
  for_each_row(d_sae, begin, 0, gradients.width(), sum, square);
  double total = 0.0;
  for (int64_t f = 0; f < d_sae; ++f) total += squares[f];
  return std::sqrt(total);
}

}  // namespace

double gradient_norm(const LatentGradients& of) {
  if (of.g.dtype == DType::float32) return gradient_norm_as<float, float>(of);
  if (of.w_dec.dtype == DType::float32) return gradient_norm_as<bfloat16, float>(of);
  return gradient_norm_as<bfloat16, bfloat16>(of);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
