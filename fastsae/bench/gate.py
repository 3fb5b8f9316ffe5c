"""Correctness before speed: every implementation against float64, in the process and on the tensors that are timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastsae
from fastsae import ops
from fastsae.bench import exact
from fastsae.bench.implementations import FastSAE, FusedAdamSAE, Implementation
from fastsae.bench.problem import Problem
from fastsae.testing import assert_accurate, assert_same_bits

# An implementation that rounds more than the dtype under test picks other latents; its loss must still be this close.
_LOOSE = 2.0**-5


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found."""

    name: str
    passed: bool
    detail: str


def run(problem: Problem, implementations: Sequence[Implementation]) -> list[Check]:
    """Every check of a run. A check that raises has failed; the others still run."""
    checks = []
    for name, check in _checks(problem, implementations):
        try:
            checks.append(Check(name, True, check()))
        except (AssertionError, ValueError, TypeError, RuntimeError) as error:
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return checks


def _checks(problem: Problem, implementations: Sequence[Implementation]) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "decode", lambda: _decode(problem)
    yield "sampled_dot", lambda: _sampled_dot(problem)
    yield "transpose", lambda: _transpose(problem)
    yield "accumulate_rows", lambda: _accumulate_rows(problem)
    yield "projection and normalisation", lambda: _unit_rows(problem)
    for implementation in implementations:
        for about, check in _checks_of(problem, implementation).items():
            yield f"{implementation.name}: {about}", lambda check=check, it=implementation: check(problem, it)


def _checks_of(problem: Problem, implementation: Implementation) -> dict[str, Callable]:
    if isinstance(implementation, FusedAdamSAE):
        return {"moments": _moments}
    if isinstance(implementation, FastSAE) and implementation.screen is not None:
        # With the bits of the default screen it passes whatever that passes.
        return {"same bits": _same_bits}
    if implementation.ranked_in != torch.float32 and problem.dtype == torch.float32:
        return {"loss": _loss}
    return {"selection": _selection, "decode": _reconstruction, "gradients": _gradients}


def _same_bits(problem: Problem, implementation: FastSAE) -> str:
    """Selection and values of all tokens are those of the default screen to the bit, which repeats itself."""
    with torch.no_grad():
        for other in (FastSAE(problem.dtype), implementation):
            again = other.encode(problem.sae, problem.x)
            assert_same_bits(again.indices, problem.codes.indices)
            assert_same_bits(again.values, problem.codes.values)
    return f"{problem.shape.n_tokens:,} tokens under both screens, the default twice"


def _selection(problem: Problem, implementation: Implementation) -> str:
    """The picks are the k largest in float64, but where the rounding that the contract allows decides.

    That rounding is twice the largest error of plain PyTorch's pre-activations in the dtype that ranks them.
    """
    sae, x = problem.sae, problem.x[problem.sample]
    with torch.no_grad():
        values, indices = implementation.picks(sae, x)
    assert all(len(set(row)) == sae.k for row in indices.tolist()), "a latent was picked twice for one token"
    right = exact.preactivations(sae, x, torch.float64)
    plain = exact.preactivations(sae, x, implementation.ranked_in)
    allowed = 2 * (plain - right).abs().max() + torch.finfo(implementation.ranked_in).eps * right.abs().max()
    threshold, chosen = right.topk(sae.k, dim=1).values[:, -1:], right.gather(1, indices)
    worst = (threshold - chosen).max()
    assert worst <= 2 * allowed, (
        f"a pick is {worst:.3g} under the {sae.k}-th largest, rounding explains {2 * allowed:.3g}"
    )
    latents, places = indices.unique(return_inverse=True)
    assert_accurate(values, exact.encode, x, *_detached(sae.W_enc.T[latents], sae.b_enc[latents], sae.b_dec), places)
    same = int((chosen >= threshold).all(dim=1).sum())
    return f"{same} of {len(x)} tokens as in float64, the rest within rounding"


def _reconstruction(problem: Problem, implementation: Implementation) -> str:
    sae, x = problem.sae, problem.x[problem.sample]
    with torch.no_grad():
        y = implementation.decode(sae, implementation.encode(sae, x))
        values, indices = implementation.picks(sae, x)
    latents, places = indices.unique(return_inverse=True)
    assert_accurate(y, exact.decode, values.relu(), *_detached(sae.W_dec[latents], sae.b_dec), places)
    return f"{len(x)} tokens against float64"


def _decode(problem: Problem) -> str:
    codes, W_dec = problem.codes.rows(problem.sample), problem.sae.W_dec.detach()
    latents, places = codes.indices.unique(return_inverse=True)
    y = ops.decode(codes, W_dec)
    assert_accurate(y, exact.decode, codes.values, W_dec[latents], torch.zeros_like(W_dec[0]), places)
    return f"{codes.n_tokens} tokens against float64"


def _sampled_dot(problem: Problem) -> str:
    codes, g = problem.codes.rows(problem.sample), problem.g[problem.sample]
    W_dec = problem.sae.W_dec.detach()
    latents, places = codes.indices.unique(return_inverse=True)
    assert_accurate(ops.sampled_dot(g, codes, W_dec), exact.sampled_dot, g, W_dec[latents], places)
    return f"{codes.n_tokens} tokens against float64"


