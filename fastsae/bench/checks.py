"""The checks of the gate: each raises AssertionError, or returns what it found."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsae import ops
from fastsae.bench import exact
from fastsae.bench.implementations import FastSAE, Implementation
from fastsae.bench.problem import Problem
from fastsae.optim import FusedAdam
from fastsae.testing import assert_accurate, assert_same_bits

# An implementation that rounds more than the dtype under test picks other latents; its loss must still be this close.
_LOOSE = 2.0**-5


def same_bits(problem: Problem, implementation: FastSAE) -> str:
    """Selection and values of all tokens are those of the default screen to the bit, which repeats itself."""
    default = FastSAE(problem.dtype, problem.x.device)
    with torch.no_grad():
        codes, *others = (it.encode(problem, problem.x) for it in (default, default, implementation))
    for other in others:
        assert_same_bits(other.indices, codes.indices)
        assert_same_bits(other.values, codes.values)
    return f"{problem.shape.n_tokens:,} tokens under both screens, the default twice"


def selection(problem: Problem, implementation: Implementation) -> str:
    """The picks are the k largest in float64, but where the rounding that the contract allows decides.

    That rounding is twice the largest error of plain PyTorch's pre-activations in the dtype that ranks them.
    """
    sae, x = problem.sae, problem.x[problem.sample]
    with torch.no_grad():
        values, indices = implementation.picks(problem, x)
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
    weights = _detached(sae.W_enc.T[latents], sae.b_enc[latents], sae.b_dec)
    _hold(implementation, values, exact.encode, x, *weights, places)
    same = int((chosen >= threshold).all(dim=1).sum())
    return f"{same} of {len(x)} tokens as in float64, the rest within rounding"


def reconstruction(problem: Problem, implementation: Implementation) -> str:
    sae, x = problem.sae, problem.x[problem.sample]
    with torch.no_grad():
        y = implementation.decode(problem, implementation.encode(problem, x))
        values, indices = implementation.picks(problem, x)
    latents, places = indices.unique(return_inverse=True)
    _hold(implementation, y, exact.decode, values.relu(), *_detached(sae.W_dec[latents], sae.b_dec), places)
    return f"{len(x)} tokens against float64"


def decode(problem: Problem) -> str:
    codes, W_dec = problem.codes.rows(problem.sample), problem.sae.W_dec.detach()
    latents, places = codes.indices.unique(return_inverse=True)
    y = ops.decode(codes, W_dec)
    assert_accurate(y, exact.decode, codes.values, W_dec[latents], torch.zeros_like(W_dec[0]), places)
    return f"{codes.n_tokens} tokens against float64"


def squared_error(problem: Problem) -> str:
    """Residuals and their squared norms of the sampled tokens."""
    codes, x = problem.codes.rows(problem.sample), problem.x[problem.sample]
    W_dec, b_dec = _detached(problem.sae.W_dec, problem.sae.b_dec)
    latents, places = codes.indices.unique(return_inverse=True)
    found = ops.squared_error(codes, W_dec, b_dec, x)
    assert_accurate(found, exact.squared_error, codes.values, W_dec[latents], b_dec, x, places)
    return f"{codes.n_tokens} tokens against float64"


def sampled_dot(problem: Problem) -> str:
    codes, g = problem.codes.rows(problem.sample), problem.g[problem.sample]
    W_dec = problem.sae.W_dec.detach()
    latents, places = codes.indices.unique(return_inverse=True)
    assert_accurate(ops.sampled_dot(g, codes, W_dec), exact.sampled_dot, g, W_dec[latents], places)
    return f"{codes.n_tokens} tokens against float64"


def transpose(problem: Problem) -> str:
    flat = problem.codes.indices.reshape(-1)
    latent_offsets, tokens, entries = ops.transpose(problem.codes)
    expected = flat.long().argsort(stable=True)
    assert torch.equal(entries, expected), "entries are not sorted by latent, then by token"
    assert torch.equal(tokens.long(), problem.codes.tokens().reshape(-1)[expected]), "an entry has another's token"
    counts = torch.bincount(flat, minlength=problem.shape.d_sae)
    assert torch.equal(latent_offsets.diff(), counts), "latent_offsets do not count the latents' entries"
    return f"all {flat.numel():,} entries"


def accumulate_rows(problem: Problem) -> str:
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


def unit_rows(problem: Problem) -> str:
    rows = problem.sae.W_dec.detach()[problem.sample % problem.shape.d_sae] * 1.5
    grad = problem.g[problem.sample]
    assert_accurate(ops.project_rows_(grad.clone(), rows), exact.project_rows, grad, rows)
    assert_accurate(ops.normalize_rows_(rows.clone()), exact.normalize_rows, rows)
    return f"{len(rows)} rows against float64"


def gradients(problem: Problem, implementation: Implementation) -> str:
    """The gradients of some sampled tokens' loss against autograd of the dense formula, in float64."""
    sae, x = problem.sae, problem.x[problem.sample[::4]]
    with torch.no_grad():
        _, indices = implementation.picks(problem, x)
    problem.zero_grad()
    implementation.loss(problem, x).backward()
    W_enc, b_enc, W_dec, b_dec = implementation.gradients(problem)
    problem.zero_grad()
    latents, places = indices.unique(return_inverse=True)
    weights = _detached(sae.W_enc.T[latents], sae.b_enc[latents], sae.W_dec[latents], sae.b_dec)
    found = *_fired(latents, W_enc, b_enc, W_dec), b_dec
    _hold(implementation, found, exact.gradients, x, *weights, places)
    return f"W_enc, b_enc, W_dec and b_dec of {len(x)} tokens against float64 autograd"


