"""`fastsae bench` from the shell to the file."""

import json

import pytest
import torch
from typer.testing import CliRunner

from fastsae.backends import cpu
from fastsae.backends import torch as torch_backend
from fastsae.bench import load_result
from fastsae.cli import app

SMALL = ["--shape", "pythia-160m-4k", "--tokens", "64", "--repeats", "1"]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "inputs"), [("float32", "mixture"), ("bfloat16", "gaussian")])
def test_end_to_end(tmp_path, dtype, inputs):
    out, plot = tmp_path / "result.json", tmp_path / "plot.png"
    options = ["--dtype", dtype, "--inputs", inputs, "--threads", "1", "--out", str(out), "--plot", str(plot)]
    done = bench(*SMALL, "--quick", "--no-memory", *options)
    assert done.exit_code == 0, done.output
    assert "checks against float64 passed" in done.output
    (measurement,) = load_result(out).measurements
    assert load_result(out).settings["threads"] == 1
    assert measurement.shape["n_tokens"] == 64
    assert measurement.nnz == 64 * 20
    phases = {row.phase for row in measurement.rows}
    assert phases == {
        *("gemm", "encode", "decode", "sampled_dot", "transpose", "accumulate_rows"),
        *("forward", "backward", "update", "step"),
    }
    step = measurement.row("step", "fastsae")
    assert step.seconds[0] > max(measurement.row(part, "fastsae").seconds[0] for part in ("forward", "backward"))
    assert all(row.p50 > 0 and row.over_gemm > 0 and (row.flops or row.bytes) for row in measurement.rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_json_is_the_result(tmp_path):
    done = bench(*SMALL, "--json", "--no-memory", "--inputs", "gaussian")
    assert done.exit_code == 0, done.output
    raw = json.loads(done.stdout)
    assert raw["schema"] == "fastsae-bench/1"
    assert raw["measurements"][0]["inputs"] == "gaussian"


def test_a_wrong_operator_prints_no_speed(monkeypatch, tmp_path):
    for backend in (cpu, torch_backend):
        right = backend.decode
        monkeypatch.setattr(backend, "decode", lambda *arguments, right=right: right(*arguments) * 1.01)
    done = bench(*SMALL, "--out", str(tmp_path / "result.json"))
    assert done.exit_code == 1
    assert "Wrong results: no speed is reported." in done.output
    assert "FLOP/s" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_list():
    done = bench("--list")
    assert done.exit_code == 0
    assert "gemma-2-2b-65k" in done.output
    assert "24,576" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt5"], "shape = 'gpt5': expected one of"),
        (["--dtype", "float16"], "dtype = 'float16': expected one of float32, bfloat16"),
        (["--repeats", "0"], "rounds = 0: expected at least 1"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--tokens", "0"], "n_tokens = 0"),
        (["--plot", "plot.png"], "--plot draws from result files"),
        (["missing.json", "--plot", "plot.png"], "missing.json"),
        (["some.json"], "result files are there to be plotted: give --plot FILE"),
    ],
)
def test_bad_arguments(arguments, message):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_what_does_not_fit_is_skipped(monkeypatch):
    from fastsae.bench import runner, shapes
    from fastsae.bench.baselines import contestants

    everyone = contestants(torch.float32)
    shape = shapes.get_shape("gpt2-small", n_tokens=2_048)
    names = {}
    for gibibytes in (1, 2, 100):
        chosen, train, skipped = runner._that_fit(shape, torch.float32, everyone, gibibytes * 2**30)
        names[gibibytes] = {implementation.name for implementation in chosen}, train
        assert names[gibibytes][0] | {s.implementation for s in skipped} >= {it.name for it in everyone}
        assert all("GiB may be used here" in s.reason for s in skipped)
    assert names[100] == ({it.name for it in everyone}, True)
    assert "dense" not in names[2][0]
    assert "fastsae" in names[2][0]
    assert not names[1][1]