def _transpose(problem: Problem) -> str:
    flat = problem.codes.indices.reshape(-1)
    latent_offsets, tokens, entries = ops.transpose(problem.codes)
    expected = flat.long().argsort(stable=True)
    assert torch.equal(entries, expected), "entries are not sorted by latent, then by token"
    assert torch.equal(tokens.long(), problem.codes.tokens().reshape(-1)[expected]), "an entry has another's token"
    counts = torch.bincount(flat, minlength=problem.shape.d_sae)
    assert torch.equal(latent_offsets.diff(), counts), "latent_offsets do not count the latents' entries"
    return f"all {flat.numel():,} entries"


def _accumulate_rows(problem: Problem) -> str:
    """One latent of each sampled token over the whole batch, the busiest latent and the idlest."""
    codes, g = problem.codes, problem.g
    out = ops.accumulate_rows(codes, g)
    counts = torch.bincount(codes.indices.reshape(-1), minlength=codes.d_sae)
    latents = codes.rows(problem.sample).indices[:, 0].long()
    latents = torch.cat([latents, counts.argmax()[None], counts.argmin()[None]]).unique()
    weights = codes.values.new_zeros(codes.n_tokens, len(latents))
    for column, latent in enumerate(latents):
        weights[:, column] = codes.values.where(codes.indices == latent, 0).sum(dim=1)
    assert_accurate(out[latents], exact.accumulate_rows, weights, g)
    return f"{len(latents)} latents over all tokens against float64"


def _unit_rows(problem: Problem) -> str:
    rows = problem.sae.W_dec.detach()[problem.sample % problem.shape.d_sae] * 1.5
    grad = problem.g[problem.sample]
    assert_accurate(ops.project_rows_(grad.clone(), rows), exact.project_rows, grad, rows)
    assert_accurate(ops.normalize_rows_(rows.clone()), exact.normalize_rows, rows)
    return f"{len(rows)} rows against float64"


def _gradients(problem: Problem, implementation: Implementation) -> str:
    """The gradients of some sampled tokens' loss against autograd of the dense formula, in float64."""
    sae, x = problem.sae, problem.x[problem.sample[::4]]
    with torch.no_grad():
        _, indices = implementation.picks(sae, x)
    sae.zero_grad(set_to_none=True)
    implementation.loss(sae, x).backward()
    W_enc, b_enc, W_dec, b_dec = sae.W_enc.grad.T, sae.b_enc.grad, sae.W_dec.grad, sae.b_dec.grad
    sae.zero_grad(set_to_none=True)
    latents, places = indices.unique(return_inverse=True)
    weights = _detached(sae.W_enc.T[latents], sae.b_enc[latents], sae.W_dec[latents], sae.b_dec)
    found = *_fired(latents, W_enc, b_enc, W_dec), b_dec
    assert_accurate(found, exact.gradients, x, *weights, places)
    return f"W_enc, b_enc, W_dec and b_dec of {len(x)} tokens against float64 autograd"


def _moments(problem: Problem, implementation: Implementation) -> str:
    """The first step's moments are (1 - β) times the gradients, W_dec's projected: FusedAdam keeps no gradients."""
    sae, x = problem.sae, problem.x[problem.sample[::4]]
    with torch.no_grad():
        _, indices = implementation.picks(sae, x)
    latents, places = indices.unique(return_inverse=True)
    weights = _detached(sae.W_enc.T[latents], sae.b_enc[latents], sae.W_dec[latents], sae.b_dec)
    optimizer = fastsae.optim.FusedAdam(sae, lr=0.0)
    optimizer.step(x)
    moments = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in sae.named_parameters()}

    def first_moments(*inputs: Tensor) -> tuple[Tensor, ...]:
        W_enc, b_enc, W_dec, b_dec = exact.gradients(*inputs)
        share = 1 - optimizer.defaults["betas"][0]
        return tuple(share * part for part in (W_enc, b_enc, exact.project_rows(W_dec, inputs[3]), b_dec))

    by_latent = _fired(latents, moments["W_enc"].T, moments["b_enc"], moments["W_dec"])
    assert_accurate((*by_latent, moments["b_dec"]), first_moments, x, *weights, places)
    return f"Adam's first moments after {len(x)} tokens against float64 autograd"


def _fired(latents: Tensor, *by_latent: Tensor) -> list[Tensor]:
    """The rows of `latents`; every other row must be zero."""
    idle = torch.ones(len(by_latent[0]), dtype=torch.bool).index_fill(0, latents, False)
    for rows in by_latent:
        assert not rows[idle].any(), "a latent that did not fire has a gradient"
    return [rows[latents] for rows in by_latent]


def _detached(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tensors)


def _loss(problem: Problem, implementation: Implementation) -> str:
    with torch.no_grad():
        ours = FastSAE(problem.dtype).loss(problem.sae, problem.x).item()
        theirs = implementation.loss(problem.sae, problem.x).item()
    assert abs(theirs - ours) <= _LOOSE * ours, f"loss {theirs:.5g}, in the dtype under test {ours:.5g}"
    return f"loss {theirs:.5g}, in the dtype under test {ours:.5g}"
