"""Does a screen ever change what encode_topk selects? Millions of rows against the path that computes every value.

    python benchmarks/fuzz_selection.py                                     # 200,000 rows: a first look
    python benchmarks/fuzz_selection.py --rows 10000000 --out benchmarks/results/fuzz_selection/NAME.json

Every problem is drawn by its number, in sizes off every block, and then made difficult (`SPOILERS`). For each screen of
this machine values and indices must be those of the exhaustive path to the bit; what differs is counted, printed with
the numbers that draw it again, and makes the exit status 1.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor

from fastsae.backends.screen import Screen
from fastsae.bench import machine
from fastsae.durable import replace_file

SCHEMA = "fastsae-fuzz-selection-1"
SCREENS = (torch.int8, torch.int16, torch.bfloat16, torch.float32)


@dataclass
class Problem:
    """Arguments of encode_topk, and what they were spoiled by."""

    x: Tensor
    w_enc: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None
    k: int
    relu_first: bool
    scale: Tensor | None
    spoiled: tuple[str, ...]


def _some(count: int, share: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < share


def _last_bits(p: Problem, g: torch.Generator) -> None:
    """Weights that differ from one another in their last bits only."""
    steps = torch.randint(-3, 4, p.w_enc.shape, generator=g)
    p.w_enc[:] = p.w_enc[:1] * (1 + steps * torch.finfo(p.w_enc.dtype).eps)


def _near_ties(p: Problem, g: torch.Generator) -> None:
    """Weights in one direction, their lengths apart by less than a screen can tell, or by a little more."""
    spread = 10.0 ** -float(torch.randint(1, 8, (), generator=g))
    p.w_enc[:] = p.w_enc[:1] * (1 + spread * torch.rand(len(p.w_enc), 1, generator=g))


def _duplicates(p: Problem, g: torch.Generator) -> None:
    p.w_enc[:] = p.w_enc[torch.randint(0, max(1, len(p.w_enc) // 40), (len(p.w_enc),), generator=g)]


def _cancelling(p: Problem, g: torch.Generator) -> None:
    """Scores that are differences of large numbers."""
    half = p.x.shape[1] // 2
    p.x[:, half : 2 * half] = p.x[:, :half]
    p.w_enc[:, half : 2 * half] = -p.w_enc[:, :half] * (1 + 1e-3 * torch.randn(len(p.w_enc), half, generator=g))


def _cancelled_by_bias(p: Problem, g: torch.Generator) -> None:
    p.b_enc = -(p.w_enc.float() @ p.x[0].float())


def _outlier_dimensions(p: Problem, g: torch.Generator) -> None:
    p.x[:, _some(p.x.shape[1], 0.05, g)] *= 10.0 ** float(torch.randint(1, 5, (), generator=g))


def _outlier_weights(p: Problem, g: torch.Generator) -> None:
    p.w_enc[torch.rand(p.w_enc.shape, generator=g) < 0.01] *= 100


def _balanced_outliers(p: Problem, g: torch.Generator) -> None:
    """Large dimensions of x with weights as small, as models have them."""
    large = _some(p.x.shape[1], 0.05, g)
    p.x[:, large] *= 30
    p.w_enc[:, large] /= 30


def _uneven_rows(p: Problem, g: torch.Generator) -> None:
    p.x *= torch.randn(len(p.x), 1, generator=g).mul(8).exp()


def _uneven_latents(p: Problem, g: torch.Generator) -> None:
    p.w_enc *= torch.randn(len(p.w_enc), 1, generator=g).mul(4).exp()


def _huge(p: Problem, g: torch.Generator) -> None:
    p.x[_some(len(p.x), 0.1, g)] *= 1e30
    p.w_enc[_some(len(p.w_enc), 0.02, g)] *= 1e25


def _tiny(p: Problem, g: torch.Generator) -> None:
    p.x[_some(len(p.x), 0.1, g)] *= 1e-36
    p.w_enc[_some(len(p.w_enc), 0.1, g)] *= 1e-38


def _denormal(p: Problem, g: torch.Generator) -> None:
    p.x *= 1e-40


def _zeros(p: Problem, g: torch.Generator) -> None:
    p.x[_some(len(p.x), 0.2, g)] = 0
    p.w_enc[_some(len(p.w_enc), 0.2, g)] = 0


def _integers(p: Problem, g: torch.Generator) -> None:
    """Sums are exact and most of them tie."""
    p.x.copy_(p.x.clamp(-2, 2).round())
    p.w_enc.copy_(p.w_enc.clamp(-2, 2).round())


def _not_finite(p: Problem, g: torch.Generator) -> None:
    for tensor in (p.x, p.w_enc):
        places = torch.randint(0, tensor.numel(), (2,), generator=g)
        tensor.view(-1)[places] = torch.tensor([torch.nan, -torch.inf], dtype=tensor.dtype)


SPOILERS: dict[str, Callable[[Problem, torch.Generator], None]] = {
    function.__name__.strip("_"): function
    for function in (
        _last_bits, _near_ties, _duplicates, _cancelling, _cancelled_by_bias, _outlier_dimensions, _outlier_weights,
        _balanced_outliers, _uneven_rows, _uneven_latents, _huge, _tiny, _denormal, _zeros, _integers, _not_finite,
    )
}  # fmt: skip


def draw(seed: int, number: int) -> Problem:
    """The problem of this number; a third of them as they are, the others spoiled once or twice."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def one_of(*choices):
        return choices[int(torch.randint(0, len(choices), (), generator=g))]

    n_tokens, d_in = one_of(37, 199, 1100, 2000), one_of(1, 7, 16, 33, 50, 64, 130)
    d_sae = one_of(256, 300, 511, 513, 700, 1100)
    dtype = one_of(torch.float32, torch.float32, torch.bfloat16)
    x = torch.randn(n_tokens, d_in, generator=g)
    w_enc = torch.randn(d_sae, d_in, generator=g)
    b_enc = one_of(None, torch.randn(d_sae, generator=g))
    b_dec = one_of(None, torch.randn(d_in, generator=g))
    scale = one_of(None, None, torch.rand(d_sae, generator=g) * 3)
    problem = Problem(x, w_enc, b_enc, b_dec, one_of(1, 2, 8, 33, 64), one_of(False, True), scale, ())
    names = [one_of(*SPOILERS) for _ in range(one_of(0, 1, 2))]
    for name in names:
        SPOILERS[name](problem, g)
    problem.x, problem.w_enc, problem.spoiled = problem.x.to(dtype), problem.w_enc.to(dtype), tuple(names)
    return problem


