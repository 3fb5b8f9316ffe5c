"""What the user did wrong, said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Prints the errors that bad input makes, without a traceback, and exits with 1."""
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
