"""Tables and plots come from results alone."""

import io

import pytest
from rich.console import Console

from fastsae.bench import report
from fastsae.bench.plot import draw


def shown(result):
    console = Console(file=io.StringIO(), width=200)
    report.show(result, console)
    return console.file.getvalue()


def test_report_states_what_a_reader_needs(result):
    text = shown(result)
    for part in ("Some CPU", "avx2", "torch 2.13.0", "0123456789, with changes", "nnz 576", "L0 6.0", "tiny"):
        assert part in text
    assert "1.400" in text
    assert "GFLOP/s" in text
    assert "3.0 MiB" in text
    assert "1280.0%" in text
    assert "missed" in text
    assert "Not measured: all of topk + embedding_bag: it needs about 9.0 GiB" in text
    assert "noisy" not in text


def test_a_busy_machine_is_told(result):
    result.machine["load_average"] = 3.0
    assert "other work makes its times noisy" in shown(result)


def test_red_checks_show_no_speed(result):
    result.measurements[0].checks.append({"name": "encode", "passed": False, "detail": "error [0.1]"})
    text = shown(result)
    assert "FAILED" in text
    assert "error [0.1]" in text
    assert "FLOP/s" not in text
    assert "1.400" not in text


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_drawn_from_results(result, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot{suffix}"
    draw([result, result], path)
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_plot(result, tmp_path):
    pytest.importorskip("matplotlib")
    result.measurements[0].rows = []
    with pytest.raises(ValueError, match="expected at least one measurement whose checks passed"):
        draw([result], tmp_path / "plot.png")
