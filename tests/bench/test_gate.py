"""No speed for wrong results: right ones pass every check, and each wrong operator fails one."""

import pytest
import torch

from fastsae.backends import cpu, native
from fastsae.backends import torch as torch_backend
from fastsae.bench import gate, runner, timing
from fastsae.bench.baselines import contestants
from fastsae.bench.implementations import FastSAE
from fastsae.bench.problem import DTYPES, Problem


def failed(checks):
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", ["mixture", "gaussian"])
def test_right_results_pass(tiny, dtype, inputs):
    checks = gate.run(Problem(tiny, DTYPES[dtype], inputs), contestants(DTYPES[dtype]))
    assert [check for check in checks if not check.passed] == []
    assert {"fastsae: selection", "fastsae: gradients", "dense: gradients", "decode"} <= {c.name for c in checks}


def wrong(operator):
    """`operator`, the largest of its first result moved by a thousandth, or its first integers swapped."""

    def broken(*arguments):
        results = operator(*arguments)
        first = results if isinstance(results, torch.Tensor) else results[-1 if operator.__name__ == "transpose" else 0]
        flat = first.view(-1) if first.is_contiguous() else first.reshape(-1)
        if flat.is_floating_point() and flat.numel():
            flat[flat.abs().argmax()] *= 1.001
        else:
            flat[:2] = flat[:2].flip(0)
        return results

    return broken


EXPECTED = {
    "encode_topk": "fastsae: selection",
    "decode": "decode",
    "squared_error": "squared_error",
    "sampled_dot": "sampled_dot",
    "transpose": "transpose",
    "accumulate_rows": "accumulate_rows",
}


@pytest.fixture(params=EXPECTED)
def broken_operator(request, monkeypatch):
    for backend in (cpu, torch_backend):
        monkeypatch.setattr(backend, request.param, wrong(getattr(backend, request.param)))
    return request.param


def test_each_wrong_operator_is_found(tiny, broken_operator):
    problem = Problem(tiny, torch.float32)
    # All tokens are sampled, so that the one wrong entry is among them.
    problem.sample = torch.arange(tiny.n_tokens)
    assert EXPECTED[broken_operator] in failed(gate.run(problem, contestants(torch.float32)))


def test_a_wrong_update_is_found(tiny, monkeypatch):
    for backend in (cpu, torch_backend):
        monkeypatch.setattr(backend, "project_rows_", lambda grad, rows: None)
    checks = gate.run(Problem(tiny, torch.float32), contestants(torch.float32))
    assert "projection and normalisation" in failed(checks)


def test_a_check_that_raises_has_failed(tiny, monkeypatch):
    def no_decode(*arguments):
        raise RuntimeError("no decode today")

    for backend in (cpu, torch_backend):
        monkeypatch.setattr(backend, "decode", no_decode)
    checks = gate.run(Problem(tiny, torch.float32), [])
    assert failed(checks) == {"decode"}
    assert "RuntimeError: no decode today" in [check.detail for check in checks]


def test_nothing_is_timed_after_a_red_check(tiny, monkeypatch, broken_operator):
    def never(*arguments):
        raise AssertionError("timed")

    monkeypatch.setattr(timing, "interleave", never)
    monkeypatch.setattr(Problem, "sample", torch.arange(tiny.n_tokens))
    (measurement,) = runner.run([tiny]).measurements
    assert not measurement.green
    assert measurement.rows == []


@pytest.mark.skipif(native.cpu is None, reason="one screen only without the native library")
def test_screens_that_disagree_are_found(tiny, monkeypatch):
    plain = FastSAE.encode

    def encode(self, problem, x):
        codes = plain(self, problem, x)
        return codes if self.screen is None else codes.with_values(codes.values.nextafter(torch.zeros(())))

    monkeypatch.setattr(FastSAE, "encode", encode)
    implementations = [FastSAE(torch.float32), FastSAE(torch.float32, screen="float32")]
    checks = gate.run(Problem(tiny, torch.float32), implementations)
    assert "fastsae, float32 screen: same bits" in failed(checks)


def test_every_implementation_trains_alike(tiny):
    """One step from the same start: the same parameters up to rounding, whoever made it."""
    after = {}
    for implementation in contestants(torch.float32):
        problem = Problem(tiny, torch.float32)
        for group in (problem.optimizer, problem.plain_optimizer, problem.fused_optimizer):
            group.param_groups[0]["lr"] = 1e-3
        for _ in range(3):
            list(implementation.step(problem))
        assert problem.plain.W_enc.data_ptr() == problem.sae.W_enc.data_ptr()
        after[implementation.name] = [p.detach().clone() for p in problem.sae.parameters()]
        assert problem.optimizer.state[problem.sae.W_dec]["step"] == 3
        assert not torch.equal(after[implementation.name][0], Problem(tiny, torch.float32).sae.W_enc)
    expected = after.pop("dense")
    for name, parameters in after.items():
        for parameter, want in zip(parameters, expected, strict=True):
            # Adam divides by √v: entries whose gradient is mere rounding move either way, and those are few.
            share = ((parameter - want).abs() > 1e-4).double().mean()
            assert share < (0.2 if "autocast" in name else 0.02), name


@pytest.mark.parametrize("name", ["fastsae, FusedAdam", "dense autocast"])
def test_mixed_precision_steps_share_their_masters(tiny, name):
    """Parameters in bfloat16, weights and moments in float32, for fastsae and autocast alike."""
    problem = Problem(tiny, torch.bfloat16)
    by_name = {implementation.name: implementation for implementation in contestants(torch.bfloat16)}
    before = [p.detach().clone() for p in problem.masters]
    problem.fused_optimizer.param_groups[0]["lr"] = problem.master_optimizer.param_groups[0]["lr"] = 1e-3
    list(by_name[name].step(problem))
    assert all(p.dtype == torch.float32 and not torch.equal(p, q) for p, q in zip(problem.masters, before, strict=True))
    assert problem.master_optimizer.state[problem.masters.W_dec]["exp_avg"].any()
    if name == "fastsae, FusedAdam":
        assert torch.equal(problem.sae.W_enc, problem.masters.W_enc.T.bfloat16())
