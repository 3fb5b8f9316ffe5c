"""`fastsae convert`: an SAE's files from one library's format to another's."""

from pathlib import Path
from typing import Annotated

import typer

from fastsae.cli._errors import errors_as_messages
from fastsae.interop import load


def convert(
    src: Annotated[str, typer.Argument(help="File or folder of an SAE, or a hub name: owner/name/folder.")],
    dst: Annotated[Path, typer.Argument(help="Folder (or .pt or .npz file) to write; it must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            help="fastsae, saelens, sparsify, dictionary_learning, openai, openmoss or gemma_scope.", show_default=True
        ),
    ] = "fastsae",
    source: Annotated[str | None, typer.Option("--from", help="Format of SRC; by default its files tell.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the config, such as hook_name=...; repeatable.")
    ] = None,
) -> None:
    """Reads an SAE of any format that fastsae knows and writes it in another, computing the same.

    What the other format cannot say is an error that names it, and nothing is written.
    """
    with errors_as_messages():
        pairs = [pair.partition("=") for pair in metadata or []]
        if not all(separator for _, separator, _ in pairs):
            raise ValueError(f"--metadata {' '.join(metadata)}: expected KEY=VALUE")
        if dst.exists() and (dst.is_file() or any(dst.iterdir())):
            raise ValueError(
                f"{dst} exists: expected a new path, since files of two formats in one folder are ambiguous"
            )
        sae = load(src, source)
        sae.save(dst, to, metadata={key: value for key, _, value in pairs})
    typer.echo(f"wrote {dst}: {type(sae).__name__} {sae.d_in} → {sae.d_sae} as {to}", err=True)
