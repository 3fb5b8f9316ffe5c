"""What a screen costs: every encoder and the whole step over one float32 product, by kind of screen.

    python benchmarks/screens.py                                            # the table
    python benchmarks/screens.py --out benchmarks/results/screens/NAME.json
    FASTSAE_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python benchmarks/screens.py --kind int16                           # torch held to AVX2 too

Of each case first the bits: the selection of every screen must be that of the float32 screen, or no time is shown. Then
interleaved rounds; a ratio is the median of those within a round, over `torch.mm(x, W, out=)` in float32 of the same x.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastsae
from fastsae.backends import native
from fastsae.bench import machine
from fastsae.durable import replace_file

SCHEMA = "fastsae-screens-1"
KINDS = ("bfloat16", "int8", "int16", "float32")


@dataclass(frozen=True)
class Case:
    """A problem, what is timed on it, and what it is meant to reach over the product."""

    name: str
    n_tokens: int
    d_in: int
    d_sae: int
    k: int
    target: float
    rule: str = "topk"
    outliers: bool = False


CASES = (
    Case("encode_topk", 2048, 768, 24576, 32, 0.32),
    Case("encode_topk, outlier dimensions", 2048, 768, 24576, 32, 0.46, outliers=True),
    Case("encode_threshold, L0 64", 2048, 768, 24576, 64, 0.32, rule="threshold"),
    Case("encode_topk, wide", 1024, 4096, 16384, 64, 0.46),
    Case("step with FusedAdam", 2048, 768, 24576, 32, 0.45, rule="step"),
    Case("step with FusedAdam, 8,192 tokens", 8192, 768, 24576, 32, 0.45, rule="step"),
)


@dataclass(frozen=True)
class Found:
    """Seconds of one case with one screen, round by round, and of the product beside it."""

    case: Case
    kind: str
    seconds: list[float]
    product_seconds: list[float]

    @property
    def ratio(self) -> float:
        return median(a / b for a, b in zip(self.seconds, self.product_seconds, strict=True))


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian x [n_tokens, d_in], W_enc [d_in, d_sae] of unit rows, feature-major, and small biases."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.n_tokens, case.d_in, generator=generator)
    w = torch.nn.functional.normalize(torch.randn(case.d_sae, case.d_in, generator=generator), dim=1)
    if case.outliers:
        x[:, [3, 100, 500]] *= 30
        w[:, [3, 100, 500]] /= 30
    return x, w.T, torch.randn(case.d_sae, generator=generator) / 100


def timed_call(case: Case, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Callable[[], fastsae.SparseCodes | None]:
    if case.rule == "step":
        sae = fastsae.TopKSAE(case.d_in, case.d_sae, case.k)
        optimizer = fastsae.optim.FusedAdam(sae, lr=1e-4)
        return lambda: optimizer.step(x) and None
    if case.rule == "threshold":
        some = x[:64] @ W_enc + b_enc
        level = float(some.flatten().topk(64 * case.k).values[-1])
        threshold = torch.full((case.d_sae,), level)
        return lambda: fastsae.ops.encode_threshold(x, W_enc, b_enc, threshold)
    return lambda: fastsae.ops.encode_topk(x, W_enc, b_enc, case.k)


def same(codes: fastsae.SparseCodes | None, others: fastsae.SparseCodes | None) -> bool:
    if codes is None or others is None:
        return True
    offsets = codes.offsets is others.offsets is None or codes.offsets.equal(others.offsets)
    return offsets and codes.indices.equal(others.indices) and codes.values.equal(others.values)


def seconds_of(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(case: Case, kinds: list[str], rounds: int) -> list[Found]:
    """Raises SystemExit if a screen changes a bit."""
    x, W_enc, b_enc = problem(case)
    rows, out = W_enc.contiguous(), torch.empty(case.n_tokens, case.d_sae)
    calls = {kind: timed_call(case, x, W_enc, b_enc) for kind in kinds}

    def by(kind: str) -> fastsae.SparseCodes | None:
        os.environ["FASTSAE_SCREEN"] = kind
        return calls[kind]()

    expected = None
    if case.rule != "step":
        os.environ["FASTSAE_SCREEN"] = "float32"
        expected = timed_call(case, x, W_enc, b_enc)()
    for kind in kinds:
        if not same(by(kind), expected):
            raise SystemExit(f"{case.name} with a screen in {kind} differs from that in float32: no times")
    found = {kind: Found(case, kind, [], []) for kind in kinds}
    for _ in range(rounds):
        product = seconds_of(lambda: torch.mm(x, rows, out=out))
        for kind in kinds:
            found[kind].seconds.append(seconds_of(lambda kind=kind: by(kind)))
            found[kind].product_seconds.append(product)
    return list(found.values())


def main(
    kind: Annotated[list[str] | None, typer.Option(help="Screens; repeatable. Default: all four.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    shrink: Annotated[int, typer.Option(min=1, help="Divides tokens and latents: a first look.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the record to this file.")] = None,
) -> None:
    """Times every case with every screen beside one product."""
    kinds, began = list(kind or KINDS), datetime.now(timezone.utc).isoformat(timespec="seconds")
    described = machine.describe()
    table = Table("case", "screen", "ms", "over mm(out=)", "reach", title=f"instruction set {native.cpu.isa()}")
    found = []
    for case in CASES:
        sizes = {"n_tokens": case.n_tokens // shrink, "d_sae": case.d_sae // shrink}
        for one in measure(Case(**asdict(case) | sizes), kinds, rounds):
            found.append(one)
            table.add_row(
                case.name, one.kind, f"{median(one.seconds) * 1e3:,.1f}", f"{one.ratio:.2f}", f"{case.target:.2f}"
            )
    Console(width=120).print(table)
    if out is not None:
        record = {
            "schema": SCHEMA,
            "date": began,
            "machine": described,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "threads": torch.get_num_threads(),
            "rows": [asdict(one) | {"ratio": one.ratio} for one in found],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
