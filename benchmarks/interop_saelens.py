"""SAELens' own trainer before and after fastsae.accelerate: tokens a second, the SAE's part of a step, peak memory.

    python benchmarks/interop_saelens.py --out benchmarks/results/interop/saelens-MACHINE.json
    python benchmarks/interop_saelens.py --arch all --tokens 1024 --rounds 3

For each architecture two `SAETrainer`s with the same seed: one as SAELens makes it, one given to `fastsae.accelerate`.
Both run `fit()` on activations of a small transformer with random weights (`--activations synthetic` spares the model),
the same batches, some steps each in turn, so that drift and neighbours touch both alike. What `fit()` takes less what
the activations take is the SAE's part: encode, loss, backward, SAELens' counts, clipping, Adam.

First the gate: a few steps of both and of a third trainer in float64. The losses may be off the exact ones at most
twice as far as SAELens' own in float32 (and one unit in the last place more), or there is no time and no file. Peak
memory is the system's count in a process of its own for each: what one step takes beyond parameters, Adam's state and
the batch.

ReLU, Gated and JumpReLU SAEs start with their bias or threshold where about k latents of a token are active, as in a
trained one: as they are initialised half of them are, and fastsae leaves such batches to SAELens.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

import fastsae
from fastsae.bench import machine
from fastsae.bench.memory import CHILD_ENVIRONMENT, HostMemory, Unmeasured
from fastsae.durable import replace_file

SCHEMA = "fastsae-interop-saelens-1"
ARCHITECTURES = ("topk", "batchtopk", "matryoshka_batchtopk", "standard", "gated", "jumprelu")
SIDES = ("sae_lens", "fastsae")
CONTEXT, VOCABULARY = 128, 512
GATE_STEPS, WARM_UP_STEPS = 3, 2


@dataclass(frozen=True)
class Row:
    """One architecture: seconds a step by side and round, of the SAE's part and of the activations; what follows."""

    arch: str
    sae_seconds: dict[str, list[float]]
    activation_seconds: dict[str, list[float]]
    tokens_per_second: dict[str, float]
    sae_speedup: float
    run_speedup: float
    gate: dict[str, float]
    largest_loss_difference: float
    peak_bytes: dict[str, int | None]
    paths: list[str]


