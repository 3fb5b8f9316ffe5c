"""nested_errors: ‖decode(codes[:, :w]) - target‖² of each token for prefixes w; each latent is decoded once."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.decode import check_decoder, decode_op
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.ops.squared_error import squared_error_op
from fastsae.ops.transpose import LatentMajor, transposed

# Latents whose gradient rows, and tokens whose decoded rows, exist twice at one time.
_LATENTS = 1024
_TOKENS = 512


class _Part(NamedTuple):
    """The entries of a batch whose latents lie between two widths."""

    entries: Tensor  # int64: their places among all entries
    indices: Tensor
    offsets: Tensor


def _parts(indices: Tensor, offsets: Tensor | None, widths: Sequence[int], cumulative: bool = False) -> Iterator[_Part]:
    """The entries between one width and the next, or all below each."""
    flat = indices.reshape(-1)
    if offsets is None:
        n_tokens, counts = indices.shape[0], indices.shape[1]
    else:
        n_tokens, counts = offsets.shape[0] - 1, offsets.diff()
    tokens = torch.arange(n_tokens, device=flat.device).repeat_interleave(counts, output_size=flat.numel())
    part_of = torch.bucketize(flat, torch.tensor(widths, device=flat.device, dtype=flat.dtype), right=True)
    for number in range(len(widths)):
        entries = (part_of <= number if cumulative else part_of == number).nonzero()[:, 0]
        sizes = torch.bincount(tokens[entries], minlength=n_tokens)
        yield _Part(entries, flat[entries], torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]))


def _nested_errors(values, indices, offsets, w_dec, b_dec, target, widths):
    """t ← target - b_dec; for each part: t ← t - decode(part), and its squared norms.

    In half precision t would be rounded at every width, and the norms are float32: there each prefix is decoded whole.
    """
    flat, squared = values.reshape(-1), []
    if target.dtype.itemsize < 4:
        for part in _parts(indices, offsets, widths, cumulative=True):
            residual, norms = squared_error_op(flat[part.entries], part.indices, part.offsets, w_dec, b_dec, target)
            squared.append(norms)
        return residual, torch.stack(squared, dim=1)
    left = target if b_dec is None else target - b_dec
    for part in _parts(indices, offsets, widths):
        residual, norms = squared_error_op(flat[part.entries], part.indices, part.offsets, w_dec, None, left)
        left = residual.neg_()
        squared.append(norms)
    return -left, torch.stack(squared, dim=1)


def _nested_errors_backward(grad_squared, values, indices, offsets, w_dec, b_dec, target, widths, needs_w):
    """With S_w = Σ_{v ≥ w} 2 s̄_v r_v, what every entry below w sees: parts from the last to the first.

    The residuals are found again on the way, r_v = r_w - decode(part w) from the whole one on: two [n_tokens, d_out]
    tensors are held, whatever the number of widths.
    """
    residual, _ = squared_error_op(values, indices, offsets, w_dec, b_dec, target)
    flat = values.reshape(-1)
    grad_values = torch.empty_like(flat)
    grad_w = w_dec.new_empty(w_dec.shape) if needs_w else w_dec.new_empty(0, 0)
    scales = (2 * grad_squared).to(residual.dtype)
    seen = torch.zeros_like(residual)
    parts = list(_parts(indices, offsets, widths))
    for number in reversed(range(len(widths))):
        part, begin, end = parts[number], widths[number - 1] if number else 0, widths[number]
        seen = seen.addcmul_(residual, scales[:, number, None])
        grad_values[part.entries] = sampled_dot_op(seen, part.indices, part.offsets, w_dec, None)
        if needs_w:
            latent_major = transposed(indices, offsets, w_dec.shape[0])
            _accumulate(flat, latent_major, begin, end, seen, grad_w)
        if number:
            _subtract_decoded(residual, flat[part.entries], part, w_dec)
    return grad_values.reshape(values.shape), grad_w, seen


def _subtract_decoded(residual: Tensor, values: Tensor, part: _Part, w_dec: Tensor) -> None:
    """residual ← residual - decode(part), some tokens at a time."""
    edges = [*range(0, residual.shape[0], _TOKENS), residual.shape[0]]
    bounds = part.offsets[edges].tolist()
    for (first, last), (low, high) in zip(pairwise(edges), pairwise(bounds), strict=True):
        offsets = part.offsets[first : last + 1] - low
        residual[first:last] -= decode_op(values[low:high], part.indices[low:high], offsets, w_dec, None)


def _accumulate(values: Tensor, by_latent: LatentMajor, begin: int, end: int, g: Tensor, grad_w: Tensor) -> None:
    """Rows `begin` up to `end` of Σ v g, some latents at a time: each result is copied to its place, so it is small."""
    edges = [*range(begin, end, _LATENTS), end]
    bounds = by_latent.latent_offsets[edges].tolist()
    for (first, last), (low, high) in zip(pairwise(edges), pairwise(bounds), strict=True):
        offsets = by_latent.latent_offsets[first : last + 1] - low
        tokens, weights = by_latent.tokens[low:high], values[by_latent.entries[low:high]]
        entries = torch.arange(high - low, device=values.device)
        grad_w[first:last], _ = accumulate_rows_op(weights, offsets, tokens, entries, g, None, None)


def _fake(values, indices, offsets, w_dec, b_dec, target, widths):
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    residual = torch.empty_like(target, memory_format=torch.contiguous_format)
    return residual, target.new_empty(target.shape[0], len(widths), dtype=wide)


def _fake_backward(grad_squared, values, indices, offsets, w_dec, b_dec, target, widths, needs_w):
    grad_w = w_dec.new_empty(w_dec.shape) if needs_w else w_dec.new_empty(0, 0)
    return torch.empty_like(values), grad_w, torch.empty_like(target, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, widths = inputs
    ctx.widths = list(widths)
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, _, grad_squared):
    if grad_squared is None:
        return (None,) * 7
    needs_values, _, _, needs_w, needs_b, needs_target, _ = ctx.needs_input_grad
    grad_values, grad_w, seen = nested_errors_backward_op(grad_squared, *ctx.saved_tensors, ctx.widths, needs_w)
    return (
        grad_values if needs_values else None,
        None,
        None,
        grad_w if needs_w else None,
        seen.sum(dim=0) if needs_b else None,
        -seen if needs_target else None,
        None,
    )


nested_errors_backward_op = define(
    "nested_errors_backward",
    "(Tensor grad_squared, Tensor values, Tensor indices, Tensor? offsets, Tensor w_dec, Tensor? b_dec, "
    "Tensor target, int[] widths, bool needs_w) -> (Tensor, Tensor, Tensor)",
    by="w_dec",
    kernel=_nested_errors_backward,
    fake=_fake_backward,
)

nested_errors_op = define(
    "nested_errors",
    "(Tensor values, Tensor indices, Tensor? offsets, Tensor w_dec, Tensor? b_dec, Tensor target, int[] widths) "
    "-> (Tensor, Tensor)",
    by="w_dec",
    kernel=_nested_errors,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def nested_errors(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, target: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The errors of nested reconstructions: r_w = codes[:, :w] W_dec[:w] + b_dec - target for each width w.

    Each latent is decoded once and every width's error read off on the way; the backward holds two [n_tokens, d_out]
    tensors whatever the number of widths.

    Args:
        codes: of the tokens of `target`.
        W_dec: [d_sae, d_out].
        b_dec: [d_out] or None.
        target: [..., d_out].
        widths: ascending; the last is d_sae.

    Returns:
        r of the whole dictionary [..., d_out] in target's dtype, outside autograd's graph; and ‖r_w‖² [..., widths] in
        float32 (float64 for float64), differentiable in the values, W_dec, b_dec and target.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, widths that fall or do not end at d_sae.

    Source: Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders".
    """
    check_decoder(codes, W_dec, b_dec)
    _check.floating("target", target)
    _check.same_kind("target", target, "W_dec", W_dec)
    if target.shape != (*codes.leading_shape, W_dec.shape[1]):
        expected = (*codes.leading_shape, W_dec.shape[1])
        raise ValueError(f"target has shape {tuple(target.shape)}: expected {expected}, the codes' tokens by d_out")
    widths = [int(width) for width in widths]
    ascending = all(narrow < wide for narrow, wide in zip([0, *widths], widths, strict=False))
    if not widths or not ascending or widths[-1] != codes.d_sae:
        raise ValueError(f"widths = {widths}: expected them ascending from above 0 to d_sae = {codes.d_sae}")
    residual, squared = nested_errors_op(
        codes.values, codes.indices, codes.offsets, W_dec, b_dec, target.reshape(-1, W_dec.shape[1]), widths
    )
    return residual.reshape(target.shape), squared.reshape(*target.shape[:-1], len(widths))
