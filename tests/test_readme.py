"""README.md: its figures are those of a committed record, and its code runs."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks/readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_record_gives(generator):
    assert generator.inserted(README, generator.table()) == README, "run python benchmarks/readme_table.py"


def test_the_architectures_are_what_the_record_gives(generator):
    block = generator.architectures()
    assert generator.inserted(README, block, "architectures") == README, "run python benchmarks/readme_table.py"


def test_the_other_libraries_are_what_the_records_give(generator, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("interop_libraries").table()
    assert generator.inserted(README, table, "interop") == README, "run benchmarks/interop_libraries.py --table-only"


def test_every_figure_of_the_table_is_in_the_record(generator):
    record = generator.newest(generator.RESULTS)
    _, _, measurement = record
    lines = generator.table().splitlines()[4:]
    shown = {tuple(cell.strip(" *") for cell in line.split("|")[2:6]) for line in lines}
    measured = {
        (row.implementation, row.precision, f"{row.p50 * 1e3:,.1f}", f"{row.over_gemm:.2f}")
        for row in measurement.rows
        if row.phase in generator.PHASES
    }
    assert shown == measured


def test_no_record_gives_no_figures(generator, tmp_path):
    assert generator.table(tmp_path) == "No measurement is recorded yet."
    assert generator.architectures(tmp_path) == "No measurement is recorded yet."


@pytest.mark.parametrize("text", ["", "<!-- bench:begin -->", "<!-- bench:end --><!-- bench:begin -->"])
def test_markers_that_do_not_pair_are_refused(generator, text):
    with pytest.raises(ValueError, match="once each"):
        generator.inserted(text, "x")


def test_the_code_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_commands_exist():
    from typer.testing import CliRunner

    from fastsae.cli import app

    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", README, re.MULTILINE))
    named = {first or second for first, second in targets}
    assert {"demo", "test"} <= named
    assert [name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
    for command in set(re.findall(r"`fastsae ([a-z]+)", README)):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
