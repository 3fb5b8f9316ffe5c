"""Every architecture's training step beside its own dense PyTorch step: problems, steps, checks and the run."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae.bench import machine, timing
from fastsae.bench.architectures_result import ArchitectureResult, ArchitectureRow
from fastsae.bench.cases import Case
from fastsae.bench.memory import CHILD_ENVIRONMENT, HostMemory, Unmeasured
from fastsae.bench.shapes import Shape
from fastsae.reference.losses import dense_loss
from fastsae.testing import assert_accurate
from fastsae.training import update
from fastsae.training.update import row_major

# So small that hundreds of timed steps leave the problem what it was.
_LEARNING_RATE = 1e-9
_SEED = 0
# Tokens that a threshold is set on, and tokens that the checks take.
_SAMPLE, _CHECKED = 64, 16
_STEPS = ("dense", "fastsae")


@dataclass(frozen=True)
class Variant:
    """A class of fastsae and the options it is measured with."""

    architecture: str
    options: Callable[[Shape], dict[str, Any]] = lambda shape: {}


VARIANTS: dict[str, Variant] = {
    "topk": Variant("TopKSAE", lambda s: {"k": s.k}),
    "multi_topk": Variant("TopKSAE", lambda s: {"k": s.k, "multi_topk": True}),
    "groupmax": Variant("TopKSAE", lambda s: {"k": s.k, "selection": "groupmax"}),
    "batchtopk": Variant("BatchTopKSAE", lambda s: {"k": s.k}),
    "matryoshka": Variant("MatryoshkaSAE", lambda s: {"k": s.k}),
    "relu": Variant("ReLUSAE"),
    "jumprelu": Variant("JumpReLUSAE"),
    "gated": Variant("GatedSAE"),
    "transcoder": Variant("TopKSAE", lambda s: {"k": s.k, "d_out": s.d_in, "skip": True}),
    "crosscoder": Variant("ReLUSAE", lambda s: {"sites": 2}),
}


class Problem:
    """An SAE of a shape, in float32, with x (and a target) for it: Gaussian, so that every latent fires alike.

    The latents of architectures that have no k are given a threshold at which about k of them are active in a token.
    """

    def __init__(self, name: str, shape: Shape):
        variant = VARIANTS[name]
        options = variant.options(shape)
        d_in = shape.d_in // options.get("sites", 1)
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            self.sae = getattr(fastsae, variant.architecture)(d_in, shape.d_sae, **options)
            self.x = torch.randn(shape.n_tokens, *([self.sae.sites] if self.sae.sites else []), d_in)
            self.target = torch.randn(shape.n_tokens, self.sae.d_out) if self.sae.is_transcoder else None
            self._make_sparse(shape)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=_LEARNING_RATE, fused=True)

    @torch.no_grad()
    def _make_sparse(self, shape: Shape) -> None:
        sae = self.sae
        if hasattr(sae, "k"):
            return
        pre = self.x[:_SAMPLE].flatten(1) @ sae.W_enc
        level = pre.flatten().kthvalue(int(pre.numel() * (1 - shape.k / shape.d_sae))).values
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(level)
        else:
            (sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc).fill_(-level)

    def loss(self, tokens: slice = slice(None)) -> fastsae.SAELoss:
        return self.sae.loss(self.x[tokens], None if self.target is None else self.target[tokens])

    def dense_terms(self, weights: dict[str, Tensor], tokens: slice = slice(None)) -> dict[str, Tensor]:
        """The dense loss of the same tokens, in the dtype of the weights."""
        x = self.x[tokens].flatten(1).to(weights["W_dec"].dtype)
        target = x if self.target is None else self.target[tokens].to(x.dtype)
        return dense_loss(self.sae, x, target, weights)

    def step(self, which: str) -> None:
        """Forward, backward and update with torch's fused Adam, by fastsae or in dense PyTorch."""
        self.optimizer.zero_grad()
        if which == "fastsae":
            self.loss().total.backward()
            update(self.sae, self.optimizer)
            return
        self.dense_terms(dict(self.sae.named_parameters()))["total"].backward()
        self._dense_update()

    def _dense_update(self) -> None:
        """As dictionary_learning updates: projection, Adam, unit rows, in plain PyTorch."""
        W_dec = self.sae.W_dec
        with torch.no_grad():
            if self.sae.normalize_decoder:
                W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
        with row_major(self.optimizer, self.sae.W_enc):
            self.optimizer.step()
        with torch.no_grad():
            if self.sae.normalize_decoder:
                W_dec /= W_dec.norm(dim=1, keepdim=True)


