"""`fastsae demo`: sparse features of a small language model, from text to report, on a laptop."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from fastsae.cli._errors import errors_as_messages

_NEEDED = ("transformers", "tokenizers", "jinja2")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and the SAE.")] = Path("fastsae-demo"),
    text: Annotated[
        Path | None, typer.Option(help="File or folder of text; by default the running Python's standard library.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a causal language model of transformers, with --hook.")
    ] = None,
    hook: Annotated[
        str | None, typer.Option(help="Module whose output to read, such as transformer.h.5.mlp.act.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the trained language model.", envvar="FASTSAE_CACHE")
    ] = None,
    expansion: Annotated[int, typer.Option(help="Latents for each dimension of the activations.")] = 8,
    d_sae: Annotated[int | None, typer.Option(help="Number of latents, in place of --expansion.")] = None,
    k: Annotated[int, typer.Option(help="Latents kept for each token.")] = 32,
    steps: Annotated[int | None, typer.Option(help="Training steps of the SAE.  [default: 600]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens of the SAE, in place of --steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens in a step.")] = 2048,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the SAE.")] = 1e-3,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to evaluate on, at most.")] = 100_000,
    lm_steps: Annotated[int, typer.Option(help="Training steps of the language model.")] = 1400,
    n_latents: Annotated[int, typer.Option("--latents", help="Latents to show in the report.")] = 50,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Of the SAE's start and of the order of its tokens.")] = 0,
) -> None:
    """Trains a small language model, then a sparse autoencoder on its MLP, and shows what the latents mean.

    The experiment of "Towards Monosemanticity" (Bricken et al. 2023) in a few minutes on two CPU cores, without a
    download. The language model is kept for the next run.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(f'Error: the demo needs {", ".join(missing)}: pip install "fastsae[demo]"', err=True)
        raise typer.Exit(1)
    from rich.console import Console
    from transformers.utils import logging

    from fastsae.demo import DemoOptions, run_demo

    # The demo shows its own progress, and the models are its own business.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with errors_as_messages():
        options = DemoOptions(
            out=out,
            text=text,
            model=model,
            hook=hook,
            cache=cache,
            expansion=expansion,
            d_sae=d_sae,
            k=k,
            steps=steps,
            tokens=tokens,
            batch_size=batch_size,
            lr=lr,
            eval_tokens=eval_tokens,
            lm_steps=lm_steps,
            n_latents=n_latents,
            threads=threads,
            seed=seed,
        )
        try:
            run_demo(options, Console(highlight=False, markup=False))
        except KeyboardInterrupt:
            typer.echo("Stopped. Nothing is half-written.", err=True)
            raise typer.Exit(130) from None
