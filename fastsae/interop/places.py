"""The encoder's values at places that were selected already, with the gradient that the encoder's operators give."""

from typing import Any

import torch
from torch import Tensor

from fastsae.ops import _encoder


class _ValuesAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *_, values, indices, masks_zeros = inputs
        _encoder.save_for_backward(ctx, inputs, indices, None, values if masks_zeros else None)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _encoder.backward(ctx, g)


def values_at(
    x: Tensor,
    rows: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    values: Tensor,
    indices: Tensor,
    *,
    masks_zeros: bool,
) -> Tensor:
    """`values`, which are relu(<x_n - b_dec, rows[i_nj]> + b_enc[i_nj]), as a function of x and the weights.

    x [n_tokens, d_in], rows [d_sae, d_in], values and indices (int32) [n_tokens, k]. With `masks_zeros` a value of 0
    gets no gradient, which is ReLU's; without it passes its gradient on, which is sparsify's.
    """
    return _ValuesAt.apply(x, rows, b_enc, b_dec, values, indices.contiguous(), masks_zeros)
