"""fastsae and another library with the same weights on the same x, and the rule that holds one to the other.

A peer is a function that runs the other library in the dtype of what it is given: x and weights by fastsae's names in,
results by name out. So it is its own plain PyTorch for fastsae.testing.assert_accurate, which runs it in float64 too:
fastsae may be off from that at most twice as far as the other library in the same precision is.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from unittest import mock

import torch
from torch import Tensor, nn

import fastsae
from fastsae.testing import assert_accurate

D_IN, D_SAE, D_OUT, N_TOKENS = 20, 80, 17, 37
# Problems in each comparison: a loss is one number, and one number may be exact by luck.
SEEDS = 3

Results = dict[str, Tensor]


def draw(
    seed: int,
    *names: str,
    dead: Tensor | None = None,
    dead_bias: float = -0.3,
    d_out: int = D_IN,
    silent: bool = True,
) -> Results:
    """x and weights, of which none is zero or of unit norm.

    `dead` latents have pre-activations near their bias. With `silent`, two tokens leave every pre-activation negative:
    x_0 = b_dec where b_dec is subtracted, and x_1 = 0 where it is not.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    directions = normal(D_SAE, D_IN) / math.sqrt(D_IN)
    drawn = {
        "W_enc": (directions + 0.1 * normal(D_SAE, D_IN)).T.contiguous(),
        "b_enc": -0.5 * uniform(D_SAE),
        "W_dec": (0.5 + uniform(D_SAE, 1)) * (directions if d_out == D_IN else normal(D_SAE, d_out) / math.sqrt(d_out)),
        "b_dec": 0.5 * normal(d_out),
        "threshold": 0.2 + 0.3 * uniform(D_SAE),
        "b_gate": -0.5 * uniform(D_SAE),
        "r_mag": 0.3 * normal(D_SAE),
        "b_mag": 0.1 * normal(D_SAE),
        "W_skip": 0.2 * normal(d_out, D_IN),
    }
    if dead is not None:
        drawn["W_enc"][:, dead] *= 0.02
        # Not one bias for all: which of two equal pre-activations SAELens picks is nowhere defined.
        drawn["b_enc"][dead] = dead_bias + 0.05 * drawn["b_enc"][dead]
    x = normal(N_TOKENS, D_IN)
    if silent:
        x[0], x[1] = drawn["b_dec"] if d_out == D_IN else 0, 0
    return {"x": x} | {name: drawn[name] for name in ("W_enc", "W_dec", "b_dec", *names)}


