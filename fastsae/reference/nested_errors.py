"""nested_errors: the error of each prefix of a dictionary, one decode for each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.reference.squared_error import squared_error


def nested_errors(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    widths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """r = decode(codes) - target, and ‖decode(codes[:, :w]) - target‖² [n_tokens, widths]."""
    prefixes = [
        squared_error(values.where(indices < width, 0), indices, offsets, w_dec, b_dec, target) for width in widths
    ]
    return prefixes[-1][0], torch.stack([squared for _, squared in prefixes], dim=1)
