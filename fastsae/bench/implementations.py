"""What every contestant offers, and fastsae's own."""

import abc
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae.backends.screen import screen_dtype
from fastsae.bench import work
from fastsae.bench.problem import Problem
from fastsae.bench.shapes import Shape
from fastsae.ops import encode_topk
from fastsae.training import update

CPU = torch.device("cpu")


class Implementation(abc.ABC):
    """One way to encode, decode and train; all of them on the numbers of one Problem."""

    name: str
    precision: str
    # The dtype in which its pre-activations are ranked.
    ranked_in = torch.float32
    # Whether it rounds more than its parameters' dtype does: then only its loss is comparable.
    mixed = False
    # Whether it encodes and decodes as another does, so that only its step is measured.
    trains_only = False

    @abc.abstractmethod
    def picks(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw pre-activations [n_tokens, k] that were selected, in any order, and their latents."""

    @abc.abstractmethod
    def encode(self, problem: Problem, x: Tensor) -> Any:
        """x -> codes, in the form that its own `decode` takes."""

    @abc.abstractmethod
    def decode(self, problem: Problem, codes: Any) -> Tensor:
        """Codes -> reconstruction [n_tokens, d_in]."""

    @abc.abstractmethod
    def loss(self, problem: Problem, x: Tensor) -> Tensor:
        """The fraction of variance unexplained, differentiable."""

    @abc.abstractmethod
    def gradients(self, problem: Problem) -> tuple[Tensor, ...]:
        """What backward left for W_enc [d_sae, d_in], b_enc, W_dec and b_dec."""

    @abc.abstractmethod
    def update(self, problem: Problem) -> None:
        """Projects W_dec's gradient, steps the optimizer, normalises W_dec."""

    def step(self, problem: Problem) -> Iterator[str]:
        """A whole training step; yields the name of each part when it is done."""
        problem.zero_grad()
        loss = self.loss(problem, problem.x)
        yield "forward"
        loss.backward()
        yield "backward"
        self.update(problem)
        yield "update"

    @abc.abstractmethod
    def work(self, shape: Shape, itemsize: int) -> dict[str, work.Work]:
        """Counted work by phase."""

    @abc.abstractmethod
    def working_set(self, shape: Shape, itemsize: int) -> int:
        """About how many bytes a step takes beyond parameters, gradients and state: asked before it is tried."""


class FastSAE(Implementation):
    """TopKSAE as a user calls it; `screen` names the precision of the encoder's screening products."""

    name = "fastsae"

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU, *, screen: str | None = None):
        self.screen = screen
        self.precision = str(dtype).removeprefix("torch.")
        if device.type == "cpu":
            used = screen or str(screen_dtype()).removeprefix("torch.")
            self.precision += f" (screen {used})"
        if screen is not None:
            self.name = f"fastsae, {screen} screen"

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The screen is read from the environment at each call."""
        before = os.environ.get("FASTSAE_SCREEN")
        if self.screen is not None:
            os.environ["FASTSAE_SCREEN"] = self.screen
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("FASTSAE_SCREEN", None)
            else:
                os.environ["FASTSAE_SCREEN"] = before

    def picks(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        sae = problem.sae
        with self.context():
            codes = encode_topk(x, sae.W_enc, sae.b_enc, sae.k, b_dec=sae.b_dec)
        return codes.values, codes.indices.long()

    def encode(self, problem: Problem, x: Tensor) -> Any:
        with self.context():
            return problem.sae.encode(x)

    def decode(self, problem: Problem, codes: Any) -> Tensor:
        return problem.sae.decode(codes)

    def loss(self, problem: Problem, x: Tensor) -> Tensor:
        with self.context():
            return problem.sae.loss(x).total

    def gradients(self, problem: Problem) -> tuple[Tensor, ...]:
        sae = problem.sae
        return sae.W_enc.grad.T, sae.b_enc.grad, sae.W_dec.grad, sae.b_dec.grad

    def update(self, problem: Problem) -> None:
        update(problem.sae, problem.optimizer)

    def work(self, shape: Shape, itemsize: int) -> dict[str, work.Work]:
        return work.sparse_phases(shape, itemsize)

    def working_set(self, shape: Shape, itemsize: int) -> int:
        return 8 * shape.n_tokens * shape.d_in * itemsize


class FusedAdamSAE(FastSAE):
    """The same SAE trained by fastsae.optim.FusedAdam: no gradient tensors, the update inside the backward."""

    name = "fastsae, FusedAdam"
    trains_only = True

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU):
        super().__init__(dtype, device)
        if dtype != torch.float32:
            self.precision += ", float32 masters"

    def step(self, problem: Problem) -> Iterator[str]:
        """A whole training step, in one part."""
        problem.zero_grad()
        problem.fused_optimizer.step(problem.x)
        yield from ()
