"""One training step with fastsae and in dense PyTorch, side by side."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsae.optim import FusedAdam
from fastsae.saes import TopKSAE

# A dense step that selects one other latent among near-equal ones, by rounding, moves the loss by less.
_SAME_LOSS = 1e-4
_FEWEST_PAIRS, _MOST_PAIRS = 3, 15


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of a step of either kind, how many of each were timed, and how far their first losses differ."""

    step_seconds: float
    dense_step_seconds: float
    n_steps: int
    loss_difference: float


class DenseTopK(nn.Module):
    """A TopKSAE in plain PyTorch, as a textbook has it: [n_tokens, d_sae] tensors, every gradient by autograd.

    Starts from copies of an SAE's weights; same loss (FVU) and same normalisation of the input, without AuxK.
    """

    def __init__(self, sae: TopKSAE):
        super().__init__()
        self.k, self.scale = sae.k, float(sae.activation_scale)
        self.W_enc = nn.Parameter(sae.W_enc.detach().clone(memory_format=torch.contiguous_format))
        self.W_dec = nn.Parameter(sae.W_dec.detach().clone())
        self.b_enc = nn.Parameter(sae.b_enc.detach().clone())
        self.b_dec = nn.Parameter(sae.b_dec.detach().clone())

    def loss(self, x: Tensor) -> Tensor:
        """Σ‖x̂ - x‖² / Σ‖x - mean(x)‖² for raw activations [n_tokens, d_in]."""
        x = x * self.scale
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = pre.topk(self.k, dim=1)
        latents = torch.zeros_like(pre).scatter(1, indices, values.relu())
        reconstruction = latents @ self.W_dec + self.b_dec
        return (reconstruction - x).square().sum() / (x - x.mean(dim=0)).square().sum()

    def step(self, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """Loss, backward, the decoder's gradient projected, the optimizer's step, decoder rows of unit norm."""
        optimizer.zero_grad()
        loss = self.loss(x)
        loss.backward()
        with torch.no_grad():
            gradient = self.W_dec.grad
            gradient -= (gradient * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec
        optimizer.step()
        with torch.no_grad():
            self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))
        return loss.detach()


def compare_steps(sae: TopKSAE, batches: Sequence[Tensor], lr: float, seconds: float = 15.0) -> StepTimes:
    """Times fastsae's fused step and the dense step in turn, on the same batches, from the same weights.

    Both are Adam with the same settings; AuxK, which only acts on dead latents, is off in both. One step of each is
    for warming up. Then pairs follow until `seconds` are over: 3 at least, 15 at most. `sae` itself is not changed.

    Raises RuntimeError if the two do not give the same loss from the same weights: no time would mean anything.
    """
    ours = copy.deepcopy(sae).train()
    ours.auxk = 0
    dense = DenseTopK(sae)
    our_optimizer = FusedAdam(ours, lr=lr)
    dense_optimizer = torch.optim.Adam(dense.parameters(), lr=lr, fused=True)
    with torch.no_grad():
        losses = ours.loss(batches[0]).total.item(), dense.loss(batches[0]).item()
    difference = abs(losses[0] - losses[1]) / abs(losses[1])
    if not difference <= _SAME_LOSS:
        raise RuntimeError(f"fastsae's loss is {losses[0]} and dense PyTorch's {losses[1]} from the same weights")

    def pair(x: Tensor) -> tuple[float, float]:
        return _timed(lambda: our_optimizer.step(x)), _timed(lambda: dense.step(x, dense_optimizer))

    endless = _cycle(batches)
    pair(next(endless))
    began, times = time.perf_counter(), []
    while len(times) < _FEWEST_PAIRS or (len(times) < _MOST_PAIRS and time.perf_counter() - began < seconds):
        times.append(pair(next(endless)))
    ours_seconds, dense_seconds = zip(*times, strict=True)
    return StepTimes(median(ours_seconds), median(dense_seconds), len(times), difference)


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cycle(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from batches
