"""dictionary_learning's trainers, with what they do to [d_in, d_sae] weights in each step in one pass over memory.

Their own `update`, `loss` and auxiliary losses run. What differs is the dictionary (see dictionaries.py), the two
helpers by which `update` keeps decoder columns at unit norm, and the optimizer's step (see optimizers.py).
"""

from collections import namedtuple
from typing import Any, ClassVar

import torch
from dictionary_learning.trainers import trainer as library
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer as LibraryBatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer as LibraryGatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer as LibraryGatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer as LibraryJumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer as LibraryMatryoshkaTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer as LibraryPAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer as LibraryStandardTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate as LibraryAprilTrainer
from dictionary_learning.trainers.top_k import TopKTrainer as LibraryTopKTrainer
from torch import Tensor

from fastsae.interop.dictionary_learning import jumprelu_loss, optimizers
from fastsae.interop.dictionary_learning.dictionaries import DICTIONARIES, NAME, feature_major, in_order, take_over
from fastsae.interop.directions import normalize_, project_
from fastsae.interop.rebound import rebound
from fastsae.interop.record import Record, attach, detach, record_of


def _set_decoder_norm_to_unit_norm(W_dec_DF: Tensor, activation_dim: int, d_sae: int) -> Tensor:
    """The library's, of columns that are rows of memory."""
    rows = W_dec_DF.data.T
    if not rows.is_contiguous() or rows.shape != (d_sae, activation_dim):
        return library.set_decoder_norm_to_unit_norm(W_dec_DF, activation_dim, d_sae)
    normalize_(rows, torch.finfo(rows.dtype).eps)
    return W_dec_DF.data


@torch.no_grad()
def _remove_gradient_parallel_to_decoder_directions(
    W_dec_DF: Tensor, W_dec_DF_grad: Tensor, activation_dim: int, d_sae: int
) -> Tensor:
    """The library's, of columns that are rows of memory."""
    rows, grad = W_dec_DF.T, W_dec_DF_grad.T
    if not (rows.is_contiguous() and grad.is_contiguous()) or rows.shape != (d_sae, activation_dim):
        theirs = library.remove_gradient_parallel_to_decoder_directions
        return theirs(W_dec_DF, W_dec_DF_grad, activation_dim, d_sae)
    project_(grad, rows, eps=1e-6)
    return W_dec_DF_grad


_HELPERS = {
    "set_decoder_norm_to_unit_norm": _set_decoder_norm_to_unit_norm,
    "remove_gradient_parallel_to_decoder_directions": _remove_gradient_parallel_to_decoder_directions,
}


class _Trainer(library.SAETrainer):
    """Mixed in before a trainer of the library."""

    original: ClassVar[type]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        accelerate(self)

    def update(self, step: int, x: Tensor) -> Any:
        """The library's."""
        record = record_of(self)
        if record is None:
            # A class derived from this one, restored.
            return self._update(step, x)
        if in_order(self.ae):
            record.took_fastsae("update")
        else:
            reason = "weights lie in the library's memory order (fastsae.restore and fastsae.accelerate change it)"
            record.took_original("update", reason)
        return self._update(step, x)

    def _update(self, step: int, x: Tensor) -> Any:
        return super().update(step, x)


class TopKTrainer(_Trainer, LibraryTopKTrainer):
    """The library's TopKTrainer."""

    original = LibraryTopKTrainer
    _update = rebound(LibraryTopKTrainer.update, **_HELPERS)


class BatchTopKTrainer(_Trainer, LibraryBatchTopKTrainer):
    """The library's BatchTopKTrainer."""

    original = LibraryBatchTopKTrainer
    _update = rebound(LibraryBatchTopKTrainer.update, **_HELPERS)


class MatryoshkaBatchTopKTrainer(_Trainer, LibraryMatryoshkaTrainer):
    """The library's MatryoshkaBatchTopKTrainer."""

    original = LibraryMatryoshkaTrainer
    _update = rebound(LibraryMatryoshkaTrainer.update, **_HELPERS)


