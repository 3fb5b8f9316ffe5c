"""`fastsae bench --arch`: every architecture end to end at a small shape, and nothing but red where one is wrong."""

import json

import pytest
import torch
from typer.testing import CliRunner

from fastsae.bench import architectures, architectures_result
from fastsae.bench.shapes import Shape
from fastsae.cli import app
from fastsae.saes import gated

SMALL = Shape("small", 24, 768, 8, 48, "a test")
ARGUMENTS = ["bench", "--shape", "pythia-160m-4k", "--tokens", "16", "--k", "8", "--repeats", "1", "--no-memory"]


@pytest.mark.parametrize("name", architectures.VARIANTS)
def test_a_problem_is_sparse_and_right(name):
    problem = architectures.Problem(name, SMALL)
    assert "against float64" in architectures.check(problem)
    l0 = problem.loss().codes.l0().double().mean().item()
    assert 0.5 * SMALL.k < l0 <= 1.5 * SMALL.k
    before = problem.sae.W_dec.detach().clone()
    for which in ("dense", "fastsae"):
        problem.step(which)
    torch.testing.assert_close(problem.sae.W_dec.detach(), before, atol=1e-6, rtol=0)


def test_both_steps_learn_the_same():
    """One step of each from the same start moves the weights alike: what is timed is the same work."""
    moved = {}
    for which in ("dense", "fastsae"):
        problem = architectures.Problem("relu", SMALL)
        problem.optimizer.param_groups[0]["lr"] = 1e-2
        problem.step(which)
        moved[which] = problem.sae.W_enc.detach().clone()
    torch.testing.assert_close(moved["dense"], moved["fastsae"], atol=1e-4, rtol=1e-3)


def test_a_wrong_architecture_is_red_and_has_no_times(monkeypatch):
    wrong = gated.GatedSAE._gated
    monkeypatch.setattr(gated.GatedSAE, "_gated", lambda *a: tuple(c.with_values(1.01 * c.values) for c in wrong(*a)))
    result = architectures.run(["gated", "topk"], SMALL, rounds=1, memory=False)
    bad, good = result.rows
    assert not result.green
    assert not bad.green
    assert (bad.seconds, bad.ratio, bad.l0) == ({}, None, None)
    assert "allowed" in bad.detail
    assert good.green
    assert good.ratio > 0


def test_file_round_trip_and_table(tmp_path):
    result = architectures.run(["relu"], SMALL, rounds=2)
    row = result.rows[0]
    assert {which: len(seconds) for which, seconds in row.seconds.items()} == {"dense": 2, "fastsae": 2}
    assert all(peak is None or peak >= 0 for peak in row.peak_memory.values())
    assert set(row.peak_memory) == {"dense", "fastsae"}
    path = tmp_path / "deep" / "result.json"
    architectures_result.save(result, path)
    assert architectures_result.load(path) == result
    path.write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match=r"result\.json is no result of `fastsae bench --arch`"):
        architectures_result.load(path)


def test_command(tmp_path):
    out = tmp_path / "result.json"
    done = CliRunner().invoke(app, [*ARGUMENTS, "--arch", "topk", "--arch", "relu", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "relu" in done.output
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["topk", "relu"]
    done = CliRunner().invoke(app, [*ARGUMENTS, "--arch", "sparse"])
    assert done.exit_code == 2
    assert "arch = 'sparse': expected all, or some of" in done.output


@pytest.mark.parametrize("name", architectures.VARIANTS)
def test_no_dense_tensor_in_a_step(name):
    """Nothing as large as [n_tokens, d_sae] is allocated by a step: all that torch makes is watched."""
    shape = Shape("wide", 8, 8192, 8, 256, "a test")
    problem = architectures.Problem(name, shape)
    problem.step("fastsae")
    largest = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        problem.step("fastsae")
    for event in profile.events():
        largest = max(largest, event.cpu_memory_usage)
    # W_enc and W_dec are 8 by 8,192: a tensor of tokens by latents is 32 times their size.
    assert 0 < largest < 4 * shape.n_tokens * shape.d_sae / 4
