"""What is timed: GEMMs alone, single operators, and each phase of each implementation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastsae import ops
from fastsae.bench import work
from fastsae.bench.implementations import Implementation
from fastsae.bench.problem import Problem

GEMM = ("gemm", "x @ W_enc")
GEMM_OUT = ("gemm", "torch.mm(x, W_enc, out=)")
STEP_PARTS = ("forward", "backward", "update")
# The order of a report.
PHASES = ("gemm", "encode", "decode", "sampled_dot", "transpose", "accumulate_rows", *STEP_PARTS, "step")


@dataclass(frozen=True)
class Case:
    """One call to time. If `run` returns a generator, each name that it yields is a part that is done."""

    phase: str
    implementation: str
    precision: str
    run: Callable[[], object]
    work: dict[str, work.Work]
    generator: bool = False


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gemms(problem: Problem) -> Iterator[Case]:
    """x @ W_enc in the dtype under test, allocating and not, and in the other dtype for comparison."""
    W_enc = problem.sae.W_enc.detach()
    counted = {"gemm": work.gemm(problem.shape)}
    out = problem.x.new_empty(problem.shape.n_tokens, problem.shape.d_sae)
    x, precision = problem.x, name_of(problem.dtype)
    yield Case(*GEMM, precision, lambda: x @ W_enc, counted)
    yield Case(*GEMM_OUT, precision, lambda: torch.mm(x, W_enc, out=out), counted)
    other = torch.float32 if problem.dtype == torch.bfloat16 else torch.bfloat16
    other_x, other_W = x.to(other), W_enc.T.to(other).T
    yield Case("gemm", f"x @ W_enc in {name_of(other)}", name_of(other), lambda: other_x @ other_W, counted)


def single_operators(problem: Problem) -> Iterator[Case]:
    """The products of the decoder's backward, as autograd calls them: accumulate_rows with its transposition."""
    codes, g, W_dec = problem.codes, problem.g, problem.sae.W_dec.detach()
    itemsize, shape, precision = problem.x.element_size(), problem.shape, name_of(problem.dtype)
    for phase, run, counted in (
        ("sampled_dot", lambda: ops.sampled_dot(g, codes, W_dec), work.sampled_dot(shape, itemsize)),
        ("transpose", lambda: ops.transpose(codes), work.transpose(shape)),
        ("accumulate_rows", lambda: ops.accumulate_rows(codes, g), work.accumulate_rows(shape, itemsize)),
    ):
        yield Case(phase, "fastsae", precision, run, {phase: counted})


def phases(problem: Problem, implementation: Implementation, train: bool) -> Iterator[Case]:
    """Encode and decode of one implementation, without gradients, and the whole step if `train`."""
    counted = implementation.work(problem.shape, problem.x.element_size())
    about = implementation.name, implementation.precision
    if not implementation.trains_only:
        encode, decode = _inference(problem, implementation)
        yield Case("encode", *about, encode, counted)
        yield Case("decode", *about, decode, counted)
    if train:
        yield Case("step", *about, lambda: implementation.step(problem), counted, generator=True)


def _inference(problem: Problem, implementation: Implementation) -> tuple[Callable[[], object], Callable[[], object]]:
    @torch.no_grad()
    def encode() -> object:
        return implementation.encode(problem, problem.x)

    codes = encode()

    @torch.no_grad()
    def decode() -> object:
        return implementation.decode(problem, codes)

    return encode, decode


def all_cases(problem: Problem, implementations: Sequence[Implementation], train: bool = True) -> list[Case]:
    """Every case of a run, in the order of a round: GEMMs, single operators, then each implementation."""
    cases = [*gemms(problem), *single_operators(problem)]
    for implementation in implementations:
        cases += phases(problem, implementation, train)
    return cases
