"""pre = (x - b_dec) W_encᵀ + b_enc, then what is above its latent's threshold."""

import torch
from torch import Tensor

from fastsae.reference.encode import preactivations


def encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries with pre[n, f] > threshold[f], and those that are NaN, latents ascending within a token.

    x [n_tokens, d_in], w_enc [d_sae, d_in], threshold [d_sae] -> values [nnz], indices int32 [nnz] and offsets
    int64 [n_tokens + 1]. The comparison is made in the accumulating dtype, before values are rounded to x's.
    """
    pre = preactivations(x, w_enc, b_enc, b_dec)
    kept = ~(pre <= threshold.to(pre.dtype))
    counts = kept.sum(dim=1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return pre[kept].to(x.dtype), kept.nonzero()[:, 1].int(), offsets
