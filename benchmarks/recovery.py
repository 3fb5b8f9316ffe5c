"""Do SAEs find the features that are there? Each architecture at three settings, on data whose features are known.

    python benchmarks/recovery.py                      # everything, some minutes; goes on where it was cut off
    python benchmarks/recovery.py --quick              # few steps: does it run?
    python benchmarks/recovery.py --only TopKSAE       # one architecture (or a setting's name); repeatable
    python benchmarks/recovery.py --plot-only          # the picture again, from the record

Settings are in benchmarks/recovery_settings.py. A feature is recovered if some latent's decoder direction has a cosine
of at least 0.9 with it (fastsae.evaluation.feature_recovery). Each finished run is in the record at once.
"""

import json
import re
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from recovery_plot import DRAWN, draw
from recovery_settings import DATA, SETTINGS, Data, Setting
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import fastsae
from fastsae.bench import machine
from fastsae.durable import replace_file
from fastsae.evaluation import Recovery, evaluate, feature_recovery
from fastsae.training import TrainConfig, update, warmup_and_decay
from fastsae.training.schedule import scheduled

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks/results/recovery/recovery.json"
QUICK_RECORD = ROOT / "build/recovery-quick.json"
SCHEMA = "fastsae-recovery-1"

BATCH, STEPS, QUICK_STEPS = 1024, 1000, 60
# Activations are drawn once and gone through again: these are far more than an SAE of this size can learn by heart.
TRAINING_TOKENS, HELD_OUT_TOKENS = 2**18, 2**15
THRESHOLD = 0.9
# Columns of what is printed into a file.
_FILE_WIDTH = 120


@dataclass(frozen=True)
class Run:
    """Everything that decides a row's numbers; a row with the same is not computed again."""

    data: str
    architecture: str
    setting: str
    options: dict[str, Any]
    lr: float
    sparsity_warmup: float
    steps: int
    batch: int
    seed: int


