// fused_update: for every latent f, both weights' gradients (latent_gradient.h) and their Adam step
// (adam.h) in one pass,
//   G <- c G,   p, m, s <- Adam(p, m, s, G),   W_dec[f] <- W_dec[f] / |W_dec[f]|
// with c the share that clipping to a global norm leaves, and unit rows where the decoder keeps
// them. `lazy` leaves latents without an entry as they are.
//
// Access: latent-major. A gradient row lives in the first-level cache from its sum to its use, so
// no gradient tensor exists; each parameter and state row is read and written once (28 bytes a
// parameter in float32 fall to 24, with moments in bfloat16 to 16), which is the floor for rows
// that no token names, the great majority. With float32 masters of bfloat16 parameters the copies
// add 2 bytes, written. Threads share the latents by their entries (balance.h).
#include <cmath>

#include "adam.h"
#include "balance.h"
#include "isa_kernels.h"
#include "latent_gradient.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <typename T>
T* row_of(const MutableMatrix& m, int64_t f) {
  return static_cast<T*>(m.data) + f * m.stride;
}

// A parameter is the rounded copy of its master, where it has one.
template <typename T, typename Weight>
void copy_row(const Weight* master, int64_t f, int64_t d, const MutableMatrix& copy) {
  if (!copy.data) return;
  T* to = row_of<T>(copy, f);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(to + i, load(master + i));
  for (; i < d; ++i) assign(to[i], to_float(master[i]));
}

template <typename Weight>
void normalize_row(Weight* row, int64_t d) {
  const float norm = std::sqrt(dot(row, row, d));
  const F16 scale = broadcast(1.0f / (norm < 1e-12f ? 1e-12f : norm));
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(row + i, mul(load(row + i), scale));
  if (i < d) store_partial(row + i, mul(load_partial(row + i, d - i), scale), d - i);
}

// A latent's two updates, in gathered rows: 14 of them in bytes.
constexpr int64_t kLatentCost = 16;

// T is the dtype of activations and codes, Weight that of what takes the step.
template <typename T, typename Weight, typename Moment>
void fused_update_as(const FusedUpdate& u) {
  const AdamLanes lanes(u.adam);
  const LatentGradient<T, Weight> gradients(u);
  const auto weights = row_of<Weight>;
  const auto moments = row_of<Moment>;

  const auto update_decoder = [&](int64_t f, const float* gradient) {
    Weight* row = weights(u.w_dec, f);
    adam_row(lanes, u.w_dec_stream, f, gradient, u.d_out, row, moments(u.w_dec_first, f),
             moments(u.w_dec_second, f));
    if (u.unit_norm) normalize_row(row, u.d_out);
    copy_row<T>(row, f, u.d_out, u.w_dec_copy);
  };
  const auto update_bias = [&](int64_t f, const float* gradient) {
    Weight* bias = weights(u.b_enc, f);
    adam_row(lanes, u.b_enc_stream, f, gradient, 1, bias, moments(u.b_enc_first, f),
             moments(u.b_enc_second, f));
    copy_row<T>(bias, f, 1, u.b_enc_copy);
  };
  const auto update_encoder = [&](int64_t f, const float* gradient) {
    Weight* row = weights(u.w_enc, f);
    adam_row(lanes, u.w_enc_stream, f, gradient, u.d_in, row, moments(u.w_enc_first, f),
             moments(u.w_enc_second, f));
    copy_row<T>(row, f, u.d_in, u.w_enc_copy);
    // Row f of W_enc is final here, and in the first-level cache: what a screen keeps of it is to
    // be written here.
  };

  const auto begin = [&](int64_t f) { return gradients.begin(f); };
  const auto left = [&](int64_t f) { return u.lazy && gradients.empty(f); };
  const auto sum = [&](int64_t f, int64_t first, int64_t columns, float* out, float* partial) {
    if (!left(f)) gradients.sum(f, first, columns, out, partial);
  };
  const auto update = [&](int64_t f, float* gradient) {
    if (left(f)) return;
    if (!gradients.empty(f)) {
      gradients.project_and_clip(f, gradient);
      if (u.gradient_scale != 1.0f) scale_row(u.gradient_scale, gradients.width(), gradient);
    }
    update_decoder(f, gradient);
    update_encoder(f, gradient + u.d_out);
    update_bias(f, gradient + u.d_out + u.d_in);
  };
  for_each_row(u.codes.d_sae, begin, kLatentCost, gradients.width(), sum, update);
}

}  // namespace

void fused_update(const FusedUpdate& update) {
  const bool narrow = update.g.dtype == DType::bfloat16;
  const bool stochastic = update.w_dec.dtype != update.w_dec_first.dtype;
  if (narrow && update.w_dec.dtype == DType::bfloat16)
    fused_update_as<bfloat16, bfloat16, bfloat16>(update);
  else if (narrow && stochastic)
    fused_update_as<bfloat16, float, bfloat16>(update);
  else if (narrow)
    fused_update_as<bfloat16, float, float>(update);
  else if (stochastic)
    fused_update_as<float, float, bfloat16>(update);
  else
    fused_update_as<float, float, float>(update);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
