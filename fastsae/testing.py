"""For tests of code built on fastsae: every way an operator can run here, one rule of tolerance, and the defined
dot product in numpy.

    @pytest.mark.parametrize("backend", fastsae.testing.backends(), ids=str)
    def test_my_layer(backend):
        with backend.active():
            y = my_layer(x)
        fastsae.testing.assert_accurate(y, dense_layer, x)
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsae.backends import dispatch, native
from fastsae.codes import SparseCodes


def _wanted() -> list[str]:
    return [name.strip() for name in os.environ.get("FASTSAE_TEST_BACKENDS", "").split(",") if name.strip()]


@dataclass(frozen=True)
class Backend:
    """One way to run every operator: a backend's name, for native code the instruction set, and where tensors are."""

    name: str
    isa: str | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        parts = self.name, self.isa, self.device if self.device != "cpu" else None
        return "-".join(part for part in parts if part)

    @property
    def _names(self) -> set[str]:
        return {str(self), self.name, *(["cuda"] if self.device == "cuda" else [])}

    @property
    def interpreted(self) -> bool:
        """Whether this is Triton's interpreter, which takes a hundred times as long as the others."""
        return self.name == "triton" and self.device == "cpu"

    @property
    def spared(self) -> bool:
        """Whether costly tests leave it out: Triton's interpreter, unless FASTSAE_TEST_BACKENDS names it."""
        return self.interpreted and "triton" not in _wanted()

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The floating dtypes that it computes in; where it is spared without float16, which goes as bfloat16 does."""
        if self.name == "cpu":
            return (torch.float32, torch.bfloat16)
        if self.name == "triton":
            return (torch.float32, torch.bfloat16) if self.spared else (torch.float32, torch.bfloat16, torch.float16)
        return (torch.float64, torch.float32, torch.bfloat16, torch.float16)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Sends every operator here for a while; tensors that name no device are made on this one."""
        previous = None
        if self.isa is not None:
            previous = native.cpu.isa()
            if not native.cpu.select_isa(self.isa):
                raise ValueError(f"{self}: this build or processor has no {self.isa}")
        try:
            with dispatch.backend(self.name), torch.device(self.device):
                yield
        finally:
            if previous is not None:
                native.cpu.select_isa(previous)


def backends() -> list[Backend]:
    """Every way to run an operator on this machine.

    Plain PyTorch, the native code with each instruction set, and, with a GPU, plain PyTorch and Triton there; without
    one, Triton's interpreter if TRITON_INTERPRET=1. FASTSAE_TEST_BACKENDS picks some by name: `torch`, `cpu` (all
    instruction sets), `cpu-avx2`, `triton` or `cuda` (all that runs on a GPU), separated by commas.
    """
    known = [Backend("torch")]
    if native.cpu is not None:
        usable = [isa for isa, _, runs_here in native.cpu.isas() if runs_here]
        # avx512_amx is avx512_bf16 with other products in its screens, which have tests of their own.
        spared = "avx512_bf16" if "avx512_amx" in usable and "cpu-avx512_bf16" not in _wanted() else None
        known += [Backend("cpu", isa) for isa in usable if isa != spared]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        known.append(Backend("torch", device=device))
    if dispatch.BACKENDS["triton"].why_not("decode", torch.device(device), torch.float32) == "":
        known.append(Backend("triton", device=device))
    wanted = _wanted()
    for name in wanted:
        if not any(name in backend._names for backend in known):
            raise ValueError(f"FASTSAE_TEST_BACKENDS names {name!r}: this machine has {', '.join(map(str, known))}")
    return [backend for backend in known if not wanted or not backend._names.isdisjoint(wanted)]


def backend_dtypes() -> list[tuple[Backend, torch.dtype]]:
    """Each of `backends()` with each dtype it computes in."""
    return [(backend, dtype) for backend in backends() for dtype in backend.dtypes]


