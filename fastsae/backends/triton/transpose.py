"""CSR -> CSC: a stable sort of the entries by latent.

The sort is PyTorch's: stable, deterministic, without host synchronisation, and on CUDA CUB's radix sort, which costs
nnz · (key + 8 bytes of place) read and written once per 8 bits of the key. A counting sort of our own would need a
histogram for each block of entries, blocks · d_sae counters: at 131,072 latents more bytes than the entries have.
What is saved instead is half the passes: latents below 2^15 are sorted as int16, two passes of 10 bytes an entry
instead of four of 12. No GPU has run this yet.
"""

import torch
from torch import Tensor

_MOST_LATENTS_OF_INT16 = 1 << 15


def transpose(indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> latent_offsets int64 [d_sae + 1], tokens int32 [nnz], entries int64 [nnz] (places in the codes)."""
    flat = indices.reshape(-1).to(torch.int16 if d_sae <= _MOST_LATENTS_OF_INT16 else torch.int32)
    latents, entries = flat.sort(stable=True)
    latent_offsets = torch.zeros(d_sae + 1, dtype=torch.int64, device=flat.device)
    # How many entries lie at or below each latent; `bincount` would wait for the device to learn its length.
    bounds = torch.arange(d_sae, dtype=torch.int32, device=flat.device).to(flat.dtype)
    torch.searchsorted(latents, bounds, right=True, out=latent_offsets[1:])
    if offsets is None:
        tokens = entries.div(max(1, indices.shape[1]), rounding_mode="floor")
    else:
        tokens = torch.searchsorted(offsets, entries, right=True) - 1
    return latent_offsets, tokens.int(), entries