class JumpReluTrainer(_Trainer, LibraryJumpReluTrainer):
    """The library's JumpReluTrainer; its loss, which encodes without its dictionary, is written anew."""

    original = LibraryJumpReluTrainer
    _update = rebound(LibraryJumpReluTrainer.update, **_HELPERS)

    def loss(self, x: Tensor, step: int, logging: bool = False, **options: Any) -> Any:
        record, ae = record_of(self), self.ae
        reason = ae._theirs(x.to(ae.W_enc.dtype), ae.threshold.detach() - self.bandwidth / 2)
        if not reason and (ae.W_enc.dtype != torch.float32 or x.dim() != 2):
            reason = "not float32 activations [n_tokens, d_in]"
        if reason:
            record.took_original("loss", reason)
            return super().loss(x, step, logging, **options)
        record.took_fastsae("loss")
        sparsity_scale = self.sparsity_warmup_fn(step)
        x = x.to(ae.W_enc.dtype)
        f, l0 = jumprelu_loss.encode(x, ae.W_enc, ae.b_enc, ae.threshold, self.bandwidth)

        self.num_tokens_since_fired += x.size(0)
        self.num_tokens_since_fired[f.sum(0) > 0] = 0
        self.dead_features = (self.num_tokens_since_fired > self.dead_feature_threshold).sum().item()

        recon = ae.decode(f)
        recon_loss = (x - recon).pow(2).sum(dim=-1).mean()
        sparsity_loss = self.sparsity_coefficient * ((l0 / self.target_l0) - 1).pow(2) * sparsity_scale
        loss = recon_loss + sparsity_loss
        if not logging:
            return loss
        losses = {"l2_loss": recon_loss.item(), "loss": loss.item()}
        return namedtuple("LossLog", ["x", "recon", "f", "losses"])(x, recon, f, losses)


class StandardTrainer(_Trainer, LibraryStandardTrainer):
    """The library's StandardTrainer."""

    original = LibraryStandardTrainer


class StandardTrainerAprilUpdate(_Trainer, LibraryAprilTrainer):
    """The library's StandardTrainerAprilUpdate."""

    original = LibraryAprilTrainer


class PAnnealTrainer(_Trainer, LibraryPAnnealTrainer):
    """The library's PAnnealTrainer."""

    original = LibraryPAnnealTrainer


class GatedSAETrainer(_Trainer, LibraryGatedSAETrainer):
    """The library's GatedSAETrainer."""

    original = LibraryGatedSAETrainer


class GatedAnnealTrainer(_Trainer, LibraryGatedAnnealTrainer):
    """The library's GatedAnnealTrainer."""

    original = LibraryGatedAnnealTrainer


TRAINERS: dict[type, type] = {
    drop_in.original: drop_in
    for drop_in in (
        BatchTopKTrainer,
        GatedAnnealTrainer,
        GatedSAETrainer,
        JumpReluTrainer,
        MatryoshkaBatchTopKTrainer,
        PAnnealTrainer,
        StandardTrainer,
        StandardTrainerAprilUpdate,
        TopKTrainer,
    )
}


def accelerate(trainer: library.SAETrainer) -> None:
    """Gives a trainer of the library, or one of the drop-ins above, fastsae's dictionary, update and optimizer step."""
    kind, ae = type(trainer), trainer.ae
    if type(ae) in DICTIONARIES:
        ae.__class__ = DICTIONARIES[type(ae)]
        take_over(ae)
    drop_in = next((one for one in TRAINERS.values() if kind is one.original or issubclass(kind, one)), None)
    # Of a class derived from a drop-in there is no other to give back.
    original = kind if drop_in is None or kind not in (drop_in, drop_in.original) else drop_in.original
    reason = None
    if drop_in is None:
        reason = f"{kind.__module__}.{kind.__qualname__} is not one of the library's trainers"
    elif not isinstance(ae, tuple(DICTIONARIES.values())):
        reason = f"its dictionary is a {type(ae).__module__}.{type(ae).__qualname__}, not one of the library's"
        trainer.__class__ = original
    else:
        trainer.__class__ = drop_in if original is drop_in.original else kind
        if type(trainer.optimizer) in (torch.optim.Adam, library.ConstrainedAdam):
            optimizers.take_over(trainer.optimizer, feature_major(ae))
    attach(trainer, Record(NAME, original, why_not=reason))


def restore(trainer: library.SAETrainer) -> None:
    """Undoes `accelerate`, but for the memory order of the weights."""
    record = record_of(trainer)
    if record.why_not is None:
        trainer.__class__ = record.original
        if optimizers.is_taken_over(trainer.optimizer):
            optimizers.give_back(trainer.optimizer)
    detach(trainer)