def runs(only: list[str], steps: int, seed: int) -> list[tuple[Run, Setting]]:
    """Every run that was asked for, by data, then in the order of the settings. Raises ValueError for unknown names."""
    known = {name for setting in SETTINGS for name in (setting.architecture, setting.name)} | set(DATA)
    unknown = sorted(set(only) - known)
    if unknown:
        raise ValueError(f"--only {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
    wanted_data = [name for name in DATA if name in only] or list(DATA)
    names = [name for name in only if name not in DATA]
    chosen = [s for s in SETTINGS if not names or s.architecture in names or s.name in names]
    return [
        (Run(data, s.architecture, s.name, s.arguments(data), s.lr, s.sparsity_warmup, steps, BATCH, seed), s)
        for data in wanted_data
        for s in chosen
    ]


def train(sae: fastsae.SAE, run: Run, tokens: Tensor, progress: Progress) -> float:
    """Trains on batches of `tokens` in order, over and over; returns the seconds of it."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=run.lr, fused=True)
    config = TrainConfig(
        steps=run.steps,
        warmup_steps=run.steps // 20,
        decay_steps=run.steps // 2,
        sparsity_warmup_steps=int(run.sparsity_warmup * run.steps),
    )
    schedule = warmup_and_decay(optimizer, config)
    batches = tokens.split(run.batch)
    task = progress.add_task(f"{run.architecture} {run.setting}", total=run.steps)
    began = time.perf_counter()
    for step in range(run.steps):
        optimizer.zero_grad()
        with scheduled(sae, step, config):
            sae.loss(batches[step % len(batches)]).total.backward()
        update(sae, optimizer, clip_grad_norm=1.0)
        schedule.step()
        progress.advance(task)
    seconds = time.perf_counter() - began
    progress.remove_task(task)
    return seconds


def measure(
    run: Run, data: Data, tokens: Tensor, held_out: Tensor, progress: Progress
) -> tuple[dict[str, Any], Tensor, Recovery]:
    """Builds, trains and scores one SAE: the row's numbers, its decoder, and what it recovered."""
    torch.manual_seed(run.seed)
    make = getattr(fastsae, run.architecture)
    sae = make(data.source.d, data.d_sae, **{"normalize_activations": "scalar"} | run.options)
    if sae.normalize_activations == "scalar":
        sae.estimate_activation_scale(tokens[: 8 * BATCH])
    seconds = train(sae, run, tokens, progress)
    decoder = sae.eval().W_dec.detach()
    metrics = evaluate(sae, held_out.split(4096))
    found = feature_recovery(data.features, decoder, THRESHOLD)
    numbers = {
        "recovered": found.recovered_fraction,
        "matched": found.matched_fraction,
        "mmcs": found.mmcs,
        "l0": metrics.l0,
        "fvu": 1 - metrics.explained_variance,
        "dead": metrics.dead_fraction,
        "seconds": seconds,
        "best_cosine": [round(cosine, 5) for cosine in found.best_cosine.tolist()],
    }
    return numbers, decoder, found


class Record:
    """The JSON file: read if it is there, and whole on disk after every run."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, "data": {}, "rows": []}
        if path.exists():
            content = json.loads(path.read_text())
            if content.get("schema") != SCHEMA:
                raise ValueError(
                    f"{path} has schema {content.get('schema')!r}: expected {SCHEMA!r}; name another --out"
                )
            self.content = content

    def row(self, run: Run) -> dict[str, Any] | None:
        """The row of a run that is done."""
        return next((row for row in self.content["rows"] if row["run"] == _plain(run)), None)

    def add(self, run: Run, source: str, numbers: dict[str, Any]) -> None:
        """Puts a row in the place of an older one of the same data, architecture and setting."""
        place = (run.data, run.architecture, run.setting)
        rows = [
            row
            for row in self.content["rows"]
            if (row["run"]["data"], row["run"]["architecture"], row["run"]["setting"]) != place
        ]
        self.content["rows"] = [*rows, {"run": _plain(run), "source": source, "commit": machine.commit(), **numbers}]

    def keep_best(self, run: Run, data: Data, decoder: Tensor, found: Recovery) -> None:
        """For the picture: features and matched latents [n_features, d] of the run with the highest MMCS."""
        about = self.content["data"].setdefault(data.name, _describe(data))
        if data.name != DRAWN:
            return
        if found.mmcs <= about.get("best", {}).get("mmcs", -1.0):
            return
        latents = torch.where((found.matched_latent >= 0)[:, None], decoder[found.matched_latent], 0.0)
        latents = torch.nn.functional.normalize(latents, dim=1)
        about["best"] = {
            "architecture": run.architecture,
            "setting": run.setting,
            "mmcs": found.mmcs,
            "features": _rounded(data.features),
            "matched_latents": _rounded(latents),
        }

    def save(self, threads: int) -> None:
        self.content |= {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "threads": threads,
            "threshold": THRESHOLD,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A list of numbers is one line.
        text = re.sub(
            r"\[[-\d.,\s]+\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(self.content, indent=1)
        )
        replace_file(self.path, (text + "\n").encode())


def _plain(run: Run) -> dict[str, Any]:
    """As JSON gives it back: a tuple becomes a list."""
    return json.loads(json.dumps(asdict(run)))


def _describe(data: Data) -> dict[str, Any]:
    """What the record says of the data; norms and importance where features have them."""
    source = data.source
    about = {
        "source": repr(source),
        "n_features": len(data.features),
        "d": source.d,
        "d_sae": data.d_sae,
        "l0": data.l0,
    }
    if hasattr(source, "represented"):
        about["feature_numbers"] = source.represented.nonzero()[:, 0].tolist()
        about["norms"] = _rounded(source.norms)
        about["importance"] = _rounded(source.importance)
    return about


def _rounded(numbers: Tensor) -> list:
    return (numbers.double() * 1e4).round().div(1e4).tolist()


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a run, best of an architecture in bold."""
    shown = Table(title=f"Features recovered: cosine of at least {THRESHOLD} with a latent", title_justify="left")
    for heading in ("data", "architecture", "setting"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("recovered", "MMCS", "L0", "FVU", "dead", "seconds"):
        shown.add_column(heading, justify="right", no_wrap=True)
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        place = (row["run"]["data"], row["run"]["architecture"])
        best[place] = max(best.get(place, 0.0), row["mmcs"])
    for row in rows:
        place = (row["run"]["data"], row["run"]["architecture"])
        shown.add_row(
            *place,
            row["run"]["setting"],
            f"{row['recovered']:.1%}",
            f"{row['mmcs']:.3f}",
            f"{row['l0']:.1f}",
            f"{row['fvu']:.3f}",
            f"{row['dead']:.1%}",
            f"{row['seconds']:.1f}",
            style="bold" if row["mmcs"] == best[place] else "",
        )
    return shown


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="An architecture, a setting or a data's name; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option(help=f"{QUICK_STEPS} steps: does it run?")] = False,
    steps: Annotated[int | None, typer.Option(help=f"Steps of a run. Default: {STEPS}.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, starts and the toy model.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch and fastsae.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Record to write and go on from; a picture beside it. Default: {RECORD.relative_to(ROOT)}"),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Compute rows again that are in the record.")] = False,
    plot_only: Annotated[bool, typer.Option(help="Draw the picture from the record, and train nothing.")] = False,
) -> None:
    """Trains SAEs on data with known features and shows how many of these they find."""
    torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    path = out or (QUICK_RECORD if quick else RECORD)
    steps = steps or (QUICK_STEPS if quick else STEPS)
    try:
        record, wanted = Record(path), runs(only or [], steps, seed)
    except ValueError as error:
        typer.echo(f"recovery: {error}", err=True)
        raise typer.Exit(2) from error
    missing: dict[str, str] = {}
    if not plot_only:
        missing = _run_all(wanted, record, fresh, threads, console)
    rows = [row for run, _ in wanted if (row := record.row(run)) is not None]
    console.print(table(rows))
    for architecture, reason in missing.items():
        console.print(f"{architecture} is missing: {reason}", markup=False)
    picture = path.with_suffix(".png")
    if draw(record.content, picture):
        console.print(f"record {path}, picture {picture}")


def _run_all(wanted, record: Record, fresh: bool, threads: int, console: Console) -> dict[str, str]:
    """Computes what is not in the record; returns why a setting could not be."""
    missing: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        todo = []
        for run, setting in wanted:
            if not hasattr(fastsae, run.architecture):
                missing[run.architecture] = "this fastsae has no such class"
            elif fresh or record.row(run) is None:
                todo.append((run, setting))
        overall = progress.add_task("runs", total=len(todo))
        data = tokens = held_out = None
        for run, setting in todo:
            if data is None or data.name != run.data:
                data = DATA[run.data](run.seed)
                tokens = torch.cat(list(data.source.batches(TRAINING_TOKENS, 4096, seed=run.seed)))
                held_out = torch.cat(list(data.source.batches(HELD_OUT_TOKENS, 4096, seed=run.seed + 1)))
            numbers, decoder, found = measure(run, data, tokens, held_out, progress)
            record.add(run, setting.source, numbers)
            record.keep_best(run, data, decoder, found)
            record.save(threads)
            progress.advance(overall)
    return missing


if __name__ == "__main__":
    typer.run(main)
