"""fused_update: for every latent f, both weights' gradients and their Adam step, without a gradient tensor.

  G_dec = Σ_e c_t v_e g_t          G_enc = Σ_e u_e (x_t - b_dec)          G_b = Σ_e u_e
  G_dec -= (<G_dec, w> / <w, w>) w       where the decoder keeps unit norm
  m <- m + (1 - β₁)(G - m)         s <- β₂ s + (1 - β₂) G²         p <- p - a m / (√s / b + ε)
  W_dec[f] <- W_dec[f] / |W_dec[f]|

with v the codes' values, u their gradients, a = lr / (1 - β₁ᵗ) and b = √(1 - β₂ᵗ), as torch.optim.Adam has it. Two
launches of one kernel, for they share no row: the decoder gathers g, the encoder x. After the projection G is clamped
by value and multiplied by its row's share and by that of the global norm. The shares of rows come from a pass before
(gradient_norm.py): only the decoder with unit norm has its whole row at hand.

Access. One program is one latent. It asks for the rows of p, m and s first, which then arrive while it gathers
(_segments.py, long latents too), keeps the gradient in registers from its sum to its use, and writes p, m and s once:
24 bytes a float32 parameter, the floor for the many latents that no token names; where p is the float32 master of a
half-precision parameter, 2 more for its rounded copy. Columns are independent except for
the unit norm, so the encoder, and a decoder that is free, go by slices of 512 bytes, one warp each. With unit norm a
program holds its whole row, up to 4,096 columns: 8 columns a lane with up to 4 warps, 16 with 8 warps beyond 1,024
columns. However wide, a lane gathers 128 bytes at once, 32 registers, which leaves room for p, m, s and the gradient.
A wider row lives in a buffer of the program's own, few enough of them to stay in L2. Slices and wide rows are given 112
registers: left to itself, ptxas spills up to five of them to end at 80, 96 or 128; with 104 it must. 18 warps then fit
a multiprocessor. No GPU has run this yet.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton import _segments
from fastsae.backends.triton._cases import WIDTHS, case
from fastsae.backends.triton._launch import (
    TYPES,
    device_function,
    launch,
    narrow,
    power_of_two,
    rows_of,
    slice_width,
    slices_of,
    vector,
)
from fastsae.backends.triton._rounding import random_bits, store_stochastic, stream_arguments
from fastsae.backends.triton._segments import Windows, sum_latent, sum_windows
from fastsae.backends.triton.gradient_norm import clamped, row_shares, row_squares
from fastsae.backends.triton.unit_rows import share_along

_WIDEST_ROW = 4096
# What a lane gathers at once: 32 registers, eight rows of 16 bytes.
_GATHERED_BYTES = 128
# Programs that keep a wide row in a buffer: eight for each of about 132 multiprocessors; 50 MiB for rows of 12,288.
_WIDE_PROGRAMS = 1024
_WIDE_COLUMNS = 1024
_MOST_REGISTERS = 112


@device_function
def _adam(p, gradient, m, s, lr, beta1_rest, beta2, beta2_rest, root, eps, decay):
    """-> p, m, s; lr is a, root is 1 / b, beta1_rest is 1 - β₁."""
    gradient += decay * p
    m += beta1_rest * (gradient - m)
    s = beta2 * s + beta2_rest * gradient * gradient
    return p - lr * tl.div_rn(m, tl.sqrt_rn(s) * root + eps), m, s


@device_function
def _store(to, at, x, mask):
    tl.store(to + at, narrow(x, to.dtype.element_ty), mask=mask)


@device_function
def _store_moments(m, at_m, first, s, at_s, second, mask, stream_first, stream_second, latent, columns):
    if stream_first is not None:
        random = random_bits(stream_first, stream_second, latent, columns)
        store_stochastic(m, at_m, first, random & 0xFFFF, mask)
        store_stochastic(s, at_s, second, random >> 16, mask)
    else:
        _store(m, at_m, first, mask)
        _store(s, at_s, second, mask)


@device_function
def _clipped(gradient, latent, clip_value, shares, scale):
    if clip_value is not None:
        gradient = clamped(gradient, clip_value)
    if shares is not None:
        gradient *= tl.load(shares + latent)
    if scale is not None:
        gradient *= tl.load(scale).to(tl.float32)
    return gradient


@device_function
def _over_norm(row, squared):
    norm = tl.sqrt_rn(squared)
    return tl.div_rn(row, tl.where(norm < 1e-12, 1e-12, norm))


_STREAMS = ["stream_first", "stream_second", "bias_stream_first", "bias_stream_second"]


@triton.jit(do_not_specialize=["nnz", "n_tokens", "window_bits", *_STREAMS])
def _update_rows(
    values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
    p, m, s, copy, p_stride, m_stride, s_stride, copy_stride, bias_p, bias_m, bias_s, bias_copy,
    d, nnz, n_tokens, window_bits, lr, beta1_rest, beta2, beta2_rest, root, eps, decay,
    clip_value, shares, scale, stream_first, stream_second, bias_stream_first, bias_stream_second,
    UNIT_NORM: tl.constexpr, LAZY: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: one latent, one slice of its row; all of it with UNIT_NORM.

    The bias and copies may be None, and so may clip_value, shares, scale and streams where the step has no such option.
    """
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    alone = tl.program_id(1) == 0
    if LAZY:
        used = tl.load(latent_offsets + latent) < tl.load(latent_offsets + latent + 1)
        inside = inside & used
        alone = alone & used
    at_p, at_m, at_s = latent * p_stride + columns, latent * m_stride + columns, latent * s_stride + columns
    row = tl.load(p + at_p, mask=inside, other=0.0)
    first = tl.load(m + at_m, mask=inside, other=0.0)
    second = tl.load(s + at_s, mask=inside, other=0.0)
    gradient, weight = sum_latent(
        values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
        latent, columns, inside, d, nnz, n_tokens, window_bits, ENTRIES,
    )  # fmt: skip
    # Widened only here: until then half precision takes half the registers.
    row, first, second = row.to(tl.float32), first.to(tl.float32), second.to(tl.float32)
    if UNIT_NORM:
        gradient -= share_along(tl.sum(gradient * row, axis=0), tl.sum(row * row, axis=0)) * row
    gradient = _clipped(gradient, latent, clip_value, shares, scale)
    row, first, second = _adam(row, gradient, first, second, lr, beta1_rest, beta2, beta2_rest, root, eps, decay)
    if UNIT_NORM:
        row = _over_norm(row, tl.sum(tl.where(inside, row * row, 0.0), axis=0))
    _store(p, at_p, row, inside)
    _store_moments(m, at_m, first, s, at_s, second, inside, stream_first, stream_second, latent, columns)
    if copy is not None:
        _store(copy, latent * copy_stride + columns, row, inside)
    if bias_p is not None:
        bias = tl.load(bias_p + latent).to(tl.float32)
        first = tl.load(bias_m + latent).to(tl.float32)
        second = tl.load(bias_s + latent).to(tl.float32)
        weight = _clipped(weight, latent, clip_value, None, scale)
        bias, first, second = _adam(bias, weight, first, second, lr, beta1_rest, beta2, beta2_rest, root, eps, decay)
        _store(bias_p, latent, bias, alone)
        _store_moments(
            bias_m, latent, first, bias_s, latent, second, alone, bias_stream_first, bias_stream_second,
            latent, latent - latent,
        )  # fmt: skip
        if bias_copy is not None:
            _store(bias_copy, latent, bias, alone)


