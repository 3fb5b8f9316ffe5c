"""`fastsae train`: an SAE on activations in files."""

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastsae.activations.store import ActivationStore
from fastsae.cli._errors import errors_as_messages
from fastsae.durable import replace_file
from fastsae.optim import FusedAdam
from fastsae.saes import SAE, load
from fastsae.saes.registry import ARCHITECTURES
from fastsae.training import TrainConfig, Trainer, checkpoint
from fastsae.training.trainer import OPENAI_ADAM

# Activations that the starting values of b_dec and of the scale are taken from.
SAMPLE_TOKENS = 8192
# What the run in --out was started with.
SETTINGS_NAME = "train.json"


def train(
    activations: Annotated[
        list[Path], typer.Argument(help="Files (.npy, .safetensors) of activations [..., d_in], or folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the SAE, its log and its checkpoints.")],
    d_sae: Annotated[int, typer.Option(help="Number of latents.")],
    k: Annotated[float | None, typer.Option(help="Latents kept for each token (topk, batchtopk, matryoshka).")] = None,
    architecture: Annotated[str, typer.Option(help="topk, batchtopk, matryoshka, relu, jumprelu or gated.")] = "topk",
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, an option of the architecture (l1_coefficient=5); VALUE is JSON. Repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; by default one pass over the tokens.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens in a step.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default 2e-4 / sqrt(d_sae / 2^14).")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="By default a twentieth of the steps.")] = None,
    decay_steps: Annotated[int | None, typer.Option(help="By default a fifth of the steps.")] = None,
    sparsity_warmup_steps: Annotated[int, typer.Option(help="Over which L1 and L0 coefficients rise from zero.")] = 0,
    resample_every: Annotated[int, typer.Option(help="Steps between two resamplings of dead latents.")] = 0,
    fused: Annotated[bool, typer.Option("--fused", help="FusedAdam: no gradient tensors, no clipping.")] = False,
    normalize_activations: Annotated[str, typer.Option(help="none, scalar or layer_norm.")] = "none",
    dead_after_tokens: Annotated[int, typer.Option(help="Tokens after which a silent latent is dead.")] = 10_000_000,
    tensor: Annotated[str | None, typer.Option(help="Tensor to read where a .safetensors file holds several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the tokens and of the starting weights.")] = 0,
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")] = None,
    log_every: Annotated[int, typer.Option(help="Steps between two records in log.jsonl.")] = 100,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Trains an SAE on activations in files.

    The files are mapped into memory and shuffled in blocks; the same options make the same run. --out receives the SAE
    (config.json, model.safetensors), log.jsonl and checkpoints/. A run that was cut off goes on with the same options
    and --resume.
    """
    with errors_as_messages():
        store = ActivationStore(activations, tensor=tensor)
        steps = max(1, store.n_tokens // batch_size) if steps is None else steps
        config = TrainConfig(
            steps=steps,
            lr=lr,
            warmup_steps=steps // 20 if warmup_steps is None else warmup_steps,
            decay_steps=steps // 5 if decay_steps is None else decay_steps,
            sparsity_warmup_steps=sparsity_warmup_steps,
            resample_every=resample_every,
            clip_grad_norm=None if fused else 1.0,
            log_every=log_every,
            log_path=out / "log.jsonl",
            checkpoint_every=checkpoint_every,
            checkpoint_dir=out / "checkpoints",
        )
        sae_settings = {
            "d_sae": d_sae,
            **_k_setting(architecture, k),
            "normalize_activations": normalize_activations,
            "dead_after_tokens": dead_after_tokens,
            **_options(option or []),
        }
        settings = {
            "architecture": architecture,
            **sae_settings,
            "sparsity_warmup_steps": sparsity_warmup_steps,
            "resample_every": resample_every,
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "warmup_steps": config.warmup_steps,
            "decay_steps": config.decay_steps,
            "fused": fused,
            "seed": seed,
            "tensor": tensor,
            "activations": [str(path) for path in activations],
        }
        _check_settings(out / SETTINGS_NAME, settings, resume)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        saved = checkpoint.in_folder(out / "checkpoints")
        sae = load(saved[-1], device=device) if saved else _start(store, architecture, sae_settings, seed, device)
        trainer = Trainer(sae, config, FusedAdam(sae, lr=config.peak_lr(d_sae), **OPENAI_ADAM) if fused else None)
        if saved:
            trainer.load_checkpoint(saved[-1])
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / SETTINGS_NAME, (json.dumps(settings, indent=2) + "\n").encode())
        summary = trainer.fit(store.batches(batch_size, seed=seed, start=trainer.step))
        sae.save_pretrained(out)
    # A resumed run that was already at its end has no last step to tell of.
    last_step = {**summary.loss, "l0": summary.l0} if summary.loss else {}
    typer.echo(json.dumps({"out": str(out), "steps": summary.steps, "tokens": summary.tokens, **last_step}))


def _check_settings(path: Path, settings: dict[str, Any], resume: bool) -> None:
    """Holds a resumed run to the settings it began with, and a new one to an unused folder."""
    if not path.exists():
        return
    if not resume:
        raise ValueError(f"{path.parent} holds a run: pass --resume to go on with it, or give another --out")
    began_with = json.loads(path.read_bytes())
    for name, value in settings.items():
        if began_with.get(name) != value:
            raise ValueError(f"{name} = {value!r}: expected {began_with.get(name)!r} as in {path}, or another --out")


def _k_setting(architecture: str, k: float | None) -> dict[str, float]:
    """k as the architecture takes it. Raises ValueError where it is missing or of no use."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture = {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
    wanted = "k" in inspect.signature(ARCHITECTURES[architecture].__init__).parameters
    if wanted != (k is not None):
        raise ValueError(f"k = {k} with architecture = {architecture}: expected {'a number' if wanted else 'none'}")
    if k is None:
        return {}
    return {"k": int(k) if k == int(k) else k}


def _options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE as constructor arguments; what is no JSON is text."""
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"option = {pair!r}: expected NAME=VALUE, such as l1_coefficient=5")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def _start(store: ActivationStore, architecture: str, settings: dict[str, Any], seed: int, device: str) -> SAE:
    torch.manual_seed(seed)
    try:
        sae = ARCHITECTURES[architecture](store.d_in, device=device, **settings)
    except TypeError as error:
        raise ValueError(f"{error}: expected options of {ARCHITECTURES[architecture].__name__}") from error
    sample = next(store.batches(min(SAMPLE_TOKENS, store.n_tokens), seed=seed)).to(device)
    if sae.normalize_activations == "scalar":
        sae.estimate_activation_scale(sample)
    sae.initialize_b_dec(sample)
    return sae
