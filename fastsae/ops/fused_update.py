"""fused_update: both weights' gradients and their Adam step in one pass over latents; no gradient tensor exists."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops.transpose import transposed


class Slot(NamedTuple):
    """A parameter and its two moments, all of one shape, dtype and device.

    With a float32 master of a bfloat16 or float16 parameter the moments are float32 too; the parameter is then the
    rounded master.
    """

    parameter: Tensor
    first_moment: Tensor
    second_moment: Tensor
    master: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [part for part in self if part is not None]


def _fake(*args):
    return None


fused_update_op = define(
    "fused_update",
    "(Tensor values, Tensor grad_values, Tensor latent_offsets, Tensor tokens, Tensor entries, Tensor g, "
    "Tensor? row_scale, Tensor x, Tensor? b_dec, Tensor(a!)[] w_enc, Tensor(b!)[] b_enc, Tensor(c!)[] w_dec, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step, bool unit_norm) -> ()",
    by="g",
    fake=_fake,
)


@torch.no_grad()
def fused_update(
    codes: SparseCodes,
    grad_values: Tensor,
    residual: Tensor,
    x: Tensor,
    W_enc: Slot,
    b_enc: Slot,
    W_dec: Slot,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    b_dec: Tensor | None = None,
    row_scale: Tensor | None = None,
    unit_norm: bool = False,
) -> None:
    """Adam on W_enc, b_enc and W_dec, in place, from what the forward and `sampled_dot` left.

    For each latent f, with c the row scale and b_dec what was subtracted from x:
        G_dec = Σ c_n v_nf r_n,  G_enc = Σ v̄_nf (x_n - b_dec),  G_b = Σ v̄_nf,
    then, with `unit_norm`, G_dec loses its part along W_dec[f]; Adam as torch.optim.Adam computes it; and W_dec[f] is
    scaled to unit norm. Reads and writes every parameter and moment once.

    Args:
        codes: of the batch, flat tokens.
        grad_values: v̄, the gradient of the loss in the codes' values, their shape.
        residual: r [n_tokens, d_out]; the gradient of the reconstruction is c_n r_n.
        x: what was encoded, [n_tokens, d_in].
        W_enc, b_enc, W_dec: parameter, moments and perhaps a master; W_enc [d_in, d_sae] with W_enc.T contiguous, the
            others alike.
        lr, betas, eps, weight_decay: as torch.optim.Adam.
        step: number of this step, from 1.
        b_dec, row_scale: [d_in] and [n_tokens], or None.

    Raises:
        TypeError, ValueError: dtypes, shapes, strides or devices that do not fit.

    Source: FBGEMM's table-batched embeddings fuse backward and optimizer so; Adam is Kingma & Ba 2015.
    """
    d_sae = codes.d_sae
    d_in, d_out = x.shape[-1], residual.shape[-1]
    for name, slot, shape in (
        ("W_enc", W_enc, (d_in, d_sae)),
        ("b_enc", b_enc, (d_sae,)),
        ("W_dec", W_dec, (d_sae, d_out)),
    ):
        for part, tensor in zip(Slot._fields, slot, strict=True):
            if tensor is None:
                continue
            _check.shape(f"{name}.{part}", tensor, shape, f"{shape}")
            _check.same_device(f"{name}.{part}", tensor, "residual", residual)
            expected = torch.float32 if slot.master is not None and part != "parameter" else residual.dtype
            if tensor.dtype != expected:
                raise TypeError(f"{name}.{part} has dtype {tensor.dtype}: expected {expected}")
        if slot.master is not None and residual.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"{name}.master of a {residual.dtype} parameter: expected None, its digits are all there")
    if len({slot.master is None for slot in (W_enc, b_enc, W_dec)}) > 1:
        raise ValueError("W_enc, b_enc and W_dec: expected all of them to have a master, or none")
    _check.shape("x", x, (codes.n_tokens, d_in), "[n_tokens, d_in], one row for each token of the codes")
    _check.shape("residual", residual, (codes.n_tokens, d_out), "[n_tokens, d_out]")
    _check.same_kind("x", x, "residual", residual)
    _check.same_kind("grad_values", grad_values, "residual", residual)
    if step < 1:
        raise ValueError(f"step = {step}: expected at least 1")
    rows = [tensor.T for tensor in W_enc.tensors()]
    for part, tensor in zip(Slot._fields, rows, strict=False):
        if not tensor.is_contiguous():
            raise ValueError(
                f"W_enc.{part} has strides {tensor.T.stride()}: expected W_enc.T contiguous (feature-major)"
            )
    for name, slot in (("b_enc", b_enc), ("W_dec", W_dec)):
        for part, tensor in zip(Slot._fields, slot.tensors(), strict=False):
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                raise ValueError(f"{name}.{part} has strides {tensor.stride()}: expected rows that are contiguous")
    if row_scale is not None:
        _check.shape("row_scale", row_scale, (codes.n_tokens,), "[n_tokens]")
    latent_major = transposed(codes.indices, codes.offsets, d_sae)
    fused_update_op(
        codes.values,
        grad_values,
        *latent_major,
        residual,
        row_scale,
        x,
        b_dec,
        rows,
        b_enc.tensors(),
        W_dec.tensors(),
        lr,
        *betas,
        eps,
        weight_decay,
        step,
        unit_norm,
    )
    torch.autograd.graph.increment_version([W_enc.parameter, b_enc.parameter, W_dec.parameter])