def selected(p: Problem, dtype: torch.dtype, exhaustive: bool) -> tuple[Tensor, Tensor]:
    screen = Screen(p.x, p.w_enc, p.b_enc, p.b_dec, p.k, p.relu_first, p.scale, dtype)
    screen.exhaustive = screen.exhaustive or exhaustive
    values, indices = p.x.new_empty(len(p.x), p.k), torch.empty(len(p.x), p.k, dtype=torch.int32)
    screen.run(values, indices)
    return values, indices


def disagreements(p: Problem) -> Counter:
    """Rows whose values or indices differ from those of the exhaustive path, by screen."""
    values, indices = selected(p, torch.float32, True)
    found: Counter = Counter()
    for dtype in SCREENS:
        other_values, other_indices = selected(p, dtype, False)
        same = (values == other_values) | (values.isnan() & other_values.isnan())
        found[str(dtype)[6:]] += int((~(same & (indices == other_indices))).any(dim=1).sum())
    return found


def main(
    rows: Annotated[int, typer.Option(min=1, help="Rows to go through, each by every screen.")] = 200_000,
    seed: Annotated[int, typer.Option(help="Another seed draws other problems.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the record to this file.")] = None,
) -> None:
    """Compares every screen's selection with that of the exhaustive path, to the bit."""
    began, described = datetime.now(timezone.utc).isoformat(timespec="seconds"), machine.describe()
    start, done, number = time.perf_counter(), 0, 0
    wrong, spoiled = Counter({str(dtype)[6:]: 0 for dtype in SCREENS}), Counter()
    steps = track(range(10**9), total=None, description="rows", transient=True) if rows > 10**6 else range(10**9)
    for number in steps:
        problem = draw(seed, number)
        found = disagreements(problem)
        if any(found.values()):
            typer.echo(f"--seed {seed}, problem {number} ({', '.join(problem.spoiled)}): {dict(found)} rows differ")
        wrong.update(found)
        spoiled.update(dict.fromkeys(problem.spoiled or ("nothing",), len(problem.x)))
        done += len(problem.x)
        if done >= rows:
            break
    typer.echo(f"{done:,} rows of {number + 1:,} problems: {dict(wrong)} rows differ")
    if out is not None:
        record = {
            "schema": SCHEMA,
            "date": began,
            "machine": described,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "seed": seed,
            "problems": number + 1,
            "rows": done,
            "rows_that_differ": dict(wrong),
            "rows_spoiled_by": dict(sorted(spoiled.items())),
            "seconds": round(time.perf_counter() - start, 1),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, (json.dumps(record, indent=1) + "\n").encode())
    if any(wrong.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
