"""The C++ kernels: checks tensors, allocates results, and passes addresses."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.backends import dense_products, native, recycled
from fastsae.backends.screen import Screen
from fastsae.backends.screen_batch import BatchScreen
from fastsae.backends.screen_groupmax import GroupScreen
from fastsae.backends.screen_threshold import ThresholdScreen

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run `op`, or an empty string."""
    if device.type != "cpu":
        return f"the C++ kernels run on a CPU, the tensors are on {device.type}"
    if native.cpu is None:
        return native.why_not_cpu
    if op != "transpose" and dtype not in _DTYPES:
        return f"the C++ kernels take float32 and bfloat16, not {dtype}"
    return ""


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(matrix: Tensor) -> Tensor:
    """`matrix`, copied only if its rows are not contiguous."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def floats(vector: Tensor | None) -> Tensor | None:
    """Biases and scales reach the kernels as contiguous float32."""
    return None if vector is None else vector.to(torch.float32).contiguous()


def _codes(indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor | None, int, int]:
    """Contiguous indices and offsets, n_tokens and k.

    A kernel that follows a wrong index or offset reads memory that is not its own, and SparseCodes may have been
    changed since it was made. The check is a thousandth of the gather it guards.
    """
    if indices.dtype != torch.int32:
        raise TypeError(f"indices has dtype {indices.dtype}: expected torch.int32")
    indices = indices.contiguous()
    if not native.cpu.indices_within(address(indices), indices.numel(), d_sae):
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"indices run from {low} to {high}: expected them in [0, {d_sae}) (d_sae = {d_sae})")
    if offsets is None:
        return indices, None, indices.shape[0], indices.shape[1]
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets has dtype {offsets.dtype}: expected torch.int64")
    first, last, nnz = int(offsets[0]), int(offsets[-1]), indices.numel()
    if first != 0 or last != nnz or (offsets.diff() < 0).any():
        raise ValueError(
            f"offsets run from {first} to {last}: expected from 0 to nnz = {nnz}, the number of indices, never falling"
        )
    return indices, offsets.contiguous(), offsets.numel() - 1, 0


def _values(values: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dtype != dtype or values.numel() != indices.numel():
        raise TypeError(
            f"values has dtype {values.dtype} and {values.numel()} entries: expected {dtype}, as its factor has, and "
            f"{indices.numel()}, one for each index"
        )
    return values.contiguous()


def _tokens_fit(name: str, tensor: Tensor, n_tokens: int) -> None:
    if tensor.shape[0] != n_tokens:
        raise ValueError(f"{name} has {tensor.shape[0]} rows: expected {n_tokens}, one for each token of the codes")


def encode_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    relu_first: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x, w_enc = rows_of(x), rows_of(w_enc)
    values = x.new_empty(x.shape[0], k)
    indices = torch.empty(x.shape[0], k, dtype=torch.int32)
    if x.shape[0]:
        Screen(x, w_enc, floats(b_enc), floats(b_dec), k, relu_first, floats(scale)).run(values, indices)
    return values, indices


def encode_groupmax(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    return GroupScreen(rows_of(x), rows_of(w_enc), floats(b_enc), floats(b_dec), k).run()


def encode_batch_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k_total: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return BatchScreen(rows_of(x), rows_of(w_enc), floats(b_enc), floats(b_dec), k_total, floats(scale)).run()


def encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return ThresholdScreen(rows_of(x), rows_of(w_enc), floats(b_enc), floats(b_dec), floats(threshold)).run()


def decode(values: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    values, w_dec, b_dec = _values(values, indices, w_dec.dtype), rows_of(w_dec), floats(b_dec)
    indices, offsets, n_tokens, k = _codes(indices, offsets, w_dec.shape[0])
    y = w_dec.new_empty(n_tokens, w_dec.shape[1])
    dense = dense_products.pays("decode", w_dec.dtype, indices, offsets, n_tokens, w_dec.shape[0])
    native.cpu.decode(
        address(values), address(indices), address(offsets), n_tokens, k, address(w_dec), w_dec.stride(0),
        _DTYPES[w_dec.dtype], *w_dec.shape, address(b_dec), dense, address(y), y.stride(0),
    )  # fmt: skip
    return y


def squared_error(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    values, w_dec, b_dec, target = _values(values, indices, w_dec.dtype), rows_of(w_dec), floats(b_dec), rows_of(target)
    indices, offsets, n_tokens, k = _codes(indices, offsets, w_dec.shape[0])
    _tokens_fit("target", target, n_tokens)
    residual = target.new_empty(target.shape)
    squared = torch.empty(n_tokens, dtype=torch.float32)
    dense = dense_products.pays("squared_error", w_dec.dtype, indices, offsets, n_tokens, w_dec.shape[0])
    native.cpu.squared_error(
        address(values), address(indices), address(offsets), n_tokens, k, address(w_dec), w_dec.stride(0),
        _DTYPES[w_dec.dtype], *w_dec.shape, address(b_dec), dense, address(target), target.stride(0),
        address(residual), residual.stride(0), address(squared),
    )  # fmt: skip
    return residual, squared


def sampled_dot(g: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, row_scale: Tensor | None) -> Tensor:
    g, w_dec, row_scale = rows_of(g), rows_of(w_dec), floats(row_scale)
    indices, offsets, n_tokens, k = _codes(indices, offsets, w_dec.shape[0])
    _tokens_fit("g", g, n_tokens)
    out = g.new_empty(indices.shape)
    dense = dense_products.pays("sampled_dot", g.dtype, indices, offsets, n_tokens, w_dec.shape[0])
    native.cpu.sampled_dot(
        address(g), g.stride(0), address(indices), address(offsets), n_tokens, k, address(w_dec),
        w_dec.stride(0), _DTYPES[g.dtype], *w_dec.shape, address(row_scale), dense, address(out),
    )  # fmt: skip
    return out


def transpose(indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    indices, offsets, n_tokens, k = _codes(indices, offsets, d_sae)
    latent_offsets = torch.empty(d_sae + 1, dtype=torch.int64)
    tokens = torch.empty(indices.numel(), dtype=torch.int32)
    entries = torch.empty(indices.numel(), dtype=torch.int64)
    native.cpu.transpose(
        address(indices), address(offsets), n_tokens, k, d_sae, address(latent_offsets), address(tokens),
        address(entries),
    )  # fmt: skip
    return latent_offsets, tokens, entries


def accumulate_rows(
    values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    shift: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    values, g, shift, row_scale = values.contiguous(), rows_of(g), floats(shift), floats(row_scale)
    d_sae = latent_offsets.numel() - 1
    out = recycled.empty((d_sae, g.shape[1]), g.dtype)
    sums = g.new_empty(d_sae)
    dense = dense_products.pays("accumulate_rows", g.dtype, tokens, latent_offsets, d_sae, g.shape[0])
    native.cpu.accumulate_rows(
        address(values), address(latent_offsets), address(tokens), address(entries), d_sae, address(g),
        g.stride(0), _DTYPES[g.dtype], *g.shape, address(shift), address(row_scale), dense, address(out),
        out.stride(0), address(sums),
    )  # fmt: skip
    return out, sums


def normalize_rows_(rows: Tensor, eps: float) -> None:
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows.copy_(_normalized(rows.contiguous(), eps))
        return
    native.cpu.normalize_rows(address(rows), rows.stride(0), _DTYPES[rows.dtype], rows.shape[0], rows.shape[1], eps)


def _normalized(rows: Tensor, eps: float) -> Tensor:
    normalize_rows_(rows, eps)
    return rows


def project_rows_(grad: Tensor, rows: Tensor) -> None:
    rows = rows_of(rows)
    target = rows_of(grad)
    native.cpu.project_rows(
        address(target), target.stride(0), address(rows), rows.stride(0), _DTYPES[rows.dtype],
        rows.shape[0], rows.shape[1],
    )  # fmt: skip
    if target is not grad:
        grad.copy_(target)


def fused_update(
    values: Tensor,
    grad_values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    row_scale: Tensor | None,
    x: Tensor,
    b_dec: Tensor | None,
    w_enc: list[Tensor],
    b_enc: list[Tensor],
    w_dec: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    unit_norm: bool,
    clip_value: float | None = None,
    clip_row_norm: float | None = None,
    gradient_scale: Tensor | None = None,
    lazy: bool = False,
    streams: Sequence[int] = (),
) -> None:
    values, grad_values, g, x = values.contiguous(), grad_values.contiguous(), rows_of(g), rows_of(x)
    row_scale, b_dec = floats(row_scale), floats(b_dec)
    # The step is taken on the masters, of which the parameters are copies, or on the parameters themselves.
    copies = [slot[0] if len(slot) == 4 else None for slot in (w_enc, b_enc, w_dec)]
    w_enc, b_enc, w_dec = ([slot[-1], *slot[1:3]] if len(slot) == 4 else slot for slot in (w_enc, b_enc, w_dec))
    native.cpu.fused_update(
        address(values), address(grad_values), address(latent_offsets), address(tokens), address(entries),
        latent_offsets.numel() - 1, address(g), g.stride(0), address(row_scale), address(x), x.stride(0),
        address(b_dec), x.shape[1], g.shape[1], _DTYPES[g.dtype],
        [address(t) for t in w_enc], [t.stride(0) for t in w_enc], [address(t) for t in b_enc],
        [address(t) for t in w_dec], [t.stride(0) for t in w_dec], _DTYPES[w_dec[0].dtype], _DTYPES[w_dec[1].dtype],
        [address(t) for t in copies], [0 if t is None else t.stride(0) for t in copies],
        lr, beta1, beta2, eps, weight_decay, step, unit_norm, _clip(clip_value), _clip(clip_row_norm),
        1.0 if gradient_scale is None else float(gradient_scale), lazy, [*streams] or [0] * 6,
    )  # fmt: skip


def gradient_norm(
    values: Tensor,
    grad_values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    row_scale: Tensor | None,
    x: Tensor,
    b_dec: Tensor | None,
    w_dec: Tensor,
    unit_norm: bool,
    clip_value: float | None,
    clip_row_norm: float | None,
) -> Tensor:
    values, grad_values, g, x = values.contiguous(), grad_values.contiguous(), rows_of(g), rows_of(x)
    row_scale, b_dec, w_dec = floats(row_scale), floats(b_dec), rows_of(w_dec)
    norm = native.cpu.gradient_norm(
        address(values), address(grad_values), address(latent_offsets), address(tokens), address(entries),
        latent_offsets.numel() - 1, address(g), g.stride(0), address(row_scale), address(x), x.stride(0),
        address(b_dec), x.shape[1], g.shape[1], _DTYPES[g.dtype], address(w_dec), w_dec.stride(0),
        _DTYPES[w_dec.dtype], unit_norm, _clip(clip_value), _clip(clip_row_norm),
    )  # fmt: skip
    return torch.tensor(norm, dtype=torch.float64)


def _clip(most: float | None) -> float:
    return math.inf if most is None else most