class Activations:
    """An endless supply of batches [n_tokens, d_in], the same for the same seed; `seconds` is what they have taken."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype = torch.float32):
        self.options, self.dtype, self.seconds = options, dtype, 0.0
        self.generator = torch.Generator().manual_seed(options.seed)
        self.model = _model(options) if options.activations == "model" else None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        began = time.perf_counter()
        n_tokens, d_in = self.options.tokens, self.options.d_in
        if self.model is None:
            x = torch.randn(n_tokens, d_in, generator=self.generator)
        else:
            tokens = torch.randint(VOCABULARY, (-(-n_tokens // CONTEXT), CONTEXT), generator=self.generator)
            x = self.model(tokens, stop_at_layer=self.options.layers).reshape(-1, d_in)[:n_tokens]
        x = x.to(self.dtype)
        self.seconds += time.perf_counter() - began
        return x


def _model(options: argparse.Namespace) -> HookedTransformer:
    head = min(64, options.d_in)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=options.layers,
            d_model=options.d_in,
            d_head=head,
            n_heads=max(1, options.d_in // head),
            d_mlp=4 * options.d_in,
            n_ctx=CONTEXT,
            d_vocab=VOCABULARY,
            act_fn="gelu_new",
            seed=options.seed,
        )
    ).eval()


def _sae(arch: str, options: argparse.Namespace, dtype: torch.dtype) -> Any:
    names = {
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "matryoshka_batchtopk": "MatryoshkaBatchTopK",
        "standard": "Standard",
        "gated": "Gated",
        "jumprelu": "JumpReLU",
    }
    name, d_sae = f"{names[arch]}TrainingSAE", options.d_sae
    settings: dict[str, Any] = {"k": options.k} if "topk" in arch else {}
    if arch == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [d_sae >> shift for shift in (4, 3, 2, 1, 0)]
    torch.manual_seed(options.seed)
    config = getattr(sae_lens, f"{name}Config")(d_in=options.d_in, d_sae=d_sae, device="cpu", **settings)
    sae = getattr(sae_lens, name)(config)
    if "topk" not in arch:
        _make_sparse(sae, arch, next(Activations(options)), options)
    return sae.to(dtype=dtype)


@torch.no_grad()
def _make_sparse(sae: Any, arch: str, x: Tensor, options: argparse.Namespace) -> None:
    pre = x[:64] @ sae.W_enc
    level = pre.flatten().kthvalue(int(pre.numel() * (1 - options.k / options.d_sae))).values
    if arch == "jumprelu":
        sae.threshold.fill_(level)
        # A window of the estimators as wide against the pre-activations as SAELens' 0.05 against a unit norm.
        sae.bandwidth = 0.05 * pre.std().item()
    else:
        (sae.b_gate if arch == "gated" else sae.b_enc).fill_(-level)


def _trainer(arch: str, side: str, options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> SAETrainer:
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=0,
        device="cpu",
        autocast=False,
        lr=options.lr,
        lr_end=options.lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=options.tokens,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=_sae(arch, options, dtype), data_provider=Activations(options, dtype))
    return fastsae.accelerate(trainer) if side == "fastsae" else trainer


@contextlib.contextmanager
def _losses(trainer: SAETrainer) -> Iterator[list[float]]:
    """The loss of every step that runs inside."""
    found: list[float] = []
    step: Callable = trainer.step

    def noted(batch: Tensor) -> Any:
        output = step(batch)
        found.append(output.loss.item())
        return output

    trainer.step = noted
    try:
        yield found
    finally:
        del trainer.step


def _run(trainer: SAETrainer, steps: int) -> tuple[float, float, list[float]]:
    """`fit()` for so many steps more: seconds a step of all, of the activations, and the losses."""
    trainer.cfg.total_training_samples = trainer.n_training_samples + steps * trainer.cfg.train_batch_size_samples
    before = trainer.data_provider.seconds
    with _losses(trainer) as losses:
        began = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - began
    return seconds / steps, (trainer.data_provider.seconds - before) / steps, losses


def _gate(arch: str, options: argparse.Namespace) -> dict[str, float]:
    """Raises SystemExit where the losses of accelerated steps are too far from the exact ones."""
    exact, *found = (
        torch.tensor(_run(_trainer(arch, side, options, dtype), GATE_STEPS)[2], dtype=torch.float64)
        for side, dtype in (("sae_lens", torch.float64), *((side, torch.float32) for side in SIDES))
    )
    errors = {
        side: ((loss - exact).abs().max() / exact.abs().max()).item() for side, loss in zip(SIDES, found, strict=True)
    }
    allowed = 2 * errors["sae_lens"] + torch.finfo(torch.float32).eps
    if not errors["fastsae"] <= allowed:
        raise SystemExit(f"{arch}: losses are off by {errors['fastsae']:.3g}, allowed {allowed:.3g}: no timing")
    return {**errors, "allowed": allowed}


def _peak(arch: str, side: str, arguments: list[str]) -> int | None:
    child = subprocess.run(
        [sys.executable, __file__, *arguments, "--memory", arch, side],
        env=os.environ | CHILD_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    return int(child.stdout.split()[-1]) if child.returncode == 0 else None


def _print_peak(arch: str, side: str, options: argparse.Namespace) -> None:
    trainer, memory = _trainer(arch, side, options), HostMemory()
    _run(trainer, WARM_UP_STEPS)
    trainer.data_provider = iter([next(trainer.data_provider)])
    batch = next(trainer.data_provider)
    before = memory.reset()
    trainer.step(batch)
    print(memory.peak() - before)


def measured(arch: str, options: argparse.Namespace, arguments: list[str]) -> Row:
    gate = _gate(arch, options)
    trainers = {side: _trainer(arch, side, options) for side in SIDES}
    sae_seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    activation_seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.rounds + 1):
        for side, trainer in trainers.items():
            steps = options.steps if number else WARM_UP_STEPS
            seconds, activations, found = _run(trainer, steps)
            losses[side] += found
            if number:
                sae_seconds[side].append(seconds - activations)
                activation_seconds[side].append(activations)
    whole = {side: [a + b for a, b in zip(sae_seconds[side], activation_seconds[side], strict=True)] for side in SIDES}
    plain, fast = (torch.tensor(losses[side], dtype=torch.float64) for side in SIDES)
    return Row(
        arch,
        sae_seconds,
        activation_seconds,
        {side: options.tokens / median(whole[side]) for side in SIDES},
        _ratio(sae_seconds),
        _ratio(whole),
        gate,
        ((plain - fast).abs() / plain.abs()).max().item(),
        {side: _peak(arch, side, arguments) for side in SIDES},
        str(fastsae.explain(trainers["fastsae"])).splitlines(),
    )


def _ratio(seconds: dict[str, list[float]]) -> float:
    return median(a / b for a, b in zip(seconds["sae_lens"], seconds["fastsae"], strict=True))


def _show(row: Row) -> None:
    def mib(bytes_: int | None) -> str:
        return "unknown" if bytes_ is None else f"{bytes_ / 2**20:,.0f} MiB"

    print(f"\n{row.arch}: losses agree (off by {row.gate['fastsae']:.1g}, SAELens' own by {row.gate['sae_lens']:.1g})")
    for side in SIDES:
        print(
            f"  {side:8}  SAE part {median(row.sae_seconds[side]):7.3f} s a step"
            f"  {row.tokens_per_second[side]:9,.0f} tokens/s  peak {mib(row.peak_bytes[side])}"
        )
    print(f"  the SAE's part {row.sae_speedup:.1f} x faster, the run {row.run_speedup:.1f} x")
    print("\n".join(f"  {line}" for line in row.paths))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="topk", help=f"{', '.join(ARCHITECTURES)}, several with commas, or all")
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch; SAELens' default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each trainer in a round")
    parser.add_argument("--activations", choices=("model", "synthetic"), default="model")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the record to this file")
    parser.add_argument("--memory", nargs=2, metavar=("ARCH", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    arguments = sys.argv[1:]
    options = _options(arguments)
    warnings.simplefilter("ignore")
    if options.memory:
        try:
            _print_peak(*options.memory, options)
        except Unmeasured as error:
            raise SystemExit(str(error)) from error
        return
    began, described = datetime.now(timezone.utc).isoformat(timespec="seconds"), machine.describe()
    chosen = ARCHITECTURES if options.arch == "all" else options.arch.split(",")
    rows = []
    for arch in chosen:
        rows.append(measured(arch, options, arguments))
        _show(rows[-1])
    if options.out is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("out", "memory")}
        record = {
            "schema": SCHEMA,
            "date": began,
            "machine": described,
            "versions": machine.versions() | {"sae_lens": sae_lens.__version__},
            "commit": machine.commit(),
            "settings": settings | {"threads": torch.get_num_threads()},
            "rows": [asdict(row) for row in rows],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
