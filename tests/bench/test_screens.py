"""benchmarks/screens.py: bits before times, and a record that holds what was timed."""

import importlib.util
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fastsae.backends import native
from fastsae.backends.screen import Screen

ROOT = Path(__file__).resolve().parents[2]

if native.cpu is None:
    pytest.skip(native.why_not_cpu, allow_module_level=True)


@pytest.fixture
def screens(monkeypatch):
    monkeypatch.setenv("FASTSAE_SCREEN", "float32")
    spec = importlib.util.spec_from_file_location("screens", ROOT / "benchmarks/screens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(screens, *arguments):
    app = typer.Typer()
    app.command()(screens.main)
    return CliRunner().invoke(app, list(arguments))


def test_every_case_with_every_screen(screens, tmp_path):
    out = tmp_path / "record.json"
    done = run(screens, "--shrink", "64", "--rounds", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert {(row["case"]["name"], row["kind"]) for row in record["rows"]} == {
        (case.name, kind) for case in screens.CASES for kind in screens.KINDS
    }
    assert all(len(row["seconds"]) == 2 and row["ratio"] > 0 for row in record["rows"])


def test_a_screen_that_changes_a_bit_gets_no_time(screens, monkeypatch):
    right = Screen.run

    def wrong(self, values, indices):
        right(self, values, indices)
        if self.kind is not None:
            indices[0, 0] ^= 1

    monkeypatch.setattr(Screen, "run", wrong)
    done = run(screens, "--shrink", "64", "--rounds", "1", "--kind", "int16")
    assert done.exit_code == 1
    assert "over mm" not in done.output
