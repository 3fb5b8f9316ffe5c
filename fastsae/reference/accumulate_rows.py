"""out[f] = Σ_{e of latent f} c_t v_e (g_t - shift), with t the token of entry e."""

import torch
from torch import Tensor

from fastsae.reference.precision import widen


def accumulate_rows(
    values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    shift: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> out [d_sae, d], and Σ c_t v_e [d_sae]; shift [d] and c [n_tokens] may be None."""
    counts = latent_offsets.diff()
    latents = torch.arange(counts.numel(), device=g.device).repeat_interleave(counts)
    tokens = tokens.long()
    weights = widen(values).reshape(-1)[entries]
    if row_scale is not None:
        weights = weights * row_scale[tokens]
    rows = widen(g)[tokens] if shift is None else widen(g)[tokens] - widen(shift)
    out = weights.new_zeros(counts.numel(), g.shape[1]).index_add(0, latents, weights[:, None] * rows)
    sums = weights.new_zeros(counts.numel()).index_add(0, latents, weights)
    return out.to(g.dtype), sums.to(g.dtype)
