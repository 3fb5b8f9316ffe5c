"""JumpReLU SAEs of SAELens."""

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.nn import functional

from fastsae.interop.saelens.base import Chosen, Fast
from fastsae.interop.saelens.relu import above
from fastsae.interop.saelens.training import FastTraining
from fastsae.ops import encode_threshold
from fastsae.saes.decoder_norms import with_norms
from fastsae.saes.jumprelu import jump, l0_penalty
from fastsae.saes.ragged import at_entries, wide


class Thresholded(Fast):
    """Activations relu(pre) · 1[pre > θ]; θ has no gradient."""

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        rows = self.W_enc.T
        codes = encode_threshold(x, rows.T, self.b_enc, self.threshold.clamp_min(0), b_dec=b_dec)
        return Chosen(x, b_dec, codes, codes, rows, self.W_dec)

    def _sampled_density(self, x: Tensor, b_dec: Tensor | None) -> float:
        return above(x, b_dec, self.W_enc, self.b_enc, self.threshold.clamp_min(0))


class FastJumpReLUSAE(Thresholded, JumpReLUSAE):
    """SAELens' JumpReLUSAE on fastsae's operators."""

    original = JumpReLUSAE


class FastJumpReLUTrainingSAE(FastTraining, JumpReLUTrainingSAE):
    """SAELens' JumpReLUTrainingSAE on fastsae's operators."""

    original = JumpReLUTrainingSAE

    @property
    def _weighs(self) -> bool:
        return self.cfg.jumprelu_sparsity_loss_mode == "tanh" or self.cfg.pre_act_loss_coefficient is not None

    def _why_not(self) -> str:
        if self.cfg.jumprelu_sparsity_loss_mode not in ("step", "quadratic", "tanh"):
            return f"jumprelu_sparsity_loss_mode = {self.cfg.jumprelu_sparsity_loss_mode!r} is not known"
        return super()._why_not()

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        rows = self.W_enc.T
        ste_to_input = self.cfg.jumprelu_ste_to_input
        codes, window = jump(
            x, rows, self.b_enc, b_dec, self.threshold, bandwidth=self.bandwidth, ste_to_input=ste_to_input
        )
        W_dec, norms = with_norms(self.W_dec) if self._weighs else (self.W_dec, None)
        return Chosen(x, b_dec, codes, codes, rows, W_dec, norms, window)

    def _sampled_density(self, x: Tensor, b_dec: Tensor | None) -> float:
        return above(x, b_dec, self.W_enc, self.b_enc, self.threshold - self.bandwidth / 2)

    def _aux_losses(self, chosen: Chosen, step_input: TrainStepInput, sae_out: Tensor) -> dict[str, Tensor]:
        cfg = self.cfg
        mode = cfg.jumprelu_sparsity_loss_mode
        penalty = l0_penalty(
            chosen.extra, chosen.norms, penalty=mode, target_l0=cfg.target_l0, tanh_scale=cfg.jumprelu_tanh_scale
        )
        losses = {"l0_loss": (step_input.coefficients["l0"] * penalty).to(sae_out.dtype)}
        if cfg.pre_act_loss_coefficient is not None:
            loss = self._pre_act(chosen, step_input.dead_neuron_mask)
            losses["pre_act_loss"] = (cfg.pre_act_loss_coefficient * loss).to(sae_out.dtype)
        return losses

    def _pre_act(self, chosen: Chosen, dead_neuron_mask: Tensor | None) -> Tensor:
        """mean_n Σ_{dead f} relu(θ_f - pre_nf) ‖W_dec[f]‖ without pre-activations of every token.

        relu(z) = z + relu(-z): the sum over tokens of the first term needs the mean of x alone, and the second is zero
        but for the active entries, which are at hand.
        """
        dead = None if dead_neuron_mask is None else dead_neuron_mask.nonzero()[:, 0]
        if dead is None or not len(dead) or not chosen.codes.n_tokens:
            return chosen.x.new_tensor(0.0)
        mean = wide(chosen.x).reshape(-1, chosen.x.shape[-1]).mean(dim=0)
        if chosen.b_dec is not None:
            mean = mean - chosen.b_dec
        w_enc = functional.embedding(dead, chosen.encoder_rows, sparse=True)
        pre = wide(w_enc) @ mean + self.b_enc[dead]
        below = ((self.threshold[dead] - pre) * chosen.norms[dead]).sum()
        places = chosen.extra.places
        weights = torch.where(dead_neuron_mask, chosen.norms, 0)
        over = (wide(places.values) - at_entries(self.threshold, places)).relu() * at_entries(weights, places)
        return below + over.sum() / places.n_tokens
