"""One SAE of a shape and a batch of activations, the same for every implementation and on every machine."""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsae.bench.shapes import Shape
from fastsae.codes import SparseCodes
from fastsae.optim import FusedAdam
from fastsae.saes import TopKSAE

INPUTS = ("mixture", "gaussian")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# So small that hundreds of timed steps leave the problem what it was, whatever their number.
_LEARNING_RATE = 1e-6
_SEED = 0


class PlainWeights(NamedTuple):
    """W_enc [d_sae, d_in] contiguous, b_enc, W_dec and b_dec."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter


class Problem:
    """`sae`, and x [n_tokens, d_in] for it.

    `inputs="mixture"` makes each token of k decoder rows, magnitudes and a mean like those of activations, and noise;
    latents fire with log-normal frequencies, so that the common ones fire hundreds of times as often as the median.
    `inputs="gaussian"` is plain noise: harder to screen (winners barely stand out), easier to balance (each latent
    fires alike).

    All implementations work on these numbers, each in the layout that suits it: `sae`, and `plain` as views of the
    same memory. There is one set of gradients and one of optimizer state.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, inputs: str = "mixture", device: torch.device | str = "cpu"):
        if inputs not in INPUTS:
            raise ValueError(f"inputs = {inputs!r}: expected one of {', '.join(INPUTS)}")
        self.shape, self.dtype, self.inputs = shape, dtype, inputs
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(_SEED)
            self.sae = TopKSAE(shape.d_in, shape.d_sae, shape.k, dtype=dtype)
            with torch.no_grad():
                self.sae.b_enc.normal_(std=0.02)
                self.sae.b_dec.normal_()
                self.x = _mixture(self.sae, shape) if inputs == "mixture" else torch.randn(shape.n_tokens, shape.d_in)
                self.x = self.x.to(dtype)
                self.g = torch.randn(shape.n_tokens, shape.d_in).to(dtype)

    @cached_property
    def plain(self) -> "PlainWeights":
        """The parameters as a step in plain PyTorch has them, W_enc the weight of an nn.Linear."""
        sae = self.sae
        return PlainWeights(nn.Parameter(sae.W_enc.detach().T), sae.b_enc, sae.W_dec, sae.b_dec)

    @cached_property
    def masters(self) -> "PlainWeights":
        """What a trainer in mixed precision keeps: `plain` in float32, which for a float32 SAE it is already."""
        if self.dtype == torch.float32:
            return self.plain
        return PlainWeights(*(nn.Parameter(weight.detach().float()) for weight in self.plain))

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over the SAE's parameters."""
        return _adam(self.sae.parameters())

    @cached_property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """Adam over `plain`, on the same state."""
        adam = torch.optim.Adam(self.plain, lr=_LEARNING_RATE, fused=True)
        state = self.optimizer.state
        adam.state.update({parameter: state[parameter] for parameter in self.plain[1:]})
        adam.state[self.plain.W_enc] = _transposed(state[self.sae.W_enc])
        return adam

    @cached_property
    def master_optimizer(self) -> torch.optim.Optimizer:
        """Adam over `masters`."""
        return self.plain_optimizer if self.masters is self.plain else _adam(self.masters)

    @cached_property
    def default_optimizer(self) -> torch.optim.Optimizer:
        """As `master_optimizer`, on the same moments, with Adam's default implementation."""
        adam = torch.optim.Adam(self.masters, lr=_LEARNING_RATE)
        for parameter, state in self.master_optimizer.state.items():
            adam.state[parameter] = state | {"step": state["step"].cpu()}
        return adam

    @cached_property
    def fused_optimizer(self) -> FusedAdam:
        """fastsae's optimizer, on the masters and moments of `master_optimizer`."""
        mixed = self.masters is not self.plain
        fused = FusedAdam(self.sae, lr=_LEARNING_RATE, master_weights=mixed)
        for name, master in self.masters._asdict().items():
            state = self.master_optimizer.state[master]
            state = state | {"step": state["step"].cpu()} | ({"master": master.detach()} if mixed else {})
            fused.state[getattr(self.sae, name)] = _transposed(state) if name == "W_enc" else state
        return fused

    def zero_grad(self) -> None:
        """Gives back every gradient's memory, whoever made it."""
        for parameter in (*self.sae.parameters(), *self.plain, *self.masters):
            parameter.grad = None

    @cached_property
    @torch.no_grad()
    def codes(self) -> SparseCodes:
        """What x is encoded to; decoders are timed on these."""
        return self.sae.encode(self.x)

    @cached_property
    def sample(self) -> Tensor:
        """Up to 64 tokens spread over the batch, for the checks."""
        count = min(64, self.shape.n_tokens)
        return torch.linspace(0, self.shape.n_tokens - 1, count, device=self.x.device).long()


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's fused Adam with its state made, so that every step is like every other."""
    parameters = list(parameters)
    adam = torch.optim.Adam(parameters, lr=_LEARNING_RATE, fused=True)
    for parameter in parameters:
        adam.state[parameter] = {
            # torch's fused kernels count where the parameter is.
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return adam


def _transposed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.T if part.dim() else part for name, part in state.items()}


def _mixture(sae: TopKSAE, shape: Shape) -> Tensor:
    frequencies = torch.randn(shape.d_sae).mul_(1.5).exp_()
    places = torch.multinomial(frequencies, shape.nnz, replacement=True).reshape(shape.n_tokens, shape.k)
    magnitudes = 1 + torch.empty(shape.n_tokens, shape.k).exponential_()
    rows = sae.W_dec.detach().float()
    x = functional.embedding_bag(places, rows, per_sample_weights=magnitudes, mode="sum")
    noise = 0.2 * x.norm(dim=1).mean() / shape.d_in**0.5
    return x + sae.b_dec.float() + noise * torch.randn_like(x)
