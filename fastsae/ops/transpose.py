"""transpose: codes by token -> entries by latent, the order every weight gradient is summed in."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops._library import define


class LatentMajor(NamedTuple):
    """Entries sorted by latent (CSC), those of one latent in the order of their tokens."""

    latent_offsets: Tensor  # int64 [d_sae + 1]: latent f owns entries latent_offsets[f] up to latent_offsets[f + 1]
    tokens: Tensor  # int32 [nnz]: the token of each entry
    entries: Tensor  # int64 [nnz]: the place of each entry in the codes' flattened values


def _fake(indices, offsets, d_sae):
    return (
        indices.new_empty(d_sae + 1, dtype=torch.int64),
        indices.new_empty(indices.numel(), dtype=torch.int32),
        indices.new_empty(indices.numel(), dtype=torch.int64),
    )


transpose_op = define(
    "transpose",
    "(Tensor indices, Tensor? offsets, int d_sae) -> (Tensor, Tensor, Tensor)",
    by="indices",
    fake=_fake,
)

# The backward of decode and that of encode want the same transposition, one after the other, from two
# places of autograd's graph. The last one is kept with the indices it came from (which pins their memory, so
# an address cannot be taken for another tensor's) and is a few bytes an entry.
_last = threading.local()


def transposed(indices: Tensor, offsets: Tensor | None, d_sae: int) -> LatentMajor:
    """`transpose` of the same indices twice in a row is computed once."""
    if torch.compiler.is_compiling() or type(indices) is not Tensor:
        return LatentMajor(*transpose_op(indices, offsets, d_sae))
    key = (indices.data_ptr(), indices.shape, indices.device, indices._version, d_sae)
    known = getattr(_last, "known", None)
    if known is not None and known[0] == key and known[1]._version == indices._version:
        return known[2]
    _last.known = None
    result = LatentMajor(*transpose_op(indices, offsets, d_sae))
    _last.known = (key, indices, result)
    return result


def transpose(codes: SparseCodes) -> LatentMajor:
    """The entries of `codes` sorted by latent, stable: a latent's tokens stay in order.

    Raises ValueError for an index outside [0, d_sae).
    """
    return LatentMajor(*transpose_op(codes.indices, codes.offsets, codes.d_sae))
