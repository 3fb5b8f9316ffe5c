// fused_update: for every latent f, both weights' gradients and their Adam step in one pass,
//   G_dec = sum_e c_t v_e g_t             G_enc = sum_e u_e (x_t - b_dec)       G_b = sum_e u_e
//   G_dec -= (<G_dec, w> / <w, w>) w      where the decoder keeps unit norm
//   m <- m + (1 - beta1)(G - m),  s <- beta2 s + (1 - beta2) G^2,  p <- p - a m / (sqrt(s) / b +
//   eps) W_dec[f] <- W_dec[f] / |W_dec[f]|
// with v the codes' values, u the gradient of them, a = lr / (1 - beta1^t), b = sqrt(1 - beta2^t),
// as torch.optim.Adam computes it.
//
// Access: latent-major. A gradient row lives in the first-level cache from its sum to its use, so
// no gradient tensor exists; each parameter and state row is read and written once (28 bytes a
// parameter in float32 fall to 24), which is the floor for rows that no token names, the great
// majority. With float32 masters of bfloat16 parameters the copies add 2 bytes, written. Threads
// share the latents by their entries (balance.h).
#include <cmath>

#include "accumulate.h"
#include "balance.h"
#include "dot.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

struct AdamLanes {
  F16 one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction, eps, weight_decay;
  explicit AdamLanes(const Adam& a)
      : one_minus_beta1(broadcast(a.one_minus_beta1)),
        beta2(broadcast(a.beta2)),
        one_minus_beta2(broadcast(a.one_minus_beta2)),
        step_size(broadcast(a.step_size)),
        inverse_correction(broadcast(a.inverse_correction)),
        eps(broadcast(a.eps)),
        weight_decay(broadcast(a.weight_decay)) {}
};

struct Step {
  F16 parameter, first, second;
};
inline Step adam(const AdamLanes& a, F16 p, F16 g, F16 m, F16 s) {
  g = fma(a.weight_decay, p, g);
  m = fma(a.one_minus_beta1, sub(g, m), m);
  s = fma(mul(a.one_minus_beta2, g), g, mul(a.beta2, s));
  const F16 denominator = fma(sqrt(s), a.inverse_correction, a.eps);
  return {sub(p, mul(a.step_size, div(m, denominator))), m, s};
}

template <typename T>
void adam_row(const AdamLanes& a, const float* gradient, int64_t d, T* p, T* m, T* s) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const Step next = adam(a, load(p + i), load(gradient + i), load(m + i), load(s + i));
    store(p + i, next.parameter);
    store(m + i, next.first);
    store(s + i, next.second);
  }
  if (i == d) return;
  const int64_t rest = d - i;
  const Step next = adam(a, load_partial(p + i, rest), load_partial(gradient + i, rest),
                         load_partial(m + i, rest), load_partial(s + i, rest));
  store_partial(p + i, next.parameter, rest);
  store_partial(m + i, next.first, rest);
  store_partial(s + i, next.second, rest);
}

template <typename T>
T* row_of(const MutableMatrix& m, int64_t f) {
  return static_cast<T*>(m.data) + f * m.stride;
}

// A parameter is the rounded copy of its master, where it has one.
template <typename T, typename State>
void copy_row(const State* master, int64_t f, int64_t d, const MutableMatrix& copy) {
  if (!copy.data) return;
  T* to = row_of<T>(copy, f);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(to + i, load(master + i));
  for (; i < d; ++i) assign(to[i], to_float(master[i]));
}

// A latent's two updates, in gathered rows: 14 of them in bytes.
constexpr int64_t kLatentCost = 16;

// T is the dtype of activations and codes, State that of weights and moments.
template <typename T, typename State>
void fused_update_as(const FusedUpdate& u) {
  const AdamLanes lanes(u.adam);
  const int64_t d_in = u.d_in, d_out = u.d_out, both = d_out + d_in;
  const auto row = row_of<State>;

  // A latent's sums are its decoder's gradient, its encoder's gradient and its bias's.
  const auto sum = [&](int64_t f, int64_t first, int64_t columns, float* out, float* partial) {
    const int64_t end = first + columns;
    if (first < d_out)
      accumulate_latent(static_cast<const T*>(u.values), u.codes, f, u.g, first,
                        (end < d_out ? end : d_out) - first, nullptr, u.row_scale, out, partial);
    if (end <= d_out) return;
    const int64_t from = first > d_out ? first : d_out, to = end < both ? end : both;
    const float bias =
        accumulate_latent(static_cast<const T*>(u.grad_values), u.codes, f, u.x, from - d_out,
                          to - from, u.b_dec, nullptr, out + from - first, partial);
    if (end > both) out[both - first] = bias;
  };

  const auto update = [&](int64_t f, float* gradient) {
    State* w_dec = row(u.w_dec, f);
    if (u.unit_norm) {
      const float squared = dot(w_dec, w_dec, d_out);
      const float along = dot(w_dec, gradient, d_out);
      if (squared != 0.0f) add_row<false>(-along / squared, w_dec, nullptr, d_out, gradient);
    }
    adam_row(lanes, gradient, d_out, w_dec, row(u.w_dec_first, f), row(u.w_dec_second, f));
    if (u.unit_norm) {
      const float norm = std::sqrt(dot(w_dec, w_dec, d_out));
      const F16 scale = broadcast(1.0f / (norm < 1e-12f ? 1e-12f : norm));
      int64_t i = 0;
      for (; i + kLanes <= d_out; i += kLanes) store(w_dec + i, mul(load(w_dec + i), scale));
      if (i < d_out)
        store_partial(w_dec + i, mul(load_partial(w_dec + i, d_out - i), scale), d_out - i);
    }
    copy_row<T>(w_dec, f, d_out, u.w_dec_copy);

    adam_row(lanes, gradient + d_out, d_in, row(u.w_enc, f), row(u.w_enc_first, f),
             row(u.w_enc_second, f));
    adam_row(lanes, gradient + both, 1, row(u.b_enc, f), row(u.b_enc_first, f),
             row(u.b_enc_second, f));
    copy_row<T>(row(u.w_enc, f), f, d_in, u.w_enc_copy);
    copy_row<T>(row(u.b_enc, f), f, 1, u.b_enc_copy);
  };

  const auto begin = [&](int64_t f) { return u.codes.offsets[f]; };
  for_each_row(u.codes.d_sae, begin, kLatentCost, both + 1, sum, update);
}

}  // namespace

void fused_update(const FusedUpdate& update) {
  if (update.g.dtype == DType::float32)
    fused_update_as<float, float>(update);
  else if (update.w_dec.dtype == DType::float32)
    fused_update_as<bfloat16, float>(update);
  else
    fused_update_as<bfloat16, bfloat16>(update);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
