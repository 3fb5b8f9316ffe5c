"""sparsify's SparseCoder on fastsae's operators.

`fastsae.accelerate` gives a coder (or every coder of a Trainer) a class that derives from SparseCoder. The library's
own `forward` and `decode` run, with fastsae's sparse product in place of theirs; `encode` selects without a [N, F]
tensor; and pre-activations are `PreActivations`, which AuxK and Multi-TopK ask for a few of the largest.

The library's encoder drops gradients (1.3.3, fused_encoder.py): nothing reaches it from pre-activations, so AuxK and
Multi-TopK train the decoder alone; and a latent that is kept with activation 0 learns as if ReLU had not cut it. By
default both stay as they are; `fastsae.accelerate(coder, fix_gradients=True)` gives the gradients of the formulas.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import SparseCoder
from sparsify.trainer import Trainer
from torch import Tensor, nn

from fastsae.interop import schedule_free
from fastsae.interop.directions import normalize_, project_
from fastsae.interop.places import values_at
from fastsae.interop.pre_activations import PreActivations
from fastsae.interop.rebound import rebound
from fastsae.interop.record import Record, attach, detach, record_of
from fastsae.interop.served import as_autocast, why_not
from fastsae.ops.decode import decode_op
from fastsae.ops.encode import encode_topk_op
from fastsae.ops.encode_groupmax import encode_groupmax_op

NAME = "sparsify"
_FIXES, _BEFORE = "_fastsae_fixes_gradients", "_fastsae_undo"
# Multi-TopK reads out so many times k.
_MULTI_K = 4


def _decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """In place of sparsify.utils.decoder_impl; W_dec is [d_in, d_sae]."""
    return decode_op(top_acts, top_indices.int(), None, W_dec.mT, None)


class FastSparseCoder(SparseCoder):
    """sparsify's SparseCoder with fastsae's encoder and products.

    A token with fewer than k positive pre-activations names some latents with activation 0. Which ones is arbitrary in
    the library; here the first ones (of a group, for GroupMax).
    """

    # As its own is decorated.
    forward = torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_bf16_supported())(
        rebound(inspect.unwrap(SparseCoder.forward), decoder_impl=_decoder_impl)
    )
    _decode = rebound(SparseCoder.decode, decoder_impl=_decoder_impl)

    def _theirs(self, x: Tensor) -> str:
        """Why a call of `encode` is the library's."""
        cfg, rows = self.cfg, self.encoder.weight
        if cfg.activation not in ("topk", "groupmax") or not 1 <= cfg.k <= self.num_latents:
            return "an activation or a k that the library refuses"
        if cfg.activation == "groupmax" and (x.dim() != 2 or self.num_latents % cfg.k):
            return "GroupMax with an input that is not [n_tokens, d_in], or a k that does not divide num_latents"
        return why_not(f"encode_{cfg.activation}", x, rows, self.d_in, promotes=not cfg.transcode)

    @torch.no_grad()
    def _select(self, x: Tensor, b_dec: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of relu(pre) of each row of x, in the order of their values; or of each of k groups."""
        rows, b_enc = self.encoder.weight, self.encoder.bias
        if self.cfg.activation == "groupmax":
            return encode_groupmax_op(x, rows, b_enc, b_dec, k)
        return encode_topk_op(x, rows, b_enc, b_dec, k, True)

    def encode(self, x: Tensor) -> EncoderOutput:
        """The library's `encode`; `pre_acts` is computed only if somebody reads it."""
        record, cfg = record_of(self), self.cfg
        reason = self._theirs(x)
        if reason:
            record.took_original("encode", reason)
            return super().encode(x)
        record.took_fastsae("encode")
        rows, b_enc = self.encoder.weight, self.encoder.bias
        b_dec = None if cfg.transcode else self.b_dec
        x, fixes, k = x.to(rows.dtype), self.__dict__[_FIXES], int(cfg.k)
        flat, more = x.reshape(-1, self.d_in), None
        if cfg.multi_topk and cfg.activation == "topk" and _MULTI_K * k <= self.num_latents:
            # One selection serves both.
            more = self._select(flat, b_dec, _MULTI_K * k)
            values, indices = more[0][:, :k], more[1][:, :k]
        else:
            values, indices = self._select(flat, b_dec, k)
        if torch.is_grad_enabled():
            values = values_at(flat, rows, b_enc, b_dec, values, indices, masks_zeros=fixes)

        def noted(asked_by: str) -> None:
            record.took_original("pre_acts", f"made dense for {asked_by}")

        pre_acts = PreActivations(x, rows, b_enc, b_dec, learns=fixes, noted=noted, selected=more)
        shape = (*x.shape[:-1], k)
        return EncoderOutput(as_autocast(values).reshape(shape), indices.long().reshape(shape), pre_acts)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        record, reason = record_of(self), "codes that are not [n_tokens, k]"
        if self.W_dec is not None and top_acts.dim() == 2 and top_indices.shape == top_acts.shape:
            reason = why_not("decode", top_acts.to(self.dtype), self.W_dec, top_acts.shape[1])
        if reason:
            record.took_original("decode", reason)
            return super().decode(top_acts, top_indices)
        record.took_fastsae("decode")
        return self._decode(top_acts, top_indices)

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        """The library's, in blocks of latents."""
        assert self.W_dec is not None, "Decoder weight was not initialized."
        normalize_(self.W_dec.data, torch.finfo(self.W_dec.dtype).eps)

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """The library's, in blocks of latents."""
        assert self.W_dec is not None, "Decoder weight was not initialized."
        assert self.W_dec.grad is not None
        project_(self.W_dec.grad, self.W_dec.data, eps=None)


def saes_in(obj: object) -> list:
    """The coders that obj is or holds; of a Trainer its coders and the Trainer itself, whose optimizers are mended."""
    if isinstance(obj, Trainer):
        return [*(sae for sae in obj.saes.values() if isinstance(sae, SparseCoder)), obj]
    modules = obj.modules() if isinstance(obj, nn.Module) else ()
    return [module for module in modules if isinstance(module, SparseCoder)]


def accelerate(sae: SparseCoder | Trainer, *, fix_gradients: bool = False) -> None:
    """Gives a coder fastsae's class in place of its own; `fix_gradients` as the module's docstring says.

    Of a Trainer the optimizers: `signum` goes through memory once a step (see fastsae.interop.schedule_free), and
    torch's Adam, on a CPU, by its fused kernel.
    """
    kind = type(sae)
    if isinstance(sae, Trainer):
        attach(sae, Record(NAME, kind))
        sae.__dict__[_BEFORE] = [_take_over(optimizer, record_of(sae)) for optimizer in sae.optimizers]
        return
    if kind is not SparseCoder:
        reason = f"{kind.__module__}.{kind.__qualname__} is not sparsify's own SparseCoder"
        attach(sae, Record(NAME, kind, why_not=reason))
        return
    attach(sae, Record(NAME, kind))
    sae.__dict__[_FIXES] = fix_gradients
    sae.__class__ = FastSparseCoder


def restore(sae: SparseCoder | Trainer) -> None:
    """Gives it its own class back."""
    if isinstance(sae, Trainer):
        for undo in sae.__dict__.pop(_BEFORE):
            undo()
        detach(sae)
        return
    sae.__class__ = record_of(sae).original
    sae.__dict__.pop(_FIXES, None)
    detach(sae)


def _take_over(optimizer: Any, record: Record) -> Callable[[], None]:
    """Makes one of a Trainer's optimizers step faster, if it is one that is known; returns what undoes it."""
    name = type(optimizer).__name__
    if schedule_free.serves(optimizer):

        def step() -> None:
            record.took_fastsae("optimizer.step")
            schedule_free.step(optimizer)

        optimizer.step = step
        return lambda: optimizer.__dict__.pop("step")
    if type(optimizer) is torch.optim.Adam and all(_on_cpu(group) for group in optimizer.param_groups):
        before = [group["fused"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["fused"] = True

        def undo() -> None:
            for group, fused in zip(optimizer.param_groups, before, strict=True):
                group["fused"] = fused

        return undo
    record.took_original("optimizer.step", f"{name} is none that fastsae has another step for")
    return lambda: None


def _on_cpu(group: dict) -> bool:
    is_plain = not (group["foreach"] or group["differentiable"])
    return is_plain and all(p.device.type == "cpu" and p.is_contiguous() for p in group["params"])
