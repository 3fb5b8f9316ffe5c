"""`fastsae eval`: how well an SAE reconstructs activations in files, and how sparsely."""

import json
import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastsae.activations.store import ActivationStore
from fastsae.cli._errors import errors_as_messages
from fastsae.evaluation import evaluate
from fastsae.interop import load


def eval(
    sae: Annotated[str, typer.Argument(help="File or folder of an SAE in any format that is known, or a hub name.")],
    activations: Annotated[
        list[Path], typer.Argument(help="Files (.npy, .safetensors) of activations [..., d_in], or folders of them.")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens at a time; it changes nothing but memory.")] = 4096,
    tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many; by default all.")] = None,
    tensor: Annotated[str | None, typer.Option(help="Tensor to read where a .safetensors file holds several.")] = None,
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one, else cpu.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measures an SAE on activations in files: explained variance, FVU, L0 and dead latents.

    Explained variance is 1 - FVU, with the variance about the mean of all tokens read. A latent is dead here if it
    fired in none of them.
    """
    with errors_as_messages():
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load(sae, device=device)
        store = ActivationStore(activations, tensor=tensor)
        found = evaluate(loaded, (x.to(device) for x in store.in_order(batch_size, tokens)))
    results = {
        "tokens": found.n_tokens,
        "explained_variance": found.explained_variance,
        "fvu": 1 - found.explained_variance,
        "l0": found.l0,
        "dead_fraction": found.dead_fraction,
    }
    if as_json:
        # JSON has no NaN, which activations that do not vary or are not finite give.
        finite = {name: value if math.isfinite(value) else None for name, value in results.items()}
        typer.echo(json.dumps(finite))
        return
    table = Table("metric", "value", title=f"{type(loaded).__name__} {loaded.d_in} → {loaded.d_sae}")
    table.columns[1].justify = "right"
    for name, value in results.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)
