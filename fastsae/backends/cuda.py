"""The C++/CUDA kernels: checks tensors, allocates results, and passes addresses; nothing waits for the device.

An index out of range is not looked for, since that would wait: the kernels keep to their own memory and the result that
the index belongs to is NaN (`transpose` leaves the entry out).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.backends import native
from fastsae.backends.cpu import _tokens_fit, _values, address, floats, rows_of

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OPS = ("decode", "squared_error", "sampled_dot", "transpose", "accumulate_rows", "fused_update")
# transpose sorts 32-bit places.
_MOST_ENTRIES = 2**31 - 1


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run `op`, or an empty string."""
    if device.type != "cuda":
        return f"the C++/CUDA kernels run on a CUDA device, the tensors are on {device.type}"
    if native.cuda is None:
        return native.why_not_cuda
    if op not in _OPS:
        return f"there is no C++/CUDA kernel for {op}"
    if op != "transpose" and dtype not in _DTYPES:
        return f"the C++/CUDA kernels take float32, bfloat16 and float16, not {dtype}"
    return ""


def _launch(kernel: Callable, like: Tensor, *args) -> None:
    """`kernel` on the device of `like` and its current stream."""
    with torch.cuda.device(like.device):
        kernel(like.device.index, torch.cuda.current_stream(like.device).cuda_stream, *args)


def _codes(indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None, int, int]:
    """Contiguous indices and offsets, n_tokens and k."""
    if indices.dtype != torch.int32:
        raise TypeError(f"indices has dtype {indices.dtype}: expected torch.int32")
    indices = indices.contiguous()
    if offsets is None:
        return indices, None, indices.shape[0], indices.shape[1]
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets has dtype {offsets.dtype}: expected torch.int64")
    return indices, offsets.contiguous(), offsets.numel() - 1, 0


