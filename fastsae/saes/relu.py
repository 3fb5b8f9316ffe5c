"""ReLUSAE: every latent whose pre-activation is positive, kept few by a penalty."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsae.codes import SparseCodes
from fastsae.ops import encode_threshold
from fastsae.saes.base import SAE, Active, SAEOptions, Weights
from fastsae.saes.ghost import ghost_loss
from fastsae.saes.loss import Penalty, Reconstruction
from fastsae.saes.options import above, at_least, flag, one_of
from fastsae.saes.ragged import at_entries, latent_sums, token_sums, wide
from fastsae.saes.registry import register

# A latent that is silent in a batch has the rate 0, whose logarithm is not finite.
_LEAST_RATE = 1e-6


@register
class ReLUSAE(SAE):
    """The ReLU sparse autoencoder with a sparsity penalty.

        codes = relu((x - b_dec) W_enc + b_enc)
        x̂ = codes W_dec + b_dec
        loss = mean_n ‖x̂_n - x_n‖² + l1_coefficient · mean_n (Σ_f (w_f codes_nf)^p)^(1/p)

    with w_f = ‖W_dec[f]‖ (Anthropic, April 2024, "Update on how we train SAEs"; SAELens' "standard") or 1 (Bricken et
    al. 2023, "Towards Monosemanticity", which keeps decoder rows at unit norm; so does dictionary_learning).

    With penalty="kl" the term is instead kl_coefficient · Σ_f KL(ρ ‖ ρ̂_f), the divergence between Bernoulli
    distributions of the target rate ρ and of ρ̂_f = mean_n tanh(codes_nf) (Ng 2011, "Sparse autoencoder", whose
    activations are bounded; tanh bounds these). ρ̂_f is held in [10⁻⁶, 1 - 10⁻⁶].

    Terms of its loss: `l1` or `kl`, and `ghost` where ghost gradients are on.

    Args:
        d_in, d_sae: width of an activation, number of latents.
        penalty: "l1" or "kl".
        l1_coefficient: weight of the L1 term; 5 is Anthropic's (April 2024) for activations of mean norm √d_in.
        l1_weight: "decoder_norm" or "none".
        lp_norm: p above.
        kl_target, kl_coefficient: ρ and the weight of the KL term.
        ghost_gradients: let dead latents learn from the residual (fastsae.saes.ghost). Another cure for dead latents,
            resampling, is fastsae.training.resample_dead_.
        options: see fastsae.saes.SAE; `normalize_decoder` is on only with l1_weight="none" by default.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture = "relu"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        penalty: str = "l1",
        l1_coefficient: float = 5.0,
        l1_weight: str = "decoder_norm",
        lp_norm: float = 1.0,
        kl_target: float = 1e-3,
        kl_coefficient: float = 1e-3,
        ghost_gradients: bool = False,
        **options: Unpack[SAEOptions],
    ):
        one_of("l1_weight", l1_weight, ("decoder_norm", "none"))
        super().__init__(d_in, d_sae, **{"normalize_decoder": l1_weight == "none"} | options)
        one_of("penalty", penalty, ("l1", "kl"))
        at_least("l1_coefficient", l1_coefficient)
        above("lp_norm", lp_norm)
        if not 0 < kl_target < 1:
            raise ValueError(f"kl_target = {kl_target!r}: expected a rate between 0 and 1")
        at_least("kl_coefficient", kl_coefficient)
        flag("ghost_gradients", ghost_gradients)
        self.penalty = penalty
        self.l1_coefficient = l1_coefficient
        self.l1_weight = l1_weight
        self.lp_norm = lp_norm
        self.kl_target = kl_target
        self.kl_coefficient = kl_coefficient
        self.ghost_gradients = ghost_gradients

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        return super().config() | {
            "penalty": self.penalty,
            "l1_coefficient": self.l1_coefficient,
            "l1_weight": self.l1_weight,
            "lp_norm": self.lp_norm,
            "kl_target": self.kl_target,
            "kl_coefficient": self.kl_coefficient,
            "ghost_gradients": self.ghost_gradients,
        }

    @property
    def _weighs_by_norms(self) -> bool:
        return self.penalty == "l1" and self.l1_weight == "decoder_norm"

    @property
    def gradients_by_formula(self) -> bool:
        """No penalty on the decoder's norms and no ghost gradients."""
        return not (self._weighs_by_norms or self.ghost_gradients)

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        return encode_threshold(x, self.W_enc, self.b_enc, b_dec=self._b_dec_of_input)

    def _activate(self, x: Tensor, weights: Weights) -> Active:
        return Active(encode_threshold(x, weights.encoder_rows.T, self.b_enc, b_dec=self._b_dec_of_input))

    def _penalties(
        self, active: Active, x: Tensor, target: Tensor, error: Reconstruction, weights: Weights
    ) -> dict[str, Penalty]:
        if self.penalty == "l1":
            value = lp_penalty(active.codes, weights.decoder_norms, self.lp_norm)
            penalties = {"l1": Penalty(value, self.sparsity_scale * self.l1_coefficient)}
        else:
            value = kl_penalty(active.codes, self.kl_target)
            penalties = {"kl": Penalty(value, self.sparsity_scale * self.kl_coefficient)}
        if self.ghost_gradients:
            ghost = ghost_loss(self, x, error.residual.detach(), weights)
            penalties["ghost"] = Penalty(ghost, 1.0)
        return penalties


def lp_penalty(codes: SparseCodes, weights: Tensor | None, p: float = 1.0) -> Tensor:
    """mean_n (Σ_f (w_f codes_nf)^p)^(1/p), w [d_sae] or all 1; a token without activations counts 0."""
    values = wide(codes.values)
    if weights is not None:
        values = values * at_entries(weights, codes)
    tokens = max(codes.n_tokens, 1)
    if p == 1.0:
        return values.sum() / tokens
    sums = token_sums(values.pow(p), codes)
    # The root has no derivative at 0; the norm of nothing is 0 whatever the weights.
    roots = sums.where(sums != 0, 1).pow(1 / p)
    return roots.where(sums != 0, 0).sum() / tokens


def kl_penalty(codes: SparseCodes, target: float) -> Tensor:
    """Σ_f [ρ ln(ρ / ρ̂_f) + (1 - ρ) ln((1 - ρ) / (1 - ρ̂_f))], ρ̂_f = mean_n tanh(codes_nf)."""
    rates = latent_sums(wide(codes.values).tanh(), codes) / max(codes.n_tokens, 1)
    rates = rates.clamp(_LEAST_RATE, 1 - _LEAST_RATE)
    rho = torch.full_like(rates, target)
    return (rho * (rho / rates).log() + (1 - rho) * ((1 - rho) / (1 - rates)).log()).sum()
