"""A library's own training run before and after fastsae.accelerate: a gate, rounds of both in turn, memory, a record.

Used by benchmarks/interop_dictionary_learning.py and benchmarks/interop_sparsify.py.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.bench import machine
from fastsae.bench.memory import CHILD_ENVIRONMENT, HostMemory
from fastsae.durable import replace_file

RESULTS = Path(__file__).resolve().parent / "results" / "interop"
SIDES = ("before", "after")
# The first steps of a run build optimizer state and gradients.
WARM_UP_STEPS = 2


@dataclass
class Run:
    """One run of a library's training loop: seconds and loss of each step, the first ones among them."""

    step_seconds: list[float]
    losses: list[float]
    # Of a step what is not the SAE's: the model that makes its activations.
    other_seconds: float = 0.0


def arguments(description: str, name: str, **more: dict[str, Any]) -> argparse.Namespace:
    """The command line of both; `more` are a library's own options for add_argument."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=8, help=f"of a run, {WARM_UP_STEPS} of them to warm up")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--gate-tokens", type=int, default=256)
    parser.add_argument("--gate-steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    for option, settings in more.items():
        parser.add_argument(f"--{option}", **settings)
    given = parser.parse_args()
    if given.steps <= WARM_UP_STEPS:
        parser.error(f"--steps {given.steps}: expected more than the {WARM_UP_STEPS} that warm up")
    torch.set_num_threads(given.threads)
    return given


def losses_agree(exact: Sequence[float], plain: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """fastsae.testing's rule, for losses step by step: our error may be twice the library's, and one rounding more.

    `exact` are the library's in float64, `plain` the library's in float32, `ours` the accelerated in float32.
    """
    exact, plain, ours = (torch.tensor(losses, dtype=torch.float64) for losses in (exact, plain, ours))
    error_of_plain, error_of_ours = (float(((t - exact) / exact).abs().max()) for t in (plain, ours))
    allowed = 2 * error_of_plain + torch.finfo(torch.float32).eps
    found = {"steps": len(exact), "error": error_of_ours, "error_before": error_of_plain, "allowed": allowed}
    return found | {"agree": error_of_ours <= allowed}


def mixture(tokens: int, d_in: int, seed: int = 0) -> Tensor:
    """Activations [tokens, d_in] of 4 d_in directions, 16 in each token, with noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    active = torch.randint(0, 4 * d_in, (tokens, 16), generator=generator)
    strengths = torch.rand(tokens, 16, generator=generator)
    x = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=strengths, mode="sum")
    return x + 0.02 * torch.randn(tokens, d_in, generator=generator)


def peak_of(side: str) -> int:
    """Peak resident memory of a process that does one run of this script's."""
    command = [sys.executable, *sys.argv, "--peak-of", side]
    child = subprocess.run(command, env=os.environ | CHILD_ENVIRONMENT, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"the process that measures memory ended with {child.returncode}:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])["peak_bytes"]


def compare(
    given: argparse.Namespace,
    packages: Sequence[str],
    gate: Callable[[], dict[str, Any]],
    run: Callable[[str], Run],
) -> None:
    """Gate, rounds, memory, record; with --peak-of only one run and its peak. Exits with 1 if losses differ."""
    if given.peak_of is not None:
        run(given.peak_of)
        print(json.dumps({"peak_bytes": HostMemory().peak()}))
        return
    checked = gate()
    print(f"losses of {checked['steps']} steps: error {checked['error']:.2g}, allowed {checked['allowed']:.2g}")
    if not checked["agree"]:
        sys.exit("the losses do not agree: nothing is measured")
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for number in range(given.rounds):
        for side in SIDES:
            gc.collect()
            runs[side].append(run(side))
            seconds = statistics.median(runs[side][-1].step_seconds[WARM_UP_STEPS:])
            print(f"round {number + 1}, {side}: {seconds:.3f} s a step", flush=True)
    peaks = {side: peak_of(side) for side in SIDES}
    summary = {side: _summary(runs[side], given.tokens) | {"peak_bytes": peaks[side]} for side in SIDES}
    ratios = {
        "run": summary["before"]["step_seconds"] / summary["after"]["step_seconds"],
        "sae": summary["before"]["sae_seconds"] / summary["after"]["sae_seconds"],
        "peak_bytes": peaks["before"] / peaks["after"],
    }
    pairs = zip(runs["before"], runs["after"], strict=True)
    differences = [abs(a / b - 1) for one, other in pairs for a, b in zip(other.losses, one.losses, strict=True)]
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "peak_of")}
    record = {
        "schema": "fastsae-interop-1",
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions() | {name: importlib.metadata.version(name) for name in packages},
        "commit": machine.commit(),
        "settings": settings,
        "gate": checked,
        "largest_difference_of_losses": max(differences),
        "summary": summary,
        "ratios": ratios,
        "runs": {side: [asdict(one) for one in runs[side]] for side in SIDES},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(given.out, (json.dumps(record, indent=1) + "\n").encode())
    _show(summary, ratios)
    print(f"written to {given.out}")


def _summary(runs: Sequence[Run], tokens: int) -> dict[str, float]:
    """Medians over the steps of all rounds, without those that warm up."""
    steps = statistics.median(seconds for run in runs for seconds in run.step_seconds[WARM_UP_STEPS:])
    other = statistics.median(run.other_seconds for run in runs)
    return {"step_seconds": steps, "sae_seconds": steps - other, "tokens_per_second": tokens / steps}


def _show(summary: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
    print(f"{'':8}{'tokens/s':>12}{'step, s':>12}{'SAE, s':>12}{'peak, GB':>12}")
    for side, row in summary.items():
        print(
            f"{side:8}{row['tokens_per_second']:12.0f}{row['step_seconds']:12.3f}{row['sae_seconds']:12.3f}"
            f"{row['peak_bytes'] / 1e9:12.2f}"
        )
    print(f"run {ratios['run']:.2f} x, SAE's part {ratios['sae']:.2f} x, peak memory {ratios['peak_bytes']:.2f} x less")
