"""TopK, BatchTopK and Matryoshka SAEs of SAELens."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from torch import Tensor
from torch.nn import functional

from fastsae.codes import SparseCodes
from fastsae.interop.saelens.base import Chosen, Fast, chosen_of
from fastsae.interop.saelens.prefixes import prefix_decodes
from fastsae.interop.saelens.training import FastTraining
from fastsae.ops import decode, encode_batch_topk, encode_topk
from fastsae.saes.decoder_norms import decoder_norms
from fastsae.saes.ragged import at_entries


class _Ranked(Fast):
    """Latents are ranked by pre-activation, or by that times the norm of the decoder row."""

    _activations = (TopK,)

    def _select(self, x: Tensor, encoder_rows: Tensor, b_dec: Tensor | None, scale: Tensor | None) -> SparseCodes:
        k = self.activation_fn.k
        return encode_topk(x, encoder_rows.T, self.b_enc, k, b_dec=b_dec, scale=scale).relu()

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        rows = self.W_enc.T
        if not self.cfg.rescale_acts_by_decoder_norm:
            codes = self._select(x, rows, b_dec, None)
            return Chosen(x, b_dec, codes, codes, rows, self.W_dec)
        norms = decoder_norms(self.W_dec)
        codes = self._select(x, rows, b_dec, norms.detach())
        # Decoding divides by the norms: they cancel, in the gradient too.
        acts = codes.with_values((codes.values * at_entries(norms, codes)).to(codes.dtype))
        return Chosen(x, b_dec, acts, codes, rows, self.W_dec, norms)


class FastTopKSAE(_Ranked, TopKSAE):
    """SAELens' TopKSAE on fastsae's operators."""

    original = TopKSAE


class _RankedTraining(_Ranked, FastTraining):
    def _why_not(self) -> str:
        if self.cfg.use_sparse_activations and self._fast.method != "training_forward_pass":
            return "use_sparse_activations=True returns torch's sparse tensors"
        return super()._why_not()

    def _encoder_parameters(self) -> tuple[Tensor, ...]:
        norms_of = (self.W_dec,) if self.cfg.rescale_acts_by_decoder_norm else ()
        return self.W_enc, self.b_enc, *norms_of

    @staticmethod
    def _pre_activations(sae_in: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor | None = None) -> Tensor:
        pre = sae_in @ W_enc + b_enc
        return pre if W_dec is None else pre * W_dec.norm(dim=-1)

    def _aux_losses(self, chosen: Chosen, step_input: TrainStepInput, sae_out: Tensor) -> dict[str, Tensor]:
        return {"auxiliary_reconstruction_loss": self._auxk(chosen, step_input, sae_out)}

    def _auxk(self, chosen: Chosen, step_input: TrainStepInput, sae_out: Tensor) -> Tensor:
        mask = step_input.dead_neuron_mask
        dead = None if mask is None else mask.nonzero()[:, 0]
        if dead is None or not len(dead):
            return sae_out.new_tensor(0.0)
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            # Its own refusal.
            return self.calculate_topk_aux_loss(step_input.sae_in, sae_out, sae_out, mask)
        residual = (step_input.sae_in - sae_out).detach()
        return self.cfg.aux_loss_coefficient * self._dead_error(chosen, dead, residual)

    def _dead_error(self, chosen: Chosen, dead: Tensor, residual: Tensor) -> Tensor:
        """How far the largest dead latents are from the residual, less where few are dead.

        Weights of the dead are gathered; their gradients are sparse rows that autograd adds to the dense ones.
        """
        most = residual.shape[-1] // 2
        w_enc = functional.embedding(dead, chosen.encoder_rows, sparse=True)
        w_dec = functional.embedding(dead, self.W_dec, sparse=True)
        scale = None if chosen.norms is None else chosen.norms.detach()[dead]
        k = min(most, len(dead))
        codes = encode_topk(chosen.x, w_enc.T, self.b_enc[dead], k, b_dec=chosen.b_dec, scale=scale)
        error = (decode(codes, w_dec) - residual).pow(2).sum(dim=-1).mean()
        return min(len(dead) / most, 1.0) * error


class FastTopKTrainingSAE(_RankedTraining, TopKTrainingSAE):
    """SAELens' TopKTrainingSAE on fastsae's operators."""

    original = TopKTrainingSAE


class _BatchRankedTraining(_RankedTraining):
    _activations = (BatchTopK,)

    def _select(self, x: Tensor, encoder_rows: Tensor, b_dec: Tensor | None, scale: Tensor | None) -> SparseCodes:
        return encode_batch_topk(x, encoder_rows.T, self.b_enc, self.activation_fn.k, b_dec=b_dec, scale=scale)

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """As the library's."""
        chosen = chosen_of(acts_topk)
        if chosen is None:
            super().update_topk_threshold(acts_topk)
            return
        values = chosen.codes.values
        # As the library's, which knows no difference between a batch of activations and a row of them.
        super().update_topk_threshold(values.detach())


class FastBatchTopKTrainingSAE(_BatchRankedTraining, BatchTopKTrainingSAE):
    """SAELens' BatchTopKTrainingSAE on fastsae's operators."""

    original = BatchTopKTrainingSAE


class FastMatryoshkaBatchTopKTrainingSAE(_BatchRankedTraining, MatryoshkaBatchTopKTrainingSAE):
    """SAELens' MatryoshkaBatchTopKTrainingSAE on fastsae's operators."""

    original = MatryoshkaBatchTopKTrainingSAE

    def _decoded(self, chosen: Chosen) -> Tensor:
        if self._fast.method != "training_forward_pass":
            return super()._decoded(chosen)
        # The losses of a step want every level: each latent is decoded once, and W_dec has one gradient.
        chosen.extra = prefix_decodes(chosen.decoded, chosen.W_dec, self.b_dec, self.cfg.matryoshka_widths)
        return chosen.extra[-1]

    def _iterable_decode(self, feature_acts: Tensor, include_outer_loss: bool = False) -> Iterator[tuple[int, Tensor]]:
        chosen = chosen_of(feature_acts)
        if chosen is None or chosen.extra is None:
            yield from super()._iterable_decode(feature_acts, include_outer_loss)
            return
        levels = list(zip(self.cfg.matryoshka_widths, chosen.extra, strict=True))
        for width, y in levels if include_outer_loss else levels[:-1]:
            yield width, self.run_time_activation_norm_fn_out(y)

    def _aux_losses(self, chosen: Chosen, step_input: TrainStepInput, sae_out: Tensor) -> dict[str, Tensor]:
        mask = step_input.dead_neuron_mask
        if not self.cfg.use_matryoshka_aux_loss or mask is None or not mask.any():
            return super()._aux_losses(chosen, step_input, sae_out)
        widths = self.cfg.matryoshka_widths
        losses = []
        for (begin, end), y in zip(pairwise([0, *widths]), chosen.extra, strict=True):
            dead = begin + mask[begin:end].nonzero()[:, 0]
            if len(dead):
                residual = (step_input.sae_in - self.run_time_activation_norm_fn_out(y)).detach()
                losses.append(self._dead_error(chosen, dead, residual))
        return {"auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient * torch.stack(losses).sum()}