def decode(values: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """As reference.decode."""
    indices, offsets, n_tokens, k = _codes(indices, offsets)
    values, w_dec, b_dec = _values(values, indices, w_dec.dtype), rows_of(w_dec), floats(b_dec)
    y = w_dec.new_empty(n_tokens, w_dec.shape[1])
    _launch(
        native.cuda.decode, w_dec, address(values), address(indices), address(offsets), n_tokens, k, indices.numel(),
        address(w_dec), w_dec.stride(0), _DTYPES[w_dec.dtype], *w_dec.shape, address(b_dec), address(y), y.stride(0),
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
    """As reference.squared_error."""
    indices, offsets, n_tokens, k = _codes(indices, offsets)
    values, w_dec, b_dec = _values(values, indices, w_dec.dtype), rows_of(w_dec), floats(b_dec)
    target = rows_of(target)
    _tokens_fit("target", target, n_tokens)
    residual = target.new_empty(target.shape)
    squared = target.new_empty(n_tokens, dtype=torch.float32)
    _launch(
        native.cuda.squared_error, w_dec, address(values), address(indices), address(offsets), n_tokens, k,
        indices.numel(), address(w_dec), w_dec.stride(0), _DTYPES[w_dec.dtype], *w_dec.shape, address(b_dec),
        address(target), target.stride(0), address(residual), residual.stride(0), address(squared),
    )  # fmt: skip
    return residual, squared


def sampled_dot(g: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, row_scale: Tensor | None) -> Tensor:
    """As reference.sampled_dot."""
    indices, offsets, n_tokens, k = _codes(indices, offsets)
    g, w_dec, row_scale = rows_of(g), rows_of(w_dec), floats(row_scale)
    _tokens_fit("g", g, n_tokens)
    out = g.new_empty(indices.shape)
    _launch(
        native.cuda.sampled_dot, g, address(g), g.stride(0), address(indices), address(offsets), n_tokens, k,
        indices.numel(), address(w_dec), w_dec.stride(0), _DTYPES[g.dtype], *w_dec.shape, address(row_scale),
        address(out),
    )  # fmt: skip
    return out


def transpose(indices: Tensor, offsets: Tensor | None, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.transpose."""
    indices, offsets, n_tokens, k = _codes(indices, offsets)
    nnz = indices.numel()
    if nnz > _MOST_ENTRIES:
        raise ValueError(f"{nnz} entries: the C++/CUDA transpose sorts at most {_MOST_ENTRIES}, use fewer tokens")
    latent_offsets = indices.new_empty(d_sae + 1, dtype=torch.int64)
    tokens = indices.new_empty(nnz)
    entries = indices.new_empty(nnz, dtype=torch.int64)
    bytes_needed = _scratch_bytes(indices, nnz, d_sae)
    scratch = indices.new_empty(bytes_needed, dtype=torch.uint8)
    _launch(
        native.cuda.transpose, indices, address(indices), address(offsets), n_tokens, k, nnz, d_sae,
        address(latent_offsets), address(tokens), address(entries), address(scratch), bytes_needed,
    )  # fmt: skip
    return latent_offsets, tokens, entries


def _scratch_bytes(like: Tensor, nnz: int, d_sae: int) -> int:
    needed = 0

    def ask(device: int, stream: int) -> None:
        nonlocal needed
        needed = native.cuda.transpose_bytes(device, stream, nnz, d_sae)

    _launch(ask, like)
    return needed


def _pieces(rows: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """Room for the sums of the pieces into which long segments of `rows` are cut (csrc/cuda/segments.cuh)."""
    pieces = nnz // native.cuda.entries_of_a_piece()
    sums = rows.new_empty(pieces, rows.shape[1], dtype=torch.float32)
    return sums, rows.new_empty(pieces, dtype=torch.float64)


def accumulate_rows(
    values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    shift: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As reference.accumulate_rows."""
    nnz, d_sae = entries.numel(), latent_offsets.numel() - 1
    values, g, shift, row_scale = _values(values, entries, g.dtype), rows_of(g), floats(shift), floats(row_scale)
    out, sums = g.new_empty(d_sae, g.shape[1]), g.new_empty(d_sae)
    pieces = _pieces(g, nnz)
    _launch(
        native.cuda.accumulate_rows, g, address(values), address(latent_offsets), address(tokens), address(entries),
        nnz, d_sae, address(g), g.stride(0), _DTYPES[g.dtype], *g.shape, address(shift), address(row_scale),
        address(out), out.stride(0), address(sums), [address(t) for t in pieces],
    )  # fmt: skip
    return out, sums


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
    *_unused: object,
) -> None:
    """As reference.fused_update without its options, which `dispatch` sends elsewhere."""
    nnz = entries.numel()
    values, grad_values = _values(values, entries, g.dtype), _values(grad_values, entries, g.dtype)
    g, x, row_scale, b_dec = rows_of(g), rows_of(x), floats(row_scale), floats(b_dec)
    _tokens_fit("x", x, g.shape[0])
    for name, slot in (("w_enc", w_enc), ("w_dec", w_dec)):
        for tensor in slot:
            if tensor.stride(1) != 1 and tensor.shape[1] > 1:
                raise ValueError(f"{name} has strides {tensor.stride()}: expected rows that are contiguous")
    decoder, encoder = _pieces(g, nnz), _pieces(x, nnz)
    _launch(
        native.cuda.fused_update, g, address(values), address(grad_values), address(latent_offsets), address(tokens),
        address(entries), nnz, latent_offsets.numel() - 1, g.shape[0], address(g), g.stride(0), address(row_scale),
        address(x), x.stride(0), address(b_dec), x.shape[1], g.shape[1], _DTYPES[g.dtype],
        [address(t) for t in w_enc], [t.stride(0) for t in w_enc], [address(t) for t in b_enc],
        [t.stride(0) for t in b_enc], [address(t) for t in w_dec], [t.stride(0) for t in w_dec],
        lr, beta1, beta2, eps, weight_decay, step, unit_norm,
        [address(t) for t in decoder], [address(t) for t in encoder],
    )  # fmt: skip
