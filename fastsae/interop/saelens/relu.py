"""Standard and Gated SAEs of SAELens."""

import math

from sae_lens.saes.gated_sae import GatedSAE, GatedTrainingSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardSAE, StandardTrainingSAE
from torch import Tensor

from fastsae.interop.saelens.base import Chosen, Fast
from fastsae.interop.saelens.training import FastTraining
from fastsae.ops import decode, encode_threshold
from fastsae.saes.decoder_norms import with_norms
from fastsae.saes.gated import gated
from fastsae.saes.relu import lp_penalty


class Rectified(Fast):
    """Activations relu((x - b_dec) W_enc + b_enc)."""

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        rows = self.W_enc.T
        codes = encode_threshold(x, rows.T, self.b_enc, b_dec=b_dec)
        return Chosen(x, b_dec, codes, codes, rows, self.W_dec)

    def _sampled_density(self, x: Tensor, b_dec: Tensor | None) -> float:
        return above(x, b_dec, self.W_enc, self.b_enc, 0)


class FastStandardSAE(Rectified, StandardSAE):
    """SAELens' StandardSAE on fastsae's operators."""

    original = StandardSAE


class FastStandardTrainingSAE(Rectified, FastTraining, StandardTrainingSAE):
    """SAELens' StandardTrainingSAE on fastsae's operators."""

    original = StandardTrainingSAE

    def _why_not(self) -> str:
        if not 0 < self.cfg.lp_norm < math.inf:
            return f"lp_norm = {self.cfg.lp_norm} is not between 0 and inf"
        return super()._why_not()

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        chosen = super()._choose(x, b_dec)
        chosen.W_dec, chosen.norms = with_norms(self.W_dec)
        return chosen

    def _aux_losses(self, chosen: Chosen, step_input: TrainStepInput, sae_out: Tensor) -> dict[str, Tensor]:
        penalty = lp_penalty(chosen.codes, chosen.norms, self.cfg.lp_norm)
        return {"l1_loss": (step_input.coefficients["l1"] * penalty).to(sae_out.dtype)}


class Gated(Fast):
    """Activations 1[gate > 0] · relu(magnitude); both read the same product with W_enc."""

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        rows = self.W_enc.T
        codes, gate = gated(x, rows.T, self.b_gate, self.r_mag, self.b_mag, b_dec)
        return Chosen(x, b_dec, codes, codes, rows, self.W_dec, extra=gate)

    def _sampled_density(self, x: Tensor, b_dec: Tensor | None) -> float:
        return above(x, b_dec, self.W_enc, self.b_gate, 0)


class FastGatedSAE(Gated, GatedSAE):
    """SAELens' GatedSAE on fastsae's operators."""

    original = GatedSAE


class FastGatedTrainingSAE(Gated, FastTraining, GatedTrainingSAE):
    """SAELens' GatedTrainingSAE on fastsae's operators."""

    original = GatedTrainingSAE

    def _why_not(self) -> str:
        # Its auxiliary loss encodes the batch again, without normalisation and hooks.
        if self.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            return f"the gate's own loss does not know normalize_activations = {self.cfg.normalize_activations!r}"
        if self.hook_sae_input._forward_hooks:
            return "the gate's own loss does not know the hook on hook_sae_input"
        return super()._why_not()

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        chosen = super()._choose(x, b_dec)
        chosen.W_dec, chosen.norms = with_norms(self.W_dec)
        return chosen

    def _encoder_parameters(self) -> tuple[Tensor, ...]:
        return self.W_enc, self.r_mag, self.b_mag

    @staticmethod
    def _pre_activations(sae_in: Tensor, W_enc: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
        return sae_in @ (W_enc * r_mag.exp()) + b_mag

    def _aux_losses(self, chosen: Chosen, step_input: TrainStepInput, sae_out: Tensor) -> dict[str, Tensor]:
        gate = chosen.extra
        l1 = step_input.coefficients["l1"] * lp_penalty(gate, chosen.norms)
        error = decode(gate, chosen.W_dec, self.b_dec) - step_input.sae_in
        return {
            "l1_loss": l1.to(sae_out.dtype),
            "auxiliary_reconstruction_loss": error.pow(2).sum(dim=-1).mean(),
        }


def above(x: Tensor, b_dec: Tensor | None, W_enc: Tensor, bias: Tensor, threshold: Tensor | float) -> float:
    """The share of pre-activations of x [n, d_in] above a threshold."""
    if not len(x):
        return 0.0
    centred = x if b_dec is None else x - b_dec
    return (centred @ W_enc + bias > threshold).float().mean().item()
