"""The step in plain PyTorch: dense as SAELens and dictionary_learning run it, and with F.embedding_bag as sparsify.

Both minimise what TopKSAE.loss does, keep decoder rows at unit norm as it does, and use Adam(fused=True).
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastsae.backends import native
from fastsae.backends.screen import screen_dtype
from fastsae.bench import work
from fastsae.bench.implementations import CPU, FastSAE, FusedAdamSAE, Implementation
from fastsae.bench.problem import PlainWeights, Problem
from fastsae.bench.shapes import Shape


def _fvu(y: Tensor, x: Tensor) -> Tensor:
    x = x.float()
    return (y - x).square().sum(dim=1).mean() / x.var(dim=0, unbiased=False).sum()


class Dense(Implementation):
    """Six GEMMs: encode, decode and four in the backward; pre-activations, codes and their gradients [N, F]."""

    name = "dense"

    def __init__(self, dtype: torch.dtype, *, autocast: str | None = None):
        """`autocast` names the device type on which products are made in bfloat16."""
        self.autocast = autocast
        self.precision = "bfloat16 products, float32 weights" if autocast else _name(dtype)
        self.ranked_in = torch.bfloat16 if autocast else dtype
        self.mixed = autocast is not None
        if autocast:
            self.name = "dense autocast"

    def weights(self, problem: Problem) -> PlainWeights:
        """Its parameters: autocast is for float32 ones."""
        return problem.plain if self.autocast is None else problem.masters

    def optimizer(self, problem: Problem) -> torch.optim.Optimizer:
        return problem.plain_optimizer if self.autocast is None else problem.master_optimizer

    def context(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.autocast or "cpu", dtype=torch.bfloat16, enabled=self.autocast is not None)

    def picks(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, _, b_dec = self.weights(problem)
        with self.context():
            return functional.linear(x - b_dec, W_enc, b_enc).topk(problem.shape.k, sorted=False)

    def encode(self, problem: Problem, x: Tensor) -> Any:
        values, indices = self.picks(problem, x)
        return values.new_zeros(x.shape[0], problem.shape.d_sae).scatter_(1, indices, values.relu())

    def decode(self, problem: Problem, codes: Any) -> Tensor:
        weights = self.weights(problem)
        with self.context():
            return torch.addmm(weights.b_dec, codes, weights.W_dec)

    def loss(self, problem: Problem, x: Tensor) -> Tensor:
        return _fvu(self.decode(problem, self.encode(problem, x)), x)

    def gradients(self, problem: Problem) -> tuple[Tensor, ...]:
        return tuple(parameter.grad for parameter in self.weights(problem))

    @torch.no_grad()
    def update(self, problem: Problem) -> None:
        W_dec = self.weights(problem).W_dec
        along = torch.linalg.vecdot(W_dec.grad, W_dec)
        W_dec.grad.addcmul_(W_dec, along[:, None], value=-1)
        self.optimizer(problem).step()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    def work(self, shape: Shape, itemsize: int) -> dict[str, work.Work]:
        return work.dense_phases(shape, itemsize)

    def working_set(self, shape: Shape, itemsize: int) -> int:
        casts = shape.parameters * 2 if self.autocast else 0
        return (4 * shape.n_tokens * shape.d_sae + shape.d_in * shape.d_sae) * itemsize + casts


class EmbeddingBag(Dense):
    """torch.topk of the dense pre-activations, then F.embedding_bag for every product with the codes.

    The encoder's gradient is written as sparsify's FusedEncoder writes it, a sum over the picks; embedding_bag's own
    backward makes that sum, which is faster than sparsify's index_add_ of an [N, k, D] tensor.
    """

    name = "topk + embedding_bag"

    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype)

    def picks(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, _, b_dec = problem.plain
        return _TopKLinear.apply(x, W_enc, b_enc, b_dec, problem.shape.k)

    def encode(self, problem: Problem, x: Tensor) -> Any:
        values, indices = self.picks(problem, x)
        return values.relu(), indices

    def decode(self, problem: Problem, codes: Any) -> Tensor:
        (values, indices), W_dec = codes, problem.plain.W_dec
        return functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + problem.plain.b_dec

    def work(self, shape: Shape, itemsize: int) -> dict[str, work.Work]:
        return work.sparse_phases(shape, itemsize)

    def working_set(self, shape: Shape, itemsize: int) -> int:
        return (2 * shape.n_tokens * shape.d_sae + shape.d_in * shape.d_sae) * itemsize


class _TopKLinear(torch.autograd.Function):
    """The k largest of (x - b_dec) Wᵀ + b_enc, W [d_sae, d_in]; a backward over the picks alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
        centred = x - b_dec
        values, indices = functional.linear(centred, W, b_enc).topk(k, sorted=False)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(centred, W, indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        centred, W, indices = ctx.saved_tensors
        with torch.enable_grad():
            weight = W.detach().requires_grad_()
            bags = functional.embedding_bag(indices, weight, per_sample_weights=g, mode="sum")
        (grad_W,) = torch.autograd.grad(bags, weight, centred)
        grad_b_enc = g.new_zeros(W.shape[0]).index_add_(0, indices.reshape(-1), g.reshape(-1))
        return None, grad_W, grad_b_enc, -(grad_b_enc @ W), None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class DefaultAdam(Dense):
    """The dense step with Adam as PyTorch has it by default, which is what most trainers run."""

    trains_only = True

    def __init__(self, dtype: torch.dtype, *, autocast: str | None = None):
        super().__init__(dtype, autocast=autocast)
        self.name += ", default Adam"

    def optimizer(self, problem: Problem) -> torch.optim.Optimizer:
        return problem.default_optimizer


def contestants(dtype: torch.dtype, device: torch.device = CPU) -> list[Implementation]:
    """Every implementation that is compared for parameters of `dtype` on `device`, fastsae's first."""
    chosen: list[Implementation] = [FastSAE(dtype, device), FusedAdamSAE(dtype, device)]
    if device.type == "cpu" and native.cpu is not None and screen_dtype() != torch.float32:
        chosen += [FastSAE(dtype, device, screen=screen) for screen in ("float32", "int8")]
    chosen.append(Dense(dtype))
    chosen.append(Dense(dtype, autocast=device.type))
    if device.type != "cpu":
        chosen.append(DefaultAdam(dtype, autocast=device.type))
    chosen.append(EmbeddingBag(dtype))
    return chosen
