"""gradient_norm: the norm of the gradients that fused_update makes, before it makes them; none is kept."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops.transpose import transposed


def _fake(values, grad_values, latent_offsets, tokens, entries, g, *_):
    return g.new_empty((), dtype=torch.float64)


gradient_norm_op = define(
    "gradient_norm",
    "(Tensor values, Tensor grad_values, Tensor latent_offsets, Tensor tokens, Tensor entries, Tensor g, "
    "Tensor? row_scale, Tensor x, Tensor? b_dec, Tensor w_dec, bool unit_norm, float? clip_value, "
    "float? clip_row_norm) -> Tensor",
    by="g",
    fake=_fake,
)


@torch.no_grad()
def gradient_norm(
    codes: SparseCodes,
    grad_values: Tensor,
    residual: Tensor,
    x: Tensor,
    W_dec: Tensor,
    *,
    b_dec: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit_norm: bool = False,
    clip_value: float | None = None,
    clip_row_norm: float | None = None,
) -> Tensor:
    """√(‖G_enc‖² + ‖G_b‖² + ‖G_dec‖²) of `fused_update`'s gradients, projected and clipped: one float64.

    The first of two passes where a step is clipped to a global norm; latents without an entry cost nothing.

    Args:
        codes, grad_values, residual, x, b_dec, row_scale, unit_norm, clip_value, clip_row_norm: as `fused_update`.
        W_dec: what takes the step there, [d_sae, d_out]: the parameter, or its float32 master.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
    """
    check_batch(codes, grad_values, residual, x, row_scale)
    check_clips(clip_value, clip_row_norm)
    _check.shape("W_dec", W_dec, (codes.d_sae, residual.shape[1]), "[d_sae, d_out]")
    _check.same_device("W_dec", W_dec, "residual", residual)
    if W_dec.dtype not in (residual.dtype, torch.float32):
        raise TypeError(f"W_dec has dtype {W_dec.dtype}: expected {residual.dtype} or its float32 master")
    latent_major = transposed(codes.indices, codes.offsets, codes.d_sae)
    return gradient_norm_op(
        codes.values, grad_values, *latent_major, residual, row_scale, x, b_dec, W_dec, unit_norm,
        clip_value, clip_row_norm,
    )  # fmt: skip


def check_batch(codes: SparseCodes, grad_values: Tensor, residual: Tensor, x: Tensor, row_scale: Tensor | None) -> None:
    """Raises TypeError or ValueError for what does not fit together."""
    _check.shape("x", x, (codes.n_tokens, None), "[n_tokens, d_in], one row for each token of the codes")
    _check.shape("residual", residual, (codes.n_tokens, None), "[n_tokens, d_out]")
    _check.same_kind("x", x, "residual", residual)
    _check.same_kind("grad_values", grad_values, "residual", residual)
    if row_scale is not None:
        _check.shape("row_scale", row_scale, (codes.n_tokens,), "[n_tokens]")


def check_clips(clip_value: float | None, clip_row_norm: float | None) -> None:
    """Raises ValueError for a clip that is not above 0."""
    for name, clip in (("clip_value", clip_value), ("clip_row_norm", clip_row_norm)):
        if clip is not None and not clip > 0:
            raise ValueError(f"{name} = {clip}: expected a number above 0, or None")
