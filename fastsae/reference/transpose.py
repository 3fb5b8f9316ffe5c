"""CSR -> CSC: the entries sorted by latent, those of one latent in the order of their tokens."""

import torch
from torch import Tensor

from fastsae.reference.precision import tokens_of


def transpose(indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> latent_offsets int64 [d_sae + 1], tokens int32 [nnz], entries int64 [nnz] (places in the codes)."""
    flat = indices.reshape(-1).long()
    entries = flat.argsort(stable=True)
    latent_offsets = flat.new_zeros(d_sae + 1)
    latent_offsets[1:] = torch.bincount(flat, minlength=d_sae).cumsum(0)
    return latent_offsets, tokens_of(indices, offsets)[entries].int(), entries
