"""How dense must codes be for tiles to beat gathers on a CPU? The rule of fastsae/backends/dense_products.py, measured.

    python benchmarks/dense_crossover.py --out benchmarks/results/dense_crossover/NAME.json

Each operator on CSR codes of several densities three ways, in interleaved rounds: gathering a row for each entry, by
tiles that many tokens share, and torch's dense product of the codes laid out as [N, F] (laying them out included).
Gathers and tiles must agree to the bit and with the dense product to the precision of the dtype, or there is no file.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastsae import SparseCodes, ops
from fastsae.backends import dense_products, dispatch
from fastsae.bench import machine
from fastsae.bench.cases import Case
from fastsae.bench.timing import interleave
from fastsae.durable import replace_file
from fastsae.testing import assert_same_bits

SCHEMA = "fastsae-dense-crossover-1"
# d_sae over L0.
DENSITIES = (2, 4, 8, 16, 32, 64)
OPS = ("decode", "squared_error", "sampled_dot", "accumulate_rows")
WAYS = ("gathers", "tiles", "dense")
# Columns of what is printed into a file.
_FILE_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One operator at one density; seconds of each round by way, and medians of the ratios within a round."""

    op: str
    dtype: str
    latents_per_entry: int
    seconds: dict[str, list[float]]
    tiles_over_gathers: float
    tiles_over_dense: float


class Problem:
    """Codes of one density with everything their operators take."""

    def __init__(self, n_tokens: int, d_in: int, d_sae: int, latents_per_entry: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(n_tokens, d_sae, generator=generator) < 1 / latents_per_entry
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(0)])
        indices = kept.nonzero()[:, 1].int()
        values = torch.rand(len(indices), generator=generator).to(dtype)
        self.codes = SparseCodes(values, indices, d_sae, offsets=offsets)
        self.W_dec = torch.randn(d_sae, d_in, generator=generator).to(dtype) / d_in**0.5
        self.x = torch.randn(n_tokens, d_in, generator=generator).to(dtype)
        self.rows = torch.repeat_interleave(offsets.diff())

    def run(self, op: str, way: str) -> object:
        if way == "dense":
            return self._dense(op)
        # The rule under test stands aside; codes are ascending, as it would have found out.
        with mock.patch.object(dense_products, "pays", return_value=way == "tiles"):
            return self._sparse(op)

    def _sparse(self, op: str):
        if op == "decode":
            return ops.decode(self.codes, self.W_dec)
        if op == "squared_error":
            return ops.squared_error(self.codes, self.W_dec, None, self.x)
        if op == "sampled_dot":
            return ops.sampled_dot(self.x, self.codes, self.W_dec)
        return ops.accumulate_rows(self.codes, self.x)

    def _dense(self, op: str):
        if op == "sampled_dot":
            return (self.x @ self.W_dec.T)[self.rows, self.codes.indices]
        dense = self.codes.to_dense()
        if op == "accumulate_rows":
            return dense.T @ self.x
        y = dense @ self.W_dec
        if op == "decode":
            return y
        residual = y - self.x
        return residual, residual.float().square().sum(dim=1)

    def check(self, op: str) -> None:
        """Raises AssertionError where the three ways do not compute the same."""
        results = [self.run(op, way) for way in WAYS]
        gathers, tiles, dense = (result if isinstance(result, tuple) else (result,) for result in results)
        for one, other, plain in zip(gathers, tiles, dense, strict=True):
            assert_same_bits(one, other)
            scale = plain.float().square().mean().sqrt()
            error = (one.float() - plain.float()).square().mean().sqrt() / scale
            assert error < (1e-5 if self.x.dtype == torch.float32 else 2e-2), f"{op} is off the dense product: {error}"


@torch.no_grad()
def measured(problem: Problem, op: str, latents_per_entry: int, rounds: int) -> Row:
    problem.check(op)
    dtype = str(problem.x.dtype).removeprefix("torch.")
    cases = [Case(op, way, dtype, lambda way=way: problem.run(op, way), {}) for way in WAYS]
    samples = {way: found for (_, way), found in interleave(cases, rounds).items()}
    tiles = samples["tiles"]
    return Row(
        op, dtype, latents_per_entry, {way: found.seconds for way, found in samples.items()},
        tiles.ratio(samples["gathers"]), tiles.ratio(samples["dense"]),
    )  # fmt: skip


def shown(rows: list[Row]) -> Table:
    table = Table("operator", "dtype", "d_sae / L0", *(f"{way} ms" for way in WAYS), "tiles / gathers", "tiles / dense")
    for row in rows:
        times = (f"{1e3 * median(row.seconds[way]):,.1f}" for way in WAYS)
        ratios = f"{row.tiles_over_gathers:.2f}", f"{row.tiles_over_dense:.2f}"
        table.add_row(row.op, row.dtype, str(row.latents_per_entry), *times, *ratios)
    return table


def main(
    out: Annotated[Path | None, typer.Option(help="Write the record to this file.")] = None,
    n_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    d_in: Annotated[int, typer.Option(min=1)] = 768,
    d_sae: Annotated[int, typer.Option(min=1)] = 24_576,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Times gathers, tiles and dense products on codes of several densities."""
    began, described = datetime.now(timezone.utc).isoformat(timespec="seconds"), machine.describe()
    rows = []
    with dispatch.backend("cpu"):
        for dtype, latents_per_entry in itertools.product((torch.float32, torch.bfloat16), DENSITIES):
            problem = Problem(n_tokens, d_in, d_sae, latents_per_entry, dtype)
            rows += [measured(problem, op, latents_per_entry, rounds) for op in OPS]
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(shown(rows))
    if out is not None:
        record = {
            "schema": SCHEMA,
            "date": began,
            "machine": described,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "settings": {"threads": torch.get_num_threads(), "rounds": rounds},
            "shape": {"n_tokens": n_tokens, "d_in": d_in, "d_sae": d_sae},
            "rows": [asdict(row) for row in rows],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
