"""`fastsae bench compare`: a slowdown is marked, noise is not."""

import copy

import numpy as np
import pytest
from typer.testing import CliRunner

from fastsae.bench import load_result
from fastsae.bench.compare import compare
from fastsae.bench.result import Measurement, Result, Row, save_result
from fastsae.cli import app

ROUNDS = 9
PHASES = ("encode", "decode", "step")


def run(seed, slower=None, share=1.0, noise=0.03, drift=0.3):
    """A result whose rounds share a drift of the whole machine, and have noise of their own."""
    generator = np.random.default_rng(seed)
    machine = 1 + drift * generator.random(ROUNDS)

    def row(phase, implementation, seconds):
        samples = (seconds * machine * (1 + noise * generator.standard_normal(ROUNDS))).tolist()
        return Row(phase, implementation, "float32", samples, 0, float(np.median(samples)), 0, 1, 1)

    rows = [row("gemm", "x @ W_enc", 0.3)]
    for i, phase in enumerate(PHASES):
        for implementation in ("fastsae", "dense"):
            factor = share if (phase, implementation) == slower else 1.0
            rows.append(row(phase, implementation, factor * (0.1 + 0.1 * i)))
    shape = {"name": "small", "d_in": 8, "d_sae": 64, "k": 2, "n_tokens": 16}
    measurement = Measurement(shape, "float32", "mixture", 32, 2.0, [{"passed": True}], rows)
    machine = {"cpu": "a", "cores": 2, "isa": "avx2", "screen": "int16"}
    return Result("2026-01-01", machine, {}, None, {"threads": 2}, [measurement])


def marked(old, new):
    (comparison,) = compare(old, new)
    return {(c.phase, c.implementation): c.verdict for c in comparison.changes if c.verdict}


@pytest.mark.parametrize("phase", PHASES)
def test_a_slowdown_of_a_fifth_is_marked_and_nothing_else(phase):
    assert marked(run(1), run(2, slower=(phase, "fastsae"), share=1.2)) == {(phase, "fastsae"): "slower"}
    assert marked(run(1, slower=(phase, "fastsae"), share=1.2), run(2)) == {(phase, "fastsae"): "faster"}


def test_a_rerun_is_silent():
    """Of 40 reruns of 7 rows, on a machine that drifts by a third, none is marked."""
    assert [pair for seed in range(40) if (pair := marked(run(seed), run(1000 + seed)))] == []


def test_intervals_hold_the_ratio():
    (comparison,) = compare(run(1), run(2, slower=("step", "dense"), share=1.5))
    assert all(c.low <= c.ratio <= c.high for c in comparison.changes)
    change = next(c for c in comparison.changes if (c.phase, c.implementation) == ("step", "dense"))
    assert change.low < 1.5 < change.high


def test_what_only_one_has_is_said():
    old, new = run(1), run(2)
    gone = old.measurements[0].rows.pop()
    (comparison,) = compare(old, new)
    assert comparison.missing == [f"{gone.phase} of {gone.implementation} (float32): only in the new result"]


def test_results_that_share_nothing_are_refused():
    other = copy.deepcopy(run(2))
    other.measurements[0].shape["n_tokens"] = 17
    with pytest.raises(ValueError, match="share no measurement"):
        compare(run(1), other)
    red = run(3)
    red.measurements[0].checks[0]["passed"] = False
    with pytest.raises(ValueError, match="failed its checks"):
        compare(run(1), red)


def test_from_the_shell(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    save_result(run(1), old)
    save_result(run(2, slower=("encode", "fastsae"), share=1.3), new)
    assert load_result(old).measurements
    done = CliRunner().invoke(app, ["bench", "compare", str(old), str(new)])
    assert done.exit_code == 0, done.output
    assert done.output.count("slower") == 1
    alone = CliRunner().invoke(app, ["bench", "compare", str(old)])
    assert alone.exit_code == 2
    assert "two result files" in alone.output
