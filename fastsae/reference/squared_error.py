"""r_n = y_n - target_n with y = decode(codes), and ‖r_n‖²."""

from torch import Tensor

from fastsae.reference.decode import decode
from fastsae.reference.precision import widen


def squared_error(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """-> residual [n_tokens, d_out] in target's dtype, ‖residual‖² [n_tokens] in the accumulating dtype."""
    y = decode(widen(values), indices, offsets, widen(w_dec), widen(b_dec))
    residual = y - widen(target)
    return residual.to(target.dtype), residual.square().sum(dim=1)
