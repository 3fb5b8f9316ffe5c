"""JumpReLUSAE: every latent whose pre-activation is above a threshold that it learns."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from fastsae.codes import SparseCodes
from fastsae.ops import encode_threshold
from fastsae.saes.base import SAE, Active, SAEOptions, Weights
from fastsae.saes.loss import Penalty, Reconstruction, zero_of
from fastsae.saes.options import above, at_least, flag, one_of
from fastsae.saes.ragged import at_entries, token_sums, wide
from fastsae.saes.registry import register

PENALTIES = ("step", "quadratic", "target", "tanh")


class Window(NamedTuple):
    """What the penalties need of a batch: entries are the active ones and those in the window of the estimators."""

    places: SparseCodes  # every entry
    steps: Tensor  # 1 where active, else 0; with the estimator's gradient
    activations: Tensor  # wide, with the estimator's gradient


@register
class JumpReLUSAE(SAE):
    """The JumpReLU sparse autoencoder of Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity
    with JumpReLU Sparse Autoencoders".

        codes = pre · 1[pre > θ],  pre = (x - b_dec) W_enc + b_enc
        x̂ = codes W_dec + b_dec
        loss = mean_n ‖x̂_n - x_n‖² + l0_coefficient · penalty

    Thresholds learn through straight-through estimators with a rectangle of width ε = bandwidth (open at both ends):

        ∂codes/∂θ = -(θ/ε) · 1[|pre - θ| < ε/2],   ∂1[pre > θ]/∂θ = -(1/ε) · 1[|pre - θ| < ε/2]

    The entries of the window come out of the same selection as the active ones: those with pre > θ - ε/2.

    Penalties, with L0_n the active latents of token n:
        "step": mean_n L0_n (the paper);
        "quadratic": mean_n 2/T (L0_n - T)², T = target_l0 (Gemma Scope 2, as SAELens has it);
        "target": (mean_n L0_n / T - 1)² (dictionary_learning);
        "tanh": mean_n Σ_f tanh(tanh_scale · codes_nf ‖W_dec[f]‖) (Anthropic, January 2025 update).

    Terms of its loss: `l0`, the penalty; and `pre_act` where pre_act_coefficient is not 0:
    mean_n Σ_{dead f} relu(θ_f - pre_nf) ‖W_dec[f]‖, which pulls dead latents back (Anthropic, January 2025). No dead
    latent is above its threshold, so it is computed as Σ_f ‖W_dec[f]‖ (θ_f - mean_n pre_nf): one product with the mean
    of x. Norms of decoder rows count only where `normalize_decoder` does not keep them at 1.

    Args:
        d_in, d_sae: width of an activation, number of latents.
        penalty, l0_coefficient, target_l0, tanh_scale: see above.
        bandwidth: ε, in units of the pre-activations; 0.001 in the paper for activations of mean square 1, 0.05 in
            SAELens.
        threshold_init: θ at the start.
        log_threshold: learn log θ, the paper's parametrisation, instead of θ, which is then held at 0 or above.
        ste_to_input: give the estimators' gradients to pre-activations too, with the opposite sign (Anthropic).
        pre_act_coefficient: see above; 3e-6 in Anthropic's set-up.
        options: see fastsae.saes.SAE.

    The parameter `threshold` (or `log_threshold`) is float32 whatever the SAE's dtype: steps of a learning rate's size
    would round away in bfloat16.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture = "jumprelu"
    _kept_dtypes = SAE._kept_dtypes | {"threshold": torch.float32, "log_threshold": torch.float32}

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        penalty: str = "step",
        l0_coefficient: float = 1e-3,
        target_l0: float | None = None,
        tanh_scale: float = 4.0,
        bandwidth: float = 0.05,
        threshold_init: float = 0.01,
        log_threshold: bool = False,
        ste_to_input: bool = False,
        pre_act_coefficient: float = 0.0,
        **options: Unpack[SAEOptions],
    ):
        super().__init__(d_in, d_sae, **options)
        one_of("penalty", penalty, PENALTIES)
        at_least("l0_coefficient", l0_coefficient)
        if (target_l0 is None) == (penalty in ("quadratic", "target")):
            wanted = f"a number of latents in (0, {d_sae}]" if target_l0 is None else "None, which other penalties need"
            raise ValueError(f"target_l0 = {target_l0!r} with penalty = {penalty!r}: expected {wanted}")
        if target_l0 is not None and not 0 < target_l0 <= d_sae:
            raise ValueError(f"target_l0 = {target_l0!r}: expected a number of latents in (0, {d_sae}]")
        above("tanh_scale", tanh_scale)
        above("bandwidth", bandwidth)
        flag("log_threshold", log_threshold)
        (above if log_threshold else at_least)("threshold_init", threshold_init)
        flag("ste_to_input", ste_to_input)
        at_least("pre_act_coefficient", pre_act_coefficient)
        self.penalty = penalty
        self.l0_coefficient = l0_coefficient
        self.target_l0 = target_l0
        self.tanh_scale = tanh_scale
        self.bandwidth = bandwidth
        self.threshold_init = threshold_init
        self.learns_log = log_threshold
        self.ste_to_input = ste_to_input
        self.pre_act_coefficient = pre_act_coefficient
        start = torch.full((d_sae,), float(threshold_init), dtype=torch.float32, device=self.device)
        if log_threshold:
            self.log_threshold = nn.Parameter(start.log())
        else:
            self.threshold = nn.Parameter(start)

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        return super().config() | {
            "penalty": self.penalty,
            "l0_coefficient": self.l0_coefficient,
            "target_l0": self.target_l0,
            "tanh_scale": self.tanh_scale,
            "bandwidth": self.bandwidth,
            "threshold_init": self.threshold_init,
            "log_threshold": self.learns_log,
            "ste_to_input": self.ste_to_input,
            "pre_act_coefficient": self.pre_act_coefficient,
        }

    @property
    def _weighs_by_norms(self) -> bool:
        return not self.normalize_decoder and (self.penalty == "tanh" or self.pre_act_coefficient > 0)

    @property
    def gradients_by_formula(self) -> bool:
        """No penalty on the decoder's norms and none on dead latents."""
        return not (self._weighs_by_norms or self.pre_act_coefficient)

    def _preactivations(self, active: Active) -> Tensor:
        return active.extra.places.values

    def thresholds(self) -> Tensor:
        """θ of each latent: float32 [d_sae]."""
        return self.log_threshold.exp() if self.learns_log else self.threshold

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        # Below zero a threshold would let negative activations through: relu(pre) · 1[pre > θ] is what readers expect.
        threshold = self.thresholds().clamp_min(0)
        return encode_threshold(x, self.W_enc, self.b_enc, threshold, b_dec=self._b_dec_of_input)

    def _activate(self, x: Tensor, weights: Weights) -> Active:
        if self.training and not self.learns_log:
            with torch.no_grad():
                self.threshold.clamp_(min=0)
        codes, window = jump(
            x,
            weights.encoder_rows,
            self.b_enc,
            self._b_dec_of_input,
            self.thresholds(),
            bandwidth=self.bandwidth,
            ste_to_input=self.ste_to_input,
        )
        return Active(codes, window)

    def _penalties(
        self, active: Active, x: Tensor, target: Tensor, error: Reconstruction, weights: Weights
    ) -> dict[str, Penalty]:
        value = l0_penalty(
            active.extra,
            weights.decoder_norms,
            penalty=self.penalty,
            target_l0=self.target_l0,
            tanh_scale=self.tanh_scale,
        )
        penalties = {"l0": Penalty(value, self.sparsity_scale * self.l0_coefficient)}
        if self.pre_act_coefficient:
            penalties["pre_act"] = Penalty(self._pre_act(x, weights), self.pre_act_coefficient)
        return penalties

    def _pre_act(self, x: Tensor, weights: Weights) -> Tensor:
        dead = self._dead_in_training()
        if dead is None or not x.shape[0]:
            return zero_of(x)
        mean = wide(x).mean(dim=0)
        if self.apply_b_dec_to_input:
            mean = mean - self.b_dec
        w_enc = functional.embedding(dead, weights.encoder_rows, sparse=True)
        pre = wide(w_enc) @ mean + self.b_enc[dead]
        below = self.thresholds()[dead] - pre
        return (below if weights.decoder_norms is None else below * weights.decoder_norms[dead]).sum()


