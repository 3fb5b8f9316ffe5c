"""dictionary_learning's dictionaries with fastsae's encoders.

Each class derives from the library's own, and is what `fastsae.accelerate` gives a dictionary for its class, or what a
trainer takes as `dict_class`. Only `encode` differs. It returns `Activations`, to everybody a dense tensor [..., d_sae]
as before, which the library's own `decode`, `forward`, losses and log work on by its codes; pre-activations come as
`PreActivations`, which the auxiliary losses ask for the largest of the dead latents.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from dictionary_learning import dictionary as library
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE as LibraryBatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE as LibraryMatryoshka
from dictionary_learning.trainers.top_k import AutoEncoderTopK as LibraryTopK
from torch import Tensor, nn

from fastsae.codes import SparseCodes
from fastsae.interop.activations import Activations
from fastsae.interop.deferred import Deferred
from fastsae.interop.pre_activations import PreActivations
from fastsae.interop.record import Record, attach, record_of
from fastsae.interop.served import as_autocast, why_not
from fastsae.ops import encode_threshold, encode_topk
from fastsae.ops.encode_batch_topk import encode_batch_topk_op
from fastsae.saes.ragged import at_entries, wide

NAME = "dictionary_learning"
# A ReLU, JumpReLU or Gated dictionary may have half of its latents active, most of all before it has learnt anything.
# Forward and backward of StandardTrainer at D = 768, F = 24,576 and 1,024 tokens on one core took 0.13 of the library's
# time with 1 % of the latents active, 0.43 with 4 %, 0.9 with 8 and 12 %, and 1.2 with 16 to 50 %.
MOST_DENSE = 0.12
# Tokens that are looked at to find out.
_SAMPLE = 32


class _Dictionary(library.Dictionary):
    """Mixed in before a class of the library. (Python lets an object change only to a class of the same bases.)"""

    original: ClassVar[type]
    _op: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        take_over(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The library's `from_pretrained`, and fastsae's encoder."""
        sae = cls.original.from_pretrained(*args, **kwargs)
        sae.__class__ = cls
        return take_over(sae)

    def _encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """rows [d_sae, d_in], b_enc, and what is subtracted from x."""
        raise NotImplementedError

    def _theirs(self, x: Any, threshold: Tensor | float | None = None) -> str:
        """Why a call of `encode` is the library's; with a threshold, too many latents above it are a reason."""
        rows, b_enc, b_dec = self._encoder()
        reason = why_not(self._op, x, rows, rows.shape[1], promotes=b_dec is not None)
        if reason or threshold is None:
            return reason
        share = _share_above(x, rows, b_enc, b_dec, threshold)
        return f"{share:.0%} of the latents are active: dense products are faster" if share > MOST_DENSE else ""

    def _noted(self, asked_by: str) -> None:
        record = record_of(self)
        if record is not None:
            record.took_original("activations", f"made dense for {asked_by}")

    def _activations(self, codes: SparseCodes) -> Activations:
        record_of(self).took_fastsae("encode")
        return Activations(codes.with_values(as_autocast(codes.values)), self._noted)

    def _pre_activations(self, x: Tensor) -> PreActivations:
        rows, b_enc, b_dec = self._encoder()
        return PreActivations(x.to(rows.dtype), rows, b_enc, b_dec, noted=self._noted)


def take_over(sae: Any) -> Any:
    """Puts a record on a dictionary of one of these classes, and its weights in the memory order of the kernels."""
    attach(sae, Record(NAME, type(sae).original))
    for parameter in feature_major(sae):
        # The same Parameter of the same shape; a view of it is what the kernels take.
        parameter.data = parameter.data.T.contiguous().T
    encoder = getattr(sae, "encoder", None)
    if encoder is not None:
        encoder.weight.data = encoder.weight.data.contiguous()
    return sae


def feature_major(sae: Any) -> list[nn.Parameter]:
    """The weights [d_in, d_sae] whose transposes are wanted contiguous: a latent's direction is one row of memory."""
    return [sae.decoder.weight] if hasattr(sae, "decoder") else [sae.W_enc]


def in_order(sae: Any) -> bool:
    """Whether its weights lie in memory as the kernels take them; else each call copies them."""
    encoder = getattr(sae, "encoder", None)
    rows = [p.T for p in feature_major(sae)] + ([sae.W_dec] if encoder is None else [encoder.weight])
    return all(matrix.is_contiguous() for matrix in rows)