def gradients(function: Callable, inputs: Sequence[Tensor | None], *grads: Tensor) -> tuple[Tensor, ...]:
    """Gradients of function(*inputs), weighted by `grads` (one for each result), for every input that is not None."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*inputs), [t for t in inputs if t is not None], grads)


def assert_accurate(actual: Tensor | Sequence[Tensor], formula: Callable, *inputs: Tensor | None) -> None:
    """Holds results to the numerics contract: the error of each is at most twice that of plain PyTorch.

    `formula` is the obvious dense PyTorch for the same results. Called with `inputs` in float64 it gives the exact
    results; called with them in the dtype of a result, it gives the error that plain PyTorch makes there.
    Errors are the largest over a tensor, as a share of its largest exact value. The error of one call is one draw
    of a random quantity (for a result of seven numbers it varies fivefold), so plain PyTorch is measured on the
    inputs times 1, 15/16, ..., 9/16, which rounds anew each time, and the largest of the eight counts. One unit in
    the last place of the largest value is allowed on top: sums of one term, or of terms that happen not to round,
    are exact in plain PyTorch, while another order of the same sum is one rounding away: no order is owed that luck.

    A float64 result has no more exact one to be held to. There plain PyTorch is measured in float32 and its error
    scaled by 2⁻²⁹, the ratio of the two roundings; draw the inputs in float32, so that they are the same in both.

    NaN and infinities of the exact result must stand in `actual` at the same places with the same sign.
    """
    results = [actual] if isinstance(actual, Tensor) else actual
    exact = _run(formula, inputs, torch.float64)
    for i, result in enumerate(results):
        assert result.shape == exact[i].shape, f"result {i}: shape {tuple(result.shape)}, not {tuple(exact[i].shape)}"
        error = _relative_error(result, exact[i])
        measured = torch.float32 if result.dtype == torch.float64 else result.dtype
        eps = torch.finfo(result.dtype).eps
        allowed = 0.0
        for sixteenths in range(8):
            plain = _error_of_plain(formula, inputs, 1 - sixteenths / 16, measured, i)
            assert math.isfinite(plain), f"result {i}: plain PyTorch overflows on these inputs and measures nothing"
            allowed = max(allowed, 2 * plain * eps / torch.finfo(measured).eps + eps)
            if error <= allowed:
                break
        # A NaN error gets here too.
        else:
            raise AssertionError(f"result {i}: error {error:.3g} of the largest value, allowed {allowed:.3g}")


def _error_of_plain(
    formula: Callable, inputs: Sequence[Tensor | None], factor: float, dtype: torch.dtype, i: int
) -> float:
    scaled = [(t * factor).to(dtype) if t is not None and t.is_floating_point() else t for t in inputs]
    return _relative_error(_run(formula, scaled, dtype)[i], _run(formula, scaled, torch.float64)[i])


def _run(formula: Callable, inputs: Sequence[Tensor | None], dtype: torch.dtype) -> Sequence[Tensor]:
    results = formula(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs))
    return [results] if isinstance(results, Tensor) else results


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest |actual - exact| over finite exact values, as a share of the largest; inf where others differ."""
    finite = exact.isfinite()
    if not ((actual == exact) | (actual.isnan() & exact.isnan()) | finite).all():
        return math.inf
    if not finite.any():
        return 0.0
    exact = exact[finite]
    error = (actual[finite].double() - exact).abs().max().item()
    return error / exact.abs().max().item() if error else 0.0


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal in shape, dtype and every value; NaN equals NaN, and 0 equals -0."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, the first at {(~same).nonzero()[0].tolist()}"


