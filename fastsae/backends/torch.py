"""Plain PyTorch: serves every device and dtype, and every machine without the native library.

The same results as fastsae.reference in memory that does not grow with n_tokens · k · d: a gather of weighted rows is
`embedding_bag`, and what has no such operator goes by blocks.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastsae import reference
from fastsae.backends.largest import LargestOfBatch
from fastsae.reference.encode import preactivations
from fastsae.reference.precision import tokens_of, widen

fused_update = reference.fused_update
gradient_norm = reference.gradient_norm
normalize_rows_ = reference.normalize_rows_
project_rows_ = reference.project_rows_
stochastic_rounding = reference.stochastic_rounding
transpose = reference.transpose

# Blocks hold at most this many elements: 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24
# Entries of a latent are summed this many at a time, as the native code does.
_BLOCK_ENTRIES = 64


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run `op`, or an empty string."""
    return ""


def encode_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    relu_first: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As reference.encode_topk, by blocks of rows and by selection where the reference sorts."""
    n_tokens, d_sae = x.shape[0], w_enc.shape[0]
    values = x.new_empty(n_tokens, k)
    indices = torch.empty(n_tokens, k, dtype=torch.int32, device=x.device)
    rows = max(1, _BLOCK_ELEMENTS // d_sae)
    for start in range(0, n_tokens, rows):
        block = slice(start, start + rows)
        pre = preactivations(x[block], w_enc, b_enc, b_dec)
        rank = pre if scale is None else pre * scale
        if relu_first:
            rank, pre = rank.relu(), pre.where(~(rank <= 0), 0)
        chosen = topk_indices(rank, k)
        values[block] = pre.gather(1, chosen).to(x.dtype)
        indices[block] = chosen.int()
    return values, indices


def encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.encode_threshold, by blocks of rows."""
    rows = max(1, _BLOCK_ELEMENTS // w_enc.shape[0])
    blocks = [
        reference.encode_threshold(x[start : start + rows], w_enc, b_enc, b_dec, threshold)
        for start in range(0, max(1, x.shape[0]), rows)
    ]
    values, indices, offsets = zip(*blocks, strict=True)
    counts = torch.cat([part.diff() for part in offsets])
    return torch.cat(values), torch.cat(indices), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def encode_groupmax(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """As reference.encode_groupmax, by blocks of rows and with one product for all groups."""
    n_tokens, d_sae = x.shape[0], w_enc.shape[0]
    values = x.new_empty(n_tokens, k)
    indices = torch.empty(n_tokens, k, dtype=torch.int32, device=x.device)
    first = torch.arange(k, device=x.device) * (d_sae // k)
    rows = max(1, _BLOCK_ELEMENTS // d_sae)
    for start in range(0, n_tokens, rows):
        block = slice(start, start + rows)
        groups = preactivations(x[block], w_enc, b_enc, b_dec).relu().unflatten(1, (k, -1))
        best = topk_indices(groups.flatten(0, 1), 1).reshape(-1, k)
        values[block] = groups.gather(2, best[..., None])[..., 0].to(x.dtype)
        indices[block] = (best + first).int()
    return values, indices


def encode_batch_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k_total: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.encode_batch_topk, by blocks of rows, dropping what cannot be among the largest any more."""
    rows = max(1, _BLOCK_ELEMENTS // w_enc.shape[0])
    largest = LargestOfBatch(k_total)
    for start in range(0, x.shape[0], rows):
        pre = preactivations(x[start : start + rows], w_enc, b_enc, b_dec)
        rank = pre if scale is None else pre * scale
        tokens, latents = (~(rank <= largest.floor)).nonzero(as_tuple=True)
        largest.add((tokens + start).int(), latents.int(), pre[tokens, latents], rank[tokens, latents])
    return largest.result(x)


def topk_indices(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row by (value, then lower index), NaN above all; int64 [n, k].

    `torch.topk` leaves open which of equal values it takes. Where the k-th value is above the next one there is no
    choice; the other rows are settled by their threshold.
    """
    values, indices = pre.topk(min(k + 1, pre.shape[1]), dim=1)
    if k < pre.shape[1]:
        settled = (values[:, k - 1] > values[:, k]) | (values[:, k - 1].isnan() & ~values[:, k].isnan())
        indices = indices[:, :k]
        open_rows = (~settled).nonzero()[:, 0]
        if len(open_rows):
            indices[open_rows] = _lowest_of_tied(pre[open_rows], values[open_rows, k - 1 : k], k)
    indices = indices.sort(dim=1).values
    order = pre.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)


def _lowest_of_tied(pre: Tensor, threshold: Tensor, k: int) -> Tensor:
    """What lies above the k-th value is in; of what equals it the lowest indices fill the places left."""
    above = (pre > threshold) | (pre.isnan() & ~threshold.isnan())
    tied = (pre == threshold) | (pre.isnan() & threshold.isnan())
    places = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1) <= places))
    return chosen.nonzero()[:, 1].reshape(-1, k)


