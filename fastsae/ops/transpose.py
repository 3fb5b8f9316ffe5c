"""transpose: codes by token -> entries by latent, the order every weight gradient is summed in."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
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
# places of autograd's graph. The last one is kept with the tensors it came from (which pins their memory, so
# an address cannot be taken for another tensor's) and is a few bytes an entry.
_last = threading.local()


def transposed(indices: Tensor, offsets: Tensor | None, d_sae: int) -> LatentMajor:
    """`transpose` of the same indices twice in a row is computed once."""
    tracked = all(type(part) is Tensor and not part.is_inference() for part in (indices, offsets) if part is not None)
    if torch.compiler.is_compiling() or not tracked:
        return LatentMajor(*transpose_op(indices, offsets, d_sae))
    key = (_identity(indices), None if offsets is None else _identity(offsets), d_sae)
    known = getattr(_last, "known", None)
    if known is not None and known[0] == key:
        return known[-1]
    _last.known = None
    result = LatentMajor(*transpose_op(indices, offsets, d_sae))
    _last.known = (key, indices, offsets, result)
    return result


def _identity(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device, tensor._version


def transpose(codes: SparseCodes) -> LatentMajor:
    """The entries of `codes` sorted by latent, stable: a latent's tokens stay in order.

    Raises TypeError for codes that are not SparseCodes, ValueError for an index outside [0, d_sae).
    """
    _check.codes(codes)
    return LatentMajor(*transpose_op(codes.indices, codes.offsets, codes.d_sae))