def random_codes(
    n_tokens: int, d_sae: int, k: int | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> SparseCodes:
    """Normal values at random places, `k` a token; with k None in CSR, from no entry to a third of all latents.

    No place occurs twice in a token.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    places = torch.rand(n_tokens, d_sae, generator=generator).argsort(dim=1).int()
    if k is not None:
        values = torch.randn(n_tokens, k, generator=generator)
        return SparseCodes(values.to(dtype), places[:, :k].contiguous(), d_sae)
    counts = torch.randint(0, d_sae // 3 + 2, (n_tokens,), generator=generator)
    counts[: n_tokens // 4] = 0
    kept = torch.arange(d_sae) < counts[:, None]
    offsets = torch.cat([counts.new_zeros(1), kept.sum(dim=1).cumsum(0)])
    values = torch.randn(int(offsets[-1]), generator=generator)
    return SparseCodes(values.to(dtype), places[kept], d_sae, offsets=offsets)


# The defined dot product, for tests of native code to the bit. Nothing below shares code with it.


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a·b + c rounded once, as the processor's fused multiply-add rounds.

    A product of two float32 is exact in float64 (48 bits of 53). The sum with c is rounded to float64 towards odd:
    where the error that TwoSum finds is not zero, the last bit is set by moving towards the exact sum if it is
    clear. Rounding to odd with 53 bits and then to nearest with 24 (or fewer, among denormals) is one rounding to
    nearest, since 53 >= 24 + 2 (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        c = c.astype(np.float64)
        total = product + c
        back = total - product
        lost = (product - (total - back)) + (c - back)
        inexact = np.isfinite(total) & (lost != 0) & (total.view(np.int64) & 1 == 0)
        odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        return np.where(inexact, odd, total).astype(np.float32)


def defined_dot(x: Tensor, w: Tensor) -> Tensor:
    """<x_n, w_f> for every n and f by the definition of docs/maths.md, to the bit: float32 [n, f].

    Sixteen partial sums, lane l taking places l, l + 16, ... by fused multiply-adds, then halves added to halves.
    Zeros pad the width to a multiple of 16.
    """
    x, w = (np.pad(t.float().numpy(), ((0, 0), (0, -t.shape[1] % 16))) for t in (x, w))
    lanes = np.zeros((x.shape[0], w.shape[0], 16), dtype=np.float32)
    for at in range(0, x.shape[1], 16):
        lanes = fma(x[:, None, at : at + 16], w[None, :, at : at + 16], lanes)
    with np.errstate(all="ignore"):
        for width in (8, 4, 2, 1):
            lanes = lanes[..., :width] + lanes[..., width:]
    return torch.from_numpy(np.ascontiguousarray(lanes[..., 0]))


def defined_preactivations(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> Tensor:
    """What the native encoder ranks, float32 [n_tokens, d_sae]: the defined dot product of x - b_dec, plus b_enc."""
    centred = x.float() if b_dec is None else x.float() - b_dec.float()
    pre = defined_dot(centred, w_enc)
    return pre if b_enc is None else pre + b_enc.float()


def defined_encode_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    relu_first: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """encode_topk of x [n_tokens, d_in] with w_enc [d_sae, d_in] as native code must return it, to the bit."""
    pre = defined_preactivations(x, w_enc, b_enc, b_dec)
    rank = pre if scale is None else pre * scale.float()
    if relu_first:
        rank, pre = rank.relu(), pre.where(~(rank <= 0), 0)
    indices = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return pre.gather(1, indices).to(x.dtype), indices.int()


def defined_encode_batch_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k_total: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """encode_batch_topk of x [n_tokens, d_in] with w_enc [d_sae, d_in] as native code must return it, to the bit."""
    pre = defined_preactivations(x, w_enc, b_enc, b_dec)
    rank = (pre if scale is None else pre * scale.float()).reshape(-1)
    candidates = [(-r, place) for place, r in enumerate(rank.tolist()) if 0 < r < math.inf]
    kept = ~(rank < math.inf)
    kept[[place for _, place in sorted(candidates)[:k_total]]] = True
    return (pre.reshape(-1)[kept].to(x.dtype), *_places(kept.reshape(pre.shape)))


def defined_encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """encode_threshold of x [n_tokens, d_in] with w_enc [d_sae, d_in] as native code must return it, to the bit."""
    pre = defined_preactivations(x, w_enc, b_enc, b_dec)
    kept = ~(pre <= threshold.float())
    return (pre[kept].to(x.dtype), *_places(kept))


def _places(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and offsets of the entries of a mask [n_tokens, d_sae]."""
    counts = kept.sum(dim=1)
    return kept.nonzero()[:, 1].int(), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
