"""Unit decoder directions as the libraries compute them: their formulas, a block of latents at a time.

`fastsae.ops.normalize_rows_` and `project_rows_` divide by the exact norm. The libraries add a small number to it, and
in bfloat16 (or in the part of a gradient that a projection leaves) that number is larger than rounding. In blocks the
intermediate results stay in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 2048


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(matrix.split(_ROWS) for matrix in matrices), strict=True)


@torch.no_grad()
def normalize_(rows: Tensor, eps: float) -> None:
    """rows[f] ← rows[f] / (‖rows[f]‖ + eps)."""
    for (block,) in _blocks(rows):
        block /= torch.linalg.vector_norm(block, dim=1, keepdim=True) + eps


@torch.no_grad()
def project_(grad: Tensor, rows: Tensor, eps: float | None) -> None:
    """grad[f] ← grad[f] - <grad[f], u_f> u_f, with u_f = rows[f] / (‖rows[f]‖ + eps), or rows[f] where eps is None."""
    for part, block in _blocks(grad, rows):
        if eps is not None:
            block = block / (torch.linalg.vector_norm(block, dim=1, keepdim=True) + eps)
        along = torch.linalg.vecdot(part, block)
        part.addcmul_(block, along[:, None], value=-1)
