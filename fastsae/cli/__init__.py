"""The command line: `fastsae demo | train | eval | bench | convert | doctor`, one command in each file."""

import importlib
import importlib.util

import typer

app = typer.Typer(
    name="fastsae",
    help="Sparse autoencoders at the speed of their sparsity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

COMMANDS = ("demo", "train", "eval", "bench", "convert", "doctor")

for _name in COMMANDS:
    if importlib.util.find_spec(f"fastsae.cli.{_name}"):
        app.command(_name)(getattr(importlib.import_module(f"fastsae.cli.{_name}"), _name))


def main() -> None:
    """Entry point of the `fastsae` script."""
    app()