def jump(
    x: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    theta: Tensor,
    *,
    bandwidth: float,
    ste_to_input: bool,
) -> tuple[SparseCodes, Window]:
    """The activations pre · 1[pre > θ] of x, and what penalties need; θ [d_sae] learns by estimators."""
    places = encode_threshold(x, encoder_rows.T, b_enc, theta - bandwidth / 2, b_dec=b_dec)
    pre = wide(places.values)
    theta = at_entries(theta, places).to(pre.dtype)
    distance = (pre - theta) / bandwidth
    estimator = ((distance > -0.5) & (distance < 0.5)).detach()
    # NaN stays, so that it reaches the output.
    active = ~(pre <= theta)
    # What is added is zero; its gradient is the estimator's.
    moved = theta - theta.detach()
    if ste_to_input:
        moved = moved - (pre - pre.detach())
    slope = (theta.detach() / bandwidth).where(estimator, 0)
    activations = pre.where(active, 0) - slope * moved
    steps = active.to(pre.dtype) - (1 / bandwidth) * moved.where(estimator, 0)
    return places.with_values(activations.to(x.dtype)), Window(places, steps, activations)


def l0_penalty(
    window: Window, norms: Tensor | None, *, penalty: str, target_l0: float | None, tanh_scale: float
) -> Tensor:
    """The penalty of JumpReLUSAE by its name; `norms` [d_sae] weigh the activations of "tanh"."""
    tokens = max(window.places.n_tokens, 1)
    if penalty == "tanh":
        activations = window.activations
        if norms is not None:
            activations = activations * at_entries(norms, window.places)
        return (tanh_scale * activations).tanh().sum() / tokens
    if penalty == "quadratic":
        l0 = token_sums(window.steps, window.places)
        return (2 / target_l0 * (l0 - target_l0).square()).sum() / tokens
    l0 = window.steps.sum() / tokens
    return l0 if penalty == "step" else (l0 / target_l0 - 1).square()
