"""pre = (x - b_dec) W_encᵀ + b_enc, then the largest of relu(pre) over the batch."""

import torch
from torch import Tensor

from fastsae.reference.encode import preactivations


def encode_batch_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k_total: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k_total largest positive pre-activations, ties by the lower token, then latent; ranked times a scale [d_sae].

    What is NaN or +inf is kept and not counted. x [n_tokens, d_in], w_enc [d_sae, d_in] -> values [nnz], indices
    int32 [nnz] and offsets int64 [n_tokens + 1], latents ascending within a token.
    """
    pre = preactivations(x, w_enc, b_enc, b_dec)
    rank = pre if scale is None else pre * scale.to(pre.dtype)
    loose = rank.isnan() | (rank == torch.inf)
    order = rank.masked_fill(loose | ~(rank > 0), -torch.inf).reshape(-1).sort(descending=True, stable=True).indices
    kept = torch.zeros(rank.numel(), dtype=torch.bool, device=x.device).index_fill(0, order[:k_total], True)
    kept = (kept.reshape(rank.shape) & (rank > 0)) | loose
    counts = kept.sum(dim=1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return pre[kept].to(x.dtype), kept.nonzero()[:, 1].int(), offsets
