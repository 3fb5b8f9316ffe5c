// Adam's step on one row, as torch.optim.Adam computes it:
//   g <- g + w p,   m <- m + (1 - beta1)(g - m),   s <- beta2 s + (1 - beta2) g^2
//   p <- p - a m / (sqrt(s) / b + eps),   a = lr / (1 - beta1^t),   b = sqrt(1 - beta2^t)
// Moments narrower than the weights are rounded at random once the step has been taken with them.
#pragma once

#include <type_traits>

#include "stochastic_rounding.h"

namespace fastsae {
namespace FASTSAE_ISA {

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

template <typename Weight, typename Moment>
void adam_row(const AdamLanes& a, const RandomStream& stream, int64_t f, const float* gradient,
              int64_t d, Weight* p, Moment* m, Moment* s) {
  constexpr bool kStochastic = !std::is_same<Weight, Moment>::value;
  const RandomRow row(stream, f);
  const auto store_moments = [&](int64_t i, const Step& next, int64_t count) {
    if constexpr (kStochastic) {
      const U16 random = row.bits(i);
      store_stochastic(m + i, next.first, lower_half(random), count);
      store_stochastic(s + i, next.second, shift_right<16>(random), count);
    } else if (count == kLanes) {
      store(m + i, next.first);
      store(s + i, next.second);
    } else {
      store_partial(m + i, next.first, count);
      store_partial(s + i, next.second, count);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const Step next = adam(a, load(p + i), load(gradient + i), load(m + i), load(s + i));
    store(p + i, next.parameter);
    store_moments(i, next, kLanes);
  }
  if (i == d) return;
  const int64_t rest = d - i;
  const Step next = adam(a, load_partial(p + i, rest), load_partial(gradient + i, rest),
                         load_partial(m + i, rest), load_partial(s + i, rest));
  store_partial(p + i, next.parameter, rest);
  store_moments(i, next, rest);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