def check(problem: Problem) -> str:
    """Terms and gradients of some tokens against the dense formula in float64, by the numerics contract.

    Raises AssertionError where they differ.
    """
    sae, tokens = problem.sae, slice(0, _CHECKED)
    names = [name for name, _ in sae.named_parameters()]
    sae.zero_grad()
    loss = problem.loss(tokens)
    loss.total.backward()
    found = [p.grad for p in sae.parameters()]
    sae.zero_grad()

    def values(*parameters: Tensor) -> list[Tensor]:
        terms = problem.dense_terms(dict(zip(names, parameters, strict=True)), tokens)
        return [term.detach() for term in terms.values()]

    def gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
        leaves = [p.detach().requires_grad_() for p in parameters]
        return torch.autograd.grad(problem.dense_terms(dict(zip(names, leaves, strict=True)), tokens)["total"], leaves)

    parameters = [p.detach() for p in sae.parameters()]
    # A loss is one number, which plain PyTorch may have exactly by luck: all of them are held to the largest error.
    exact, plain = values(*(p.double() for p in parameters)), values(*parameters)
    allowed = max(abs(p - e) / abs(e).clamp_min(1) for p, e in zip(plain, exact, strict=True))
    for name, ours, right in zip(loss.parts(), loss.parts().values(), exact, strict=True):
        error = abs(ours.detach() - right) / abs(right).clamp_min(1)
        limit = 2 * allowed + 8 * torch.finfo(torch.float32).eps
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"
    assert_accurate(found, gradients, *parameters)
    return f"{len(exact)} terms and {len(found)} gradients of {_CHECKED} tokens against float64"


def run(
    names: Sequence[str],
    shape: Shape,
    *,
    rounds: int = 7,
    memory: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> ArchitectureResult:
    """Checks, times and (if `memory`) weighs each architecture; one whose check is red has no times.

    Raises ValueError for an unknown name or fewer than one round.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"arch = {', '.join(map(repr, unknown))}: expected all, or some of {', '.join(VARIANTS)}")
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: expected at least 1")
    if not __debug__:
        raise ValueError("python -O removes the checks, and without them no speed is reported: run without -O")
    result = ArchitectureResult(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine.describe(),
        versions=machine.versions(),
        commit=machine.commit(),
        settings={
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "optimizer": "torch.optim.Adam(fused=True)",
            "precision": "float32",
        },
        shape={"name": shape.name, "d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "n_tokens": shape.n_tokens},
    )
    for name in names:
        result.rows.append(_measure(name, shape, rounds, memory, lambda m, name=name: progress(f"{name}: {m}")))
        gc.collect()
    return result


def _measure(name: str, shape: Shape, rounds: int, memory: bool, progress: Callable[[str], None]) -> ArchitectureRow:
    progress("checking")
    problem = Problem(name, shape)
    try:
        row = ArchitectureRow(name, VARIANTS[name].architecture, True, check(problem))
    except AssertionError as error:
        return ArchitectureRow(name, VARIANTS[name].architecture, False, str(error))
    with torch.no_grad():
        row.l0 = float(problem.loss().codes.l0().double().mean())
    cases = [Case("step", which, "float32", lambda which=which: problem.step(which), {}) for which in _STEPS]
    samples = timing.interleave(cases, rounds, progress)
    row.seconds = {which: samples["step", which].seconds for which in _STEPS}
    row.ratio = samples["step", "fastsae"].ratio(samples["step", "dense"])
    # The children that weigh a step hold a problem of their own.
    cases.clear()
    gc.collect()
    for which in _STEPS if memory else ():
        progress(f"peak memory of {which}")
        row.peak_memory[which] = _peak_of_a_child(name, shape, which)
    return row


def _peak_of_a_child(name: str, shape: Shape, which: str) -> int | None:
    task = {"name": name, "shape": shape.__dict__, "which": which, "threads": torch.get_num_threads()}
    child = subprocess.run(
        [sys.executable, "-m", "fastsae.bench.architectures", json.dumps(task)],
        env=os.environ | CHILD_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    return int(child.stdout.splitlines()[-1]) if child.returncode == 0 else None


def _steps(problem: Problem, which: str, count: int) -> Iterator[None]:
    for _ in range(count):
        yield problem.step(which)


def main(task: dict[str, Any]) -> None:
    """In a process of its own: the bytes by which a step raises memory at its worst, as fastsae.bench.memory counts."""
    torch.set_num_threads(task["threads"])
    problem, counted = Problem(task["name"], Shape(**task["shape"])), HostMemory()
    list(_steps(problem, task["which"], 2))
    try:
        before = counted.reset()
        problem.step(task["which"])
        print(max(0, counted.peak() - before))
    except Unmeasured as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