def _weighted_rows(rows: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """out[b] = Σ_{e in bag b} weights[e] · rows[indices[e]]; bag b owns offsets[b] up to offsets[b + 1]."""
    if indices.numel() == 0:
        return rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    return functional.embedding_bag(
        indices.to(offsets.dtype),
        # embedding_bag sums in another order where rows are not contiguous.
        rows.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def _offsets_of(indices: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is not None:
        return offsets
    n_tokens, k = indices.shape
    return torch.arange(n_tokens + 1, device=indices.device) * k


def decode(values: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """As reference.decode."""
    flat = widen(values).reshape(-1)
    y = _weighted_rows(widen(w_dec), indices.reshape(-1), flat, _offsets_of(indices, offsets))
    return (y if b_dec is None else y + widen(b_dec)).to(w_dec.dtype)


def squared_error(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """As reference.squared_error."""
    residual = decode(widen(values), indices, offsets, widen(w_dec), widen(b_dec)) - widen(target)
    return residual.to(target.dtype), residual.square().sum(dim=1)


def sampled_dot(g: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, row_scale: Tensor | None) -> Tensor:
    """As reference.sampled_dot, by blocks of entries."""
    flat, tokens = indices.reshape(-1).long(), tokens_of(indices, offsets)
    dots = torch.empty(flat.numel(), dtype=widen(g[:0]).dtype, device=g.device)
    entries = max(1, _BLOCK_ELEMENTS // max(1, g.shape[1]))
    for start in range(0, flat.numel(), entries):
        block = slice(start, start + entries)
        dots[block] = (widen(g[tokens[block]]) * widen(w_dec[flat[block]])).sum(dim=1)
    if row_scale is not None:
        dots = dots * row_scale[tokens]
    return dots.reshape(indices.shape).to(g.dtype)


def accumulate_rows(
    values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    shift: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As reference.accumulate_rows, the entries of a latent in blocks whose sums are then added.

    One chain of thousands of additions would lose the accuracy that a GEMM keeps.
    """
    counts = latent_offsets.diff()
    blocks = (counts + _BLOCK_ENTRIES - 1) // _BLOCK_ENTRIES
    latents = torch.arange(counts.numel(), device=g.device).repeat_interleave(blocks)
    place = torch.arange(latents.numel(), device=g.device) - (blocks.cumsum(0) - blocks)[latents]
    block_offsets = torch.cat([latent_offsets[latents] + place * _BLOCK_ENTRIES, latent_offsets[-1:]])

    weights = widen(values).reshape(-1)[entries]
    if row_scale is not None:
        weights = weights * row_scale[tokens.long()]
    shifted = widen(g) if shift is None else widen(g) - widen(shift)
    rows = _weighted_rows(shifted, tokens, weights, block_offsets)
    ones = torch.ones(shifted.shape[0], 1, dtype=shifted.dtype, device=g.device)
    sums = _weighted_rows(ones, tokens, weights, block_offsets)
    out = rows.new_zeros(counts.numel(), g.shape[1]).index_add(0, latents, rows)
    value_sums = sums.new_zeros(counts.numel()).index_add(0, latents, sums[:, 0])
    return out.to(g.dtype), value_sums.to(g.dtype)