@torch.no_grad()
def _share_above(
    x: Tensor, rows: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor | float
) -> float:
    """The share of latents above their threshold in a few tokens of x."""
    flat = x.reshape(-1, x.shape[-1])
    some = flat[:: max(1, flat.shape[0] // _SAMPLE)][:_SAMPLE].to(rows.dtype)
    if not some.shape[0]:
        return 0.0
    pre = nn.functional.linear(some if b_dec is None else some - b_dec, rows, b_enc)
    return float((pre > threshold).float().mean())


def _positive(threshold: Tensor) -> Tensor:
    """relu(pre) > θ is pre > max(θ, 0), for what is kept is above zero."""
    return threshold.detach().clamp_min(0)


class _Linear(_Dictionary):
    """encoder and decoder are nn.Linear; b_dec is subtracted from x."""

    def _encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.encoder.weight, self.encoder.bias, self.b_dec


class _BatchTopK(_Dictionary):
    """What BatchTopKSAE and MatryoshkaBatchTopKSAE share."""

    _op = "encode_batch_topk"

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        rows, b_enc, b_dec = self._encoder()
        threshold = _positive(self.threshold) if use_threshold else None
        reason = self._theirs(x, threshold) or self._unusual(x)
        if reason:
            record_of(self).took_original("encode", reason)
            return super().encode(x, return_active, use_threshold)
        x = x.to(rows.dtype)
        if use_threshold:
            codes = encode_threshold(x, rows.T, b_enc, float(threshold), b_dec=b_dec)
        else:
            flat, count = x.reshape(-1, x.shape[-1]), int(self.k) * x.shape[0]
            parts = encode_batch_topk_op(flat, rows, b_enc, b_dec, count, None)
            codes = SparseCodes._trusted(*parts, rows.shape[0], x.shape[:-1])
        f = self._activations(self._in_use(codes))
        return (f, f.sum(0) > 0, self._pre_activations(x)) if return_active else f

    def _unusual(self, x: Tensor) -> str:
        return ""

    def _in_use(self, codes: SparseCodes) -> SparseCodes:
        return codes


class AutoEncoderTopK(_Linear, LibraryTopK):
    """The library's AutoEncoderTopK: the k largest of relu(pre) of each token.

    A token with fewer than k positive pre-activations names some latents with activation 0. Which ones is arbitrary in
    the library; here the first ones.
    """

    original = LibraryTopK
    _op = "encode_topk"

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        rows, b_enc, b_dec = self._encoder()
        threshold = _positive(self.threshold) if use_threshold else None
        reason = self._theirs(x, threshold)
        if reason:
            record_of(self).took_original("encode", reason)
            return super().encode(x, return_topk, use_threshold)
        x = x.to(rows.dtype)
        codes = top = None
        if return_topk or not use_threshold:
            top = encode_topk(x, rows.T, b_enc, int(self.k), b_dec=b_dec, relu_first=True)
        if use_threshold:
            codes = encode_threshold(x, rows.T, b_enc, float(threshold), b_dec=b_dec)
        f = self._activations(top if codes is None else codes)
        if not return_topk:
            return f
        shape = (*x.shape[:-1], top.k)
        values = as_autocast(top.values) if use_threshold else f.codes.values
        return f, values.reshape(shape), top.indices.long().reshape(shape), self._pre_activations(x)


class BatchTopKSAE(_BatchTopK, _Linear, LibraryBatchTopKSAE):
    """The library's BatchTopKSAE: the k · x.size(0) largest of relu(pre) over the batch, or those above a threshold."""

    original = LibraryBatchTopKSAE


class MatryoshkaBatchTopKSAE(_BatchTopK, LibraryMatryoshka):
    """The library's MatryoshkaBatchTopKSAE: as BatchTopKSAE, without the latents of groups that are not active."""

    original = LibraryMatryoshka

    def _encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.W_enc.T, self.b_enc, self.b_dec

    def _unusual(self, x: Tensor) -> str:
        # Then `encoded[:, n:] = 0` cuts off places of the second dimension.
        return "an input that is not [n_tokens, d_in]" if x.dim() != 2 else ""

    def _in_use(self, codes: SparseCodes) -> SparseCodes:
        width = int(self.group_indices[self.active_groups])
        if width == codes.d_sae:
            return codes
        kept = codes.indices < width
        counts = torch.bincount(codes.tokens()[kept], minlength=codes.n_tokens)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        parts = codes.values[kept], codes.indices[kept], offsets
        return SparseCodes._trusted(*parts, codes.d_sae, codes.leading_shape)


class AutoEncoder(_Dictionary, library.AutoEncoder):
    """The library's AutoEncoder: relu((x - bias) W_enc + b_enc)."""

    original = library.AutoEncoder
    _op = "encode_threshold"

    def _encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.encoder.weight, self.encoder.bias, self.bias

    def encode(self, x: Tensor) -> Tensor:
        return _relu(self, x, super().encode)

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None) -> Any:
        if ghost_mask is not None:
            record_of(self).took_original("forward", "ghost gradients take the exponential of every pre-activation")
        return super().forward(x, output_features, ghost_mask)


class AutoEncoderNew(_Dictionary, library.AutoEncoderNew):
    """The library's AutoEncoderNew: relu(x W_enc + b_enc)."""

    original = library.AutoEncoderNew
    _op = "encode_threshold"

    def _encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.encoder.weight, self.encoder.bias, None

    def encode(self, x: Tensor) -> Tensor:
        return _relu(self, x, super().encode)


def _relu(sae: _Dictionary, x: Tensor, theirs: Callable[[Tensor], Tensor]) -> Tensor:
    rows, b_enc, b_dec = sae._encoder()
    reason = sae._theirs(x, 0.0)
    if reason:
        record_of(sae).took_original("encode", reason)
        return theirs(x)
    return sae._activations(encode_threshold(x.to(rows.dtype), rows.T, b_enc, b_dec=b_dec))


class GatedAutoEncoder(_Dictionary, library.GatedAutoEncoder):
    """The library's GatedAutoEncoder: 1[p + gate_bias > 0] · relu(exp(r_mag) p + mag_bias), p = (x - b) W_enc."""

    original = library.GatedAutoEncoder
    _op = "encode_threshold"

    def _encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.encoder.weight, None, self.decoder_bias

    def encode(self, x: Tensor, return_gate: bool = False, normalize_decoder: bool = False) -> Any:
        rows, _, b_dec = self._encoder()
        # <x - b, w> + g > 0 if and only if <x - b, w> > -g, in floating point too.
        threshold = -self.gate_bias.detach()
        reason = self._theirs(x, threshold)
        if reason:
            record_of(self).took_original("encode", reason)
            return super().encode(x, return_gate, normalize_decoder)
        places = encode_threshold(x.to(rows.dtype), rows.T, None, threshold, b_dec=b_dec)
        products = wide(places.values)
        gate_bias, r_mag, mag_bias = (at_entries(wide(p), places) for p in (self.gate_bias, self.r_mag, self.mag_bias))
        magnitude = (products * r_mag.exp() + mag_bias).relu().to(rows.dtype)
        f = self._activations(places.with_values(magnitude))
        if normalize_decoder:
            f = f * self.decoder.weight.norm(dim=0, keepdim=True)
        if not return_gate:
            return f
        gate = as_autocast((products + gate_bias).relu().to(rows.dtype))
        return f, Activations(places.with_values(gate), self._noted)


class JumpReluAutoEncoder(_Dictionary, library.JumpReluAutoEncoder):
    """The library's JumpReluAutoEncoder: relu(pre · 1[pre > threshold])."""

    original = library.JumpReluAutoEncoder
    _op = "encode_threshold"

    def _encoder(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.W_enc.T, self.b_enc, self.b_dec if self.apply_b_dec_to_input else None

    def encode(self, x: Tensor, output_pre_jump: bool = False) -> Any:
        rows, b_enc, b_dec = self._encoder()
        threshold = _positive(self.threshold)
        reason = self._theirs(x, threshold)
        if reason:
            record_of(self).took_original("encode", reason)
            return super().encode(x, output_pre_jump)
        x = x.to(rows.dtype)
        f = self._activations(encode_threshold(x, rows.T, b_enc, threshold, b_dec=b_dec))
        if not output_pre_jump:
            return f

        def pre_jump() -> Tensor:
            return (x if b_dec is None else x - b_dec) @ rows.T + b_enc

        sources = [t for t in (x, rows, b_enc, b_dec) if t is not None]
        shape, kind = f.codes.shape, {"dtype": f.codes.dtype, "device": f.codes.device}
        return f, Deferred(pre_jump, shape, **kind, noted=self._noted, sources=sources)


DICTIONARIES: dict[type, type] = {
    drop_in.original: drop_in
    for drop_in in (
        AutoEncoder,
        AutoEncoderNew,
        AutoEncoderTopK,
        BatchTopKSAE,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
        MatryoshkaBatchTopKSAE,
    )
}
