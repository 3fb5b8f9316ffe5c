"""Plain PyTorch: serves every device and dtype, and every machine without the native library."""

import torch
from torch import Tensor

from fastsae import reference
from fastsae.reference.encode import preactivations
from fastsae.reference.precision import widen

decode = reference.decode
fused_update = reference.fused_update
normalize_rows_ = reference.normalize_rows_
project_rows_ = reference.project_rows_
sampled_dot = reference.sampled_dot
squared_error = reference.squared_error
transpose = reference.transpose

# Rows are taken in blocks whose pre-activations are at most this many: 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24
# Entries of a latent are summed this many at a time, as the native code does.
_BLOCK_ENTRIES = 64


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run `op`, or an empty string."""
    return ""


def encode_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, relu_first: bool
) -> tuple[Tensor, Tensor]:
    """As reference.encode_topk, by blocks of rows and by selection where the reference sorts."""
    n_tokens, d_sae = x.shape[0], w_enc.shape[0]
    values = x.new_empty(n_tokens, k)
    indices = torch.empty(n_tokens, k, dtype=torch.int32, device=x.device)
    rows = max(1, _BLOCK_ELEMENTS // d_sae)
    for start in range(0, n_tokens, rows):
        block = slice(start, start + rows)
        pre = preactivations(x[block], w_enc, b_enc, b_dec)
        pre = pre.relu() if relu_first else pre
        chosen = topk_indices(pre, k)
        values[block] = pre.gather(1, chosen).to(x.dtype)
        indices[block] = chosen.int()
    return values, indices


def topk_indices(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row by (value, then lower index), NaN above all; int64 [n, k].

    `torch.topk` leaves the order of equal values open, so the values it finds settle the threshold alone:
    what lies above it is in, and of what equals it the lowest indices fill the places left.
    """
    threshold = pre.topk(k, dim=1).values[:, -1:]
    above = (pre > threshold) | (pre.isnan() & ~threshold.isnan())
    tied = (pre == threshold) | (pre.isnan() & threshold.isnan())
    places = k - above.sum(dim=1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(dim=1) <= places))
    indices = chosen.nonzero()[:, 1].reshape(-1, k)
    order = pre.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order)


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
    rows, sums = reference.accumulate_rows(widen(values), block_offsets, tokens, entries, widen(g), shift, row_scale)
    out = rows.new_zeros(counts.numel(), g.shape[1]).index_add(0, latents, rows)
    return out.to(g.dtype), sums.new_zeros(counts.numel()).index_add(0, latents, sums).to(g.dtype)
