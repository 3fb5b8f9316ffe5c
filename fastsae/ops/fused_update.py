"""fused_update: both weights' gradients and their Adam step in one pass over latents; no gradient tensor exists."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops._random import rounding_stream
from fastsae.ops.gradient_norm import check_batch, check_clips
from fastsae.ops.transpose import transposed


class Slot(NamedTuple):
    """A parameter and its two moments, all of one shape, dtype and device.

    With a float32 master of a bfloat16 or float16 parameter the moments are float32 too; the parameter is then the
    rounded master. Moments beside float32 weights, masters or parameters, may be bfloat16.
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
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step, bool unit_norm, "
    "float? clip_value, float? clip_row_norm, Tensor? gradient_scale, bool lazy, int[] streams) -> ()",
    by="g",
    fake=_fake,
    options=("clip_value", "clip_row_norm", "gradient_scale", "lazy", "streams"),
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
    clip_value: float | None = None,
    clip_row_norm: float | None = None,
    gradient_scale: Tensor | None = None,
    lazy: bool = False,
    seed: int = 0,
) -> None:
    """Adam on W_enc, b_enc and W_dec, in place, from what the forward and `sampled_dot` left.

    For each latent f, with c the row scale and b_dec what was subtracted from x:
        G_dec = Σ c_n v_nf r_n,  G_enc = Σ v̄_nf (x_n - b_dec),  G_b = Σ v̄_nf,
    then, with `unit_norm`, G_dec loses its part along W_dec[f]; clips, by value, then by row, then by `gradient_scale`;
    Adam as torch.optim.Adam computes it; and W_dec[f] is scaled to unit norm. Reads and writes every parameter and
    moment once.

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
        clip_value: every entry of a gradient is clamped to [-clip_value, clip_value].
        clip_row_norm: the gradients of W_enc[:, f] and W_dec[f] are each scaled to at most this norm, by
            min(1, clip_row_norm / (norm + 1e-6)) as torch.nn.utils.clip_grad_norm_ does with all of them.
        gradient_scale: one float32 (float64 for float64) on the device, by which every gradient is multiplied: the
            share that clipping to a global norm leaves (see `gradient_norm`).
        lazy: torch.optim.SparseAdam's step: a latent without an entry keeps its parameters and moments, and eps is
            added before the bias correction of the root, not after.
        seed: of the rounding of bfloat16 moments beside float32 weights: up or down at random, unbiased, by bits that
            follow from seed, step, parameter, row and column alone.

    Raises:
        TypeError, ValueError: dtypes, shapes, strides or devices that do not fit; a clip that is not above 0, weight
            decay with `lazy`.

    Source: FBGEMM's table-batched embeddings fuse backward and optimizer so; Adam is Kingma & Ba 2015; moments
    rounded at random are those of low-precision training (Gupta et al. 2015).
    """
    d_sae = codes.d_sae
    check_clips(clip_value, clip_row_norm)
    if step < 1:
        raise ValueError(f"step = {step}: expected at least 1")
    if lazy and weight_decay:
        raise ValueError(
            f"weight_decay = {weight_decay} with lazy=True: expected 0, as torch.optim.SparseAdam has none"
        )
    slots = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}
    shapes = (x.shape[-1], d_sae), (d_sae,), (d_sae, residual.shape[-1])
    for (name, slot), shape in zip(slots.items(), shapes, strict=True):
        _check_slot(name, slot, shape, residual)
    if len({slot.master is None for slot in slots.values()}) > 1:
        raise ValueError("W_enc, b_enc and W_dec: expected all of them to have a master, or none")
    check_batch(codes, grad_values, residual, x, row_scale)
    moments = {moment.dtype for slot in slots.values() for moment in slot[1:3]}
    if len(moments) > 1:
        raise TypeError(f"moments have dtypes {sorted(map(str, moments))}: expected all of them to have the same")
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
    weight = W_dec.parameter if W_dec.master is None else W_dec.master
    streams: Sequence[int] = ()
    if W_dec.first_moment.dtype != weight.dtype:
        streams = [word for number in range(len(slots)) for word in rounding_stream(seed, step, number)]
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
        clip_value,
        clip_row_norm,
        gradient_scale,
        lazy,
        streams,
    )
    torch.autograd.graph.increment_version([W_enc.parameter, b_enc.parameter, W_dec.parameter])


def _check_slot(name: str, slot: Slot, shape: tuple[int, ...], residual: Tensor) -> None:
    if slot.master is not None and residual.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{name}.master of a {residual.dtype} parameter: expected None, its digits are all there")
    weight_dtype = residual.dtype if slot.master is None else torch.float32
    for part, tensor in zip(Slot._fields, slot, strict=True):
        if tensor is None:
            continue
        _check.shape(f"{name}.{part}", tensor, shape, f"{shape}")
        _check.same_device(f"{name}.{part}", tensor, "residual", residual)
        expected = [residual.dtype if part == "parameter" else weight_dtype]
        if "moment" in part and weight_dtype == torch.float32:
            expected.append(torch.bfloat16)
        if tensor.dtype not in expected:
            raise TypeError(f"{name}.{part} has dtype {tensor.dtype}: expected {' or '.join(map(str, expected))}")
