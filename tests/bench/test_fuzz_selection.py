"""benchmarks/fuzz_selection.py: that screens agree, and that one which does not is found out."""

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastsae.backends import native
from fastsae.backends.screen import Screen
from fastsae.backends.screen_panels import Kind
from fastsae.backends.screen_threshold import ThresholdScreen

ROOT = Path(__file__).resolve().parents[2]

if native.cpu is None:
    pytest.skip(native.why_not_cpu, allow_module_level=True)


@pytest.fixture
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_selection", ROOT / "benchmarks/fuzz_selection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rule", ["disagreements", "threshold_disagreements"])
def test_screens_agree(fuzz, rule):
    rows = 0
    for number in range(30):
        problem = fuzz.draw(1, number)
        rows += len(problem.x)
        assert not any(getattr(fuzz, rule)(problem).values()), (number, problem.spoiled)
    assert rows > 20_000


def test_every_spoiler_is_drawn(fuzz):
    drawn = {name for number in range(200) for name in fuzz.draw(0, number).spoiled}
    assert drawn == set(fuzz.SPOILERS)


def test_a_wrong_threshold_is_found_out(fuzz, monkeypatch):
    run = ThresholdScreen.run

    def wrong(self):
        values, indices, offsets = run(self)
        if self._kind is Kind.int16 and len(values):
            values[0] += 1
        return values, indices, offsets

    monkeypatch.setattr(ThresholdScreen, "run", wrong)
    problem = next(p for p in (fuzz.draw(0, number) for number in range(50)) if not p.spoiled)
    assert fuzz.threshold_disagreements(problem) == {"int16": 1, "bfloat16": 0, "float32": 0}


def test_a_wrong_screen_is_found_out(fuzz, monkeypatch, tmp_path):
    run = Screen.run

    def wrong(self, values, indices):
        run(self, values, indices)
        if self.dtype == torch.int8:
            indices[0, 0] += 1

    monkeypatch.setattr(Screen, "run", wrong)
    app = fuzz.typer.Typer()
    app.command()(fuzz.main)
    result = CliRunner().invoke(app, ["--rows", "1", "--out", str(tmp_path / "found.json")])
    assert result.exit_code == 1
    assert '"int8": 1' in (tmp_path / "found.json").read_text()
    assert "problem 0" in result.output