def dead_latents(count: int) -> Tensor:
    """A mask of so many, spread over the dictionary."""
    return torch.zeros(D_SAE, dtype=torch.bool).index_fill(0, torch.arange(count) * (D_SAE // max(count, 1)), True)


def load(module: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> None:
    """Puts weights of fastsae's names and shapes into another module, in their own dtype."""
    for name, weight in weights.items():
        parameter = _parameter(module, name, names)
        parameter.data = (weight.T if _is_transposed(name, names) else weight).clone()


def gradients(module: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> Results:
    found = {}
    for name, weight in weights.items():
        grad = _parameter(module, name, names).grad
        grad = torch.zeros_like(weight) if grad is None else grad
        found[f"gradient of {name}"] = grad.T if _is_transposed(name, names) else grad
    return found


def _parameter(module: nn.Module, name: str, names: Mapping[str, str] | None) -> nn.Parameter:
    return module.get_parameter((names or {}).get(name, name))


def _is_transposed(name: str, names: Mapping[str, str] | None) -> bool:
    """nn.Linear holds what fastsae calls W_enc and W_dec the other way round."""
    return (names or {}).get(name, "").endswith(".weight")


def widening_to(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """A context in which Tensor.float() is Tensor.double() if dtype is float64.

    By the former dictionary_learning widens half precision, and would narrow what is here to be exact.
    """
    if dtype != torch.float64:
        return contextlib.nullcontext()
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def training(
    sae: fastsae.SAE,
    inputs: Results,
    coefficients: Mapping[str, float],
    dead: Tensor | None = None,
    revived: Tensor | None = None,
) -> Results:
    """fastsae's results: what a batch is encoded and decoded to, its loss and terms, and every gradient.

    Of the terms those in `coefficients` count, times these: peers return them so weighted. `dead` latents are so before
    the batch, of which those `revived` fire in it.
    """
    inputs = dict(inputs)
    x, target = inputs.pop("x"), inputs.pop("target", None)
    _load_ours(sae, inputs)
    if dead is not None:
        sae.tokens_since_fired[dead] = sae.dead_after_tokens
    out = sae(x)
    loss = sae.loss(x, target)
    loss.total.backward()
    if dead is not None:
        left = dead if revived is None else dead & ~revived
        assert torch.equal(sae.dead_latents(), left.nonzero()[:, 0]), "one that fires is dead no more"
    terms = {name: coefficient * loss.terms[name] for name, coefficient in coefficients.items()}
    everything = {"activations": out.codes.to_dense(), "output": out.sae_out, "total": loss.total, **terms}
    return {name: value.detach() for name, value in everything.items()} | gradients(sae, inputs)


def forward(module: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], inputs: Results) -> Results:
    """Results without a loss: run(x) gives activations and output; and the gradients of a weighted sum of both."""
    weights = {name: weight for name, weight in inputs.items() if name != "x"}
    _load_ours(module, weights)
    x = inputs["x"].clone().requires_grad_()
    activations, output = run(x)
    total = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in (activations, output))
    total.backward()
    results = {"activations": activations.detach(), "output": output.detach(), "gradient of x": x.grad}
    return results | gradients(module, weights)


def encoding(sae: fastsae.SAE, inputs: Results) -> Results:
    """fastsae's results of `forward`."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = sae(x)
        return out.codes.to_dense(), out.sae_out

    return forward(sae, run, inputs)


@torch.no_grad()
def _load_ours(sae: nn.Module, weights: Results) -> None:
    sae.zero_grad()
    for name, weight in weights.items():
        sae.get_parameter(name).copy_(weight)


def assert_agrees(
    dtype: torch.dtype,
    ours: Callable[[Results], Results],
    peer: Callable[[Results], Results],
    problems: list[Results],
) -> None:
    """Holds every result of `ours` in `dtype` to those of `peer` on the same problems; both return the same names.

    In float64 both round, and neither is the exact one: they may differ by 2⁻⁴⁰ of the largest value, where rounding
    makes 2⁻⁵⁰ and a formula that is not the same 2⁻¹⁰. Other dtypes are held to the contract.
    """
    found = stacked([ours(cast(problem, dtype)) for problem in problems])
    if dtype == torch.float64:
        for name, exact in stacked([peer(cast(problem, dtype)) for problem in problems]).items():
            # A threshold is float32 whatever the rest.
            allowed = max(2**-40, 2 * torch.finfo(found[name].dtype).eps)
            error = (found[name] - exact).abs().max() / exact.abs().max().clamp_min(1e-300)
            assert found[name].shape == exact.shape
            assert error <= allowed, f"{name}: error {error:.3g} of the largest value, allowed {allowed:.3g}"
        return
    names, keys, runs = list(found), list(problems[0]), {}

    def formula(*flat: Tensor) -> list[Tensor]:
        # It is asked anew for each result; x, the first of all, tells dtypes and scalings apart.
        asked = flat[0].dtype, flat[0].sum().item()
        if asked not in runs:
            given = iter(flat)
            runs[asked] = stacked([peer({key: next(given) for key in keys}) for _ in problems])
        return [runs[asked][name] for name in names]

    inputs = [problem[key] for problem in problems for key in keys]
    try:
        assert_accurate([found[name] for name in names], formula, *inputs)
    except AssertionError as error:
        raise AssertionError(f"{error}; results are {dict(enumerate(names))}") from error


def cast(problem: Results, dtype: torch.dtype) -> Results:
    return {name: tensor.to(dtype) for name, tensor in problem.items()}


def stacked(results: list[Results]) -> Results:
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}