@triton.jit(do_not_specialize=["nnz", "n_tokens", "window_bits", "d_sae", *_STREAMS[:2]])
def _update_wide_rows(
    values, latent_offsets, tokens, entries, row_scale, rows, row_stride, sums, weight_sums,
    p, m, s, copy, p_stride, m_stride, s_stride, copy_stride, buffer, d, nnz, n_tokens, window_bits, d_sae,
    lr, beta1_rest, beta2, beta2_rest, root, eps, decay, clip_value, shares, scale, stream_first, stream_second,
    LAZY: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """_update_rows with UNIT_NORM for rows of any width: `buffer` [programs, d] keeps what registers cannot.

    Its row holds the gradient, then the row before it is scaled to unit norm. Lanes read columns that other lanes may
    have written, hence the barriers.
    """
    own = buffer + tl.program_id(0).to(tl.int64) * d
    for f in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        latent = tl.cast(f, tl.int64)
        width = d
        if LAZY:
            width = tl.where(tl.load(latent_offsets + latent) < tl.load(latent_offsets + latent + 1), d, 0)
        products = tl.full([COLUMNS], 0.0, tl.float32)
        squares = tl.full([COLUMNS], 0.0, tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < d
            gradient, _ = sum_latent(
                values, latent_offsets, tokens, entries, row_scale, rows, row_stride, None, sums, weight_sums,
                latent, columns, inside, d, nnz, n_tokens, window_bits, ENTRIES,
            )  # fmt: skip
            row = tl.load(p + latent * p_stride + columns, mask=inside, other=0.0).to(tl.float32)
            products += gradient * row
            squares += row * row
            tl.store(own + columns, gradient, mask=inside)
        along = share_along(tl.sum(products, axis=0), tl.sum(squares, axis=0))
        tl.debug_barrier()
        squares = tl.full([COLUMNS], 0.0, tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < d
            at_m, at_s = latent * m_stride + columns, latent * s_stride + columns
            row = tl.load(p + latent * p_stride + columns, mask=inside, other=0.0).to(tl.float32)
            first = tl.load(m + at_m, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(s + at_s, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.load(own + columns, mask=inside, other=0.0) - along * row
            gradient = _clipped(gradient, latent, clip_value, shares, scale)
            row, first, second = _adam(
                row, gradient, first, second, lr, beta1_rest, beta2, beta2_rest, root, eps, decay
            )  # fmt: skip
            squares += tl.where(inside, row * row, 0.0)
            tl.store(own + columns, row, mask=inside)
            _store_moments(m, at_m, first, s, at_s, second, inside, stream_first, stream_second, latent, columns)
        squared = tl.sum(squares, axis=0)
        tl.debug_barrier()
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            row = _over_norm(tl.load(own + columns, mask=columns < d, other=0.0), squared)
            _store(p, latent * p_stride + columns, row, columns < d)
            if copy is not None:
                _store(copy, latent * copy_stride + columns, row, columns < d)
        tl.debug_barrier()


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
    """As reference.fused_update; a latent with a token or an entry out of range becomes NaN."""
    codes = latent_offsets.contiguous(), tokens.contiguous(), entries.contiguous()
    root = (1 - beta2**step) ** -0.5
    rates = lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, root, eps * root if lazy else eps, weight_decay
    adam = tuple(float(rate) for rate in rates)
    given = [*w_enc, *b_enc, *w_dec]
    used = [rows_of(t) if t.dim() == 2 else t.contiguous() for t in given]
    parts = len(w_enc)
    encoder, bias, decoder = (_Slot(*used[at : at + parts]) for at in (0, parts, 2 * parts))
    options = _Options(clip_value, clip_row_norm, gradient_scale, lazy, streams)
    of_encoder = grad_values.contiguous(), *codes, None
    _update(of_encoder, rows_of(x), vector(b_dec), encoder, bias, adam, False, options)
    of_decoder = values.contiguous(), *codes, vector(row_scale)
    if unit_norm and g.shape[1] > _WIDEST_ROW:
        _update_wide(of_decoder, rows_of(g), decoder, adam, options)
    else:
        _update(of_decoder, rows_of(g), None, decoder, None, adam, unit_norm, options)
    for theirs, ours in zip(given, used, strict=True):
        if theirs is not ours:
            theirs.copy_(ours)


class _Slot:
    """What takes the step, its moments, and the rounded copy if what takes it is a master."""

    def __init__(self, parameter: Tensor, first: Tensor, second: Tensor, master: Tensor | None = None):
        self.weight = parameter if master is None else master
        self.tensors = self.weight, first, second, None if master is None else parameter

    def with_strides(self) -> tuple[Tensor | int | None, ...]:
        return *self.tensors, *(0 if t is None else t.stride(0) for t in self.tensors)


class _Options(NamedTuple):
    clip_value: float | None
    clip_row_norm: float | None
    gradient_scale: Tensor | None
    lazy: bool
    streams: Sequence[int]

    def clips(
        self, codes: tuple, rows: Tensor, shift: Tensor | None, w: Tensor | None
    ) -> tuple[float | None, Tensor | None, Tensor | None]:
        """clip_value, shares and scale of the kernels; w is what rows are projected off."""
        if self.clip_row_norm is None:
            return self.clip_value, None, self.gradient_scale
        squares, _ = row_squares(codes, rows, shift, w, False, self.clip_value)
        return self.clip_value, row_shares(squares, self.clip_row_norm), self.gradient_scale


def _update(
    codes: tuple, rows: Tensor, shift: Tensor | None, slot: _Slot, bias: _Slot | None, adam: tuple,
    unit_norm: bool, options: _Options,
) -> None:  # fmt: skip
    windows = sum_windows(*codes, rows, shift)
    d_sae, d = slot.weight.shape
    columns, in_flight, launch_options = _blocks(d, slot.weight.dtype, unit_norm)
    encoder = bias is not None
    streams = stream_arguments(options.streams, 0 if encoder else 2)
    bias_streams = stream_arguments(options.streams if encoder else (), 1)
    launch(
        _update_rows, (d_sae, slices_of(d, columns)), *codes, rows, rows.stride(0), shift,
        windows.sums, windows.weight_sums, *slot.with_strides(), *((None,) * 4 if bias is None else bias.tensors),
        d, *_sizes(codes, rows, windows), *adam,
        *options.clips(codes, rows, shift, slot.weight if unit_norm else None), *streams, *bias_streams,
        UNIT_NORM=unit_norm, LAZY=options.lazy, COLUMNS=columns, ENTRIES=in_flight, **launch_options,
    )  # fmt: skip


def _update_wide(codes: tuple, rows: Tensor, slot: _Slot, adam: tuple, options: _Options) -> None:
    windows = sum_windows(*codes, rows, None)
    d_sae, d = slot.weight.shape
    programs = min(d_sae, _WIDE_PROGRAMS)
    buffer = torch.empty(programs, d, dtype=torch.float32, device=rows.device)
    launch(
        _update_wide_rows, (programs,), *codes, rows, rows.stride(0), windows.sums, windows.weight_sums,
        *slot.with_strides(), buffer, d, *_sizes(codes, rows, windows), d_sae, *adam,
        *options.clips(codes, rows, None, slot.weight), *stream_arguments(options.streams, 2),
        LAZY=options.lazy, COLUMNS=_WIDE_COLUMNS, ENTRIES=_in_flight(_WIDE_COLUMNS, slot.weight.dtype, 4),
        num_warps=4, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip


def _sizes(codes: tuple, rows: Tensor, windows: Windows) -> tuple[int, int, int]:
    """nnz, n_tokens, window_bits"""
    return codes[3].numel(), rows.shape[0], windows.window_bits


def _blocks(d: int, dtype: torch.dtype, unit_norm: bool) -> tuple[int, int, dict[str, int]]:
    """COLUMNS, ENTRIES and the launch's options of _update_rows."""
    if not unit_norm:
        return slice_width(d, dtype), _segments.ENTRIES, {"num_warps": 1, "maxnreg": _MOST_REGISTERS}
    columns = max(16, power_of_two(d))
    warps = max(1, columns // 256) if columns <= 1024 else 8
    return columns, _in_flight(columns, dtype, warps), {"num_warps": warps}


def _in_flight(columns: int, dtype: torch.dtype, warps: int) -> int:
    """How many rows are gathered at once."""
    return _GATHERED_BYTES // max(16, columns * dtype.itemsize // (32 * warps))


def _cases():
    adam = "lr fp32 beta1_rest fp32 beta2 fp32 beta2_rest fp32 root fp32 eps fp32 decay fp32"
    clips = "clip_value fp32 shares *fp32 scale *fp32 stream_first i32 stream_second i32"
    sizes = "d i32 nnz i32 n_tokens i32 window_bits i32"
    # Each dtype by itself, and bfloat16 with masters in float32; float32 and masters also with every option there is.
    plain = [(dtype, dtype, False) for dtype in TYPES] + [(torch.bfloat16, torch.float32, False)]
    for dtype, weight_dtype, every in [*plain, *((d, torch.float32, True) for d in (torch.float32, torch.bfloat16))]:
        t, w, masters = TYPES[dtype], TYPES[weight_dtype], dtype != weight_dtype
        moment = "bf16" if every else w
        codes = f"values *{t} latent_offsets *i64 tokens *i32 entries *i64 row_scale *fp32 rows *{t} row_stride i32"
        strides = "p_stride i32 m_stride i32 s_stride i32 copy_stride i32"
        slot = f"sums *fp32 weight_sums *fp32 p *{w} m *{moment} s *{moment} copy *{t} {strides}"
        bias = f"bias_p *{w} bias_m *{moment} bias_s *{moment} bias_copy *{t}"
        bias_streams = "bias_stream_first i32 bias_stream_second i32"
        no_copy = {} if masters else {"copy": None}
        no_options = {} if every else dict.fromkeys(["clip_value", "shares", "scale", *_STREAMS])
        no_bias = dict.fromkeys(["shift", "bias_p", "bias_m", "bias_s", "bias_copy", *_STREAMS[2:]])
        name = f"{t} masters" if masters else t
        name += " options" if every else ""
        for d in WIDTHS:
            encoder = {"row_scale": None} if masters else {"row_scale": None, "bias_copy": None}
            for what, unit_norm, absent in (("encoder", False, encoder), ("unit norm", True, no_bias)):
                columns, in_flight, options = _blocks(d, weight_dtype, unit_norm)
                constexprs = {"UNIT_NORM": unit_norm, "LAZY": every, "COLUMNS": columns, "ENTRIES": in_flight}
                yield case(
                    f"fused_update {what} {name} {d}",
                    _update_rows,
                    f"{codes} shift *{t} {slot} {bias} {sizes} {adam} {clips} {bias_streams}",
                    {**absent, **no_copy, **no_options, **constexprs},
                    **options,
                )
        in_flight = _in_flight(_WIDE_COLUMNS, weight_dtype, 4)
        no_options = {name: value for name, value in no_options.items() if name not in _STREAMS[2:]}
        yield case(
            f"fused_update wide {name} 12288",
            _update_wide_rows,
            f"{codes} {slot} buffer *fp32 {sizes} d_sae i32 {adam} {clips}",
            {**no_copy, **no_options, "LAZY": every, "COLUMNS": _WIDE_COLUMNS, "ENTRIES": in_flight},
            num_warps=4,
            maxnreg=_MOST_REGISTERS,
        )


COMPILE_CASES = list(_cases())