def moments(problem: Problem, implementation: Implementation) -> str:
    """The first step's moments are (1 - β) times the gradients, W_dec's projected: FusedAdam keeps no gradients."""
    sae, x = problem.sae, problem.x[problem.sample[::4]]
    with torch.no_grad():
        _, indices = implementation.picks(problem, x)
    latents, places = indices.unique(return_inverse=True)
    weights = _detached(sae.W_enc.T[latents], sae.b_enc[latents], sae.W_dec[latents], sae.b_dec)
    optimizer = FusedAdam(sae, lr=0.0)
    optimizer.step(x)
    found = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in sae.named_parameters()}

    def first_moments(*inputs: Tensor) -> tuple[Tensor, ...]:
        W_enc, b_enc, W_dec, b_dec = exact.gradients(*inputs)
        share = 1 - optimizer.defaults["betas"][0]
        return tuple(share * part for part in (W_enc, b_enc, exact.project_rows(W_dec, inputs[3]), b_dec))

    by_latent = _fired(latents, found["W_enc"].T, found["b_enc"], found["W_dec"])
    assert_accurate((*by_latent, found["b_dec"]), first_moments, x, *weights, places)
    return f"Adam's first moments after {len(x)} tokens against float64 autograd"


def _hold(
    implementation: Implementation, actual: Tensor | Sequence[Tensor], formula: Callable, *inputs: Tensor
) -> None:
    """Holds fastsae to its numerics contract, and a baseline to half its digits: it promises nothing but the maths."""
    if isinstance(implementation, FastSAE):
        assert_accurate(actual, formula, *inputs)
        return
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact_results = formula(*wide)
    pairs = [(actual, exact_results)] if isinstance(actual, Tensor) else zip(actual, exact_results, strict=True)
    for result, right in pairs:
        error, largest = (result.double() - right).abs().max(), right.abs().max()
        allowed = torch.finfo(result.dtype).eps ** 0.5 * largest
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def _fired(latents: Tensor, *by_latent: Tensor) -> list[Tensor]:
    """The rows of `latents`; every other row must be zero."""
    idle = torch.ones(len(by_latent[0]), dtype=torch.bool, device=latents.device).index_fill(0, latents, False)
    for rows in by_latent:
        assert not rows[idle].any(), "a latent that did not fire has a gradient"
    return [rows[latents] for rows in by_latent]


def loss(problem: Problem, implementation: Implementation) -> str:
    with torch.no_grad():
        ours = FastSAE(problem.dtype, problem.x.device).loss(problem, problem.x).item()
        theirs = implementation.loss(problem, problem.x).item()
    assert abs(theirs - ours) <= _LOOSE * ours, f"loss {theirs:.5g}, in the dtype under test {ours:.5g}"
    return f"loss {theirs:.5g}, in the dtype under test {ours:.5g}"


def _detached(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tensors)
