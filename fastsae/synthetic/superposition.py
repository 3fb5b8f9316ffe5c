"""ToySuperposition: a small network that keeps more features than it has neurons."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import decode
from fastsae.synthetic.source import KnownFeatures, checked_count, checked_sizes, random_directions, seeded

# A feature is either given up (norm near 0) or kept (near 1) but for a few in between.
_REPRESENTED_NORM = 0.5


class ToySuperposition(KnownFeatures):
    """The toy model of superposition of Elhage et al. 2022, and its hidden activations as data.

        h = W x,  x' = ReLU(Wᵀ h + b),  loss = mean_n Σ_f importance_f (x_nf - x'_nf)²
        x_nf ~ U(0, 1] with probability 1 - sparsity, else 0; W is [d, n_features], d < n_features

    `train` fits W and b; `sample` then gives activations h = Σ_f x_f ‖W_f‖ features_f, where features_f = W_f / ‖W_f‖
    are the normalised columns of W. The model gives up features that it has no room for: their columns are near zero.

    Args:
        n_features, d: features, and neurons that hold them.
        sparsity: chance of a feature to be absent from a token, in [0, 1).
        importance: weights of the features in the loss [n_features]; None is 1 for each.
        seed: of the start and of the training data.
        device: of the model and its samples; dtype is float32.

    Raises ValueError for an argument out of its range.

    Source: Elhage et al. 2022, "Toy Models of Superposition", Anthropic; n_features = 400 and d = 30 are those of its
    section on the geometry of superposition.
    """

    def __init__(
        self,
        n_features: int = 400,
        d: int = 30,
        *,
        sparsity: float = 0.99,
        importance: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        checked_sizes(n_features=n_features, d=d)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity = {sparsity!r}: expected at least 0 and below 1")
        self._generator = seeded(seed, "toy superposition", device)
        self.importance = _importance(importance, n_features).to(self._generator.device)
        self.sparsity = sparsity
        # Columns of about unit norm, which is where those of a trained model end.
        self.W = random_directions(n_features, d, self._generator).T.contiguous()
        self.b = torch.zeros(n_features, device=self.W.device)

    @property
    def norms(self) -> Tensor:
        """‖W_f‖ of each feature, [n_features]: about 1 if the model keeps it, about 0 if not."""
        return self.W.norm(dim=0)

    @property
    def features(self) -> Tensor:
        """W_f / ‖W_f‖, [n_features, d], of all features: those not `represented` are directions of next to nothing."""
        return (self.W / self.norms.clamp_min(torch.finfo(self.W.dtype).tiny)).T.contiguous()

    @property
    def represented(self) -> Tensor:
        """Whether the model keeps a feature, ‖W_f‖ > 0.5: bool [n_features]."""
        return self.norms > _REPRESENTED_NORM

    def train(self, steps: int = 2000, *, batch_size: int = 512, lr: float = 1e-2) -> float:
        """Fits the model by Adam, its rate falling linearly to zero; returns the mean loss of the last tenth of steps.

        The defaults take some six seconds on two cores and leave few norms between those kept and those given up; a
        rate of 1e-3 is not there after the same steps. With the same seed, calls, machine and number of threads the
        result is the same to the bit. Raises ValueError for sizes below 1 or an lr that is not above 0.
        """
        checked_sizes(steps=steps, batch_size=batch_size)
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr = {lr!r}: expected a finite number above 0")
        W, b = self.W.requires_grad_(), self.b.requires_grad_()
        optimizer = torch.optim.Adam([W, b], lr=lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        last = torch.zeros((), device=W.device)
        n_last = max(1, steps // 10)
        for step in range(steps):
            x = self._draw_features(batch_size, self._generator)
            reconstructed = (x @ W.T @ W + b).relu()
            loss = (self.importance * (x - reconstructed).square()).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step >= steps - n_last:
                last += loss.detach()
        self.W, self.b = W.detach(), b.detach()
        return last.item() / n_last

    def sample_with_codes(self, n: int, generator: torch.Generator) -> tuple[Tensor, SparseCodes]:
        """n hidden activations h [n, d] and their codes over `features`: x_f ‖W_f‖ where feature f is active.

        `generator` is one of the device of W; the sample depends on its state alone. Raises ValueError for n < 0.
        """
        codes = SparseCodes.from_dense(self._draw_features(checked_count(n), generator))
        return decode(codes, self.W.T.contiguous()), codes.with_values(codes.values * self.norms[codes.indices])

    def _draw_features(self, n: int, generator: torch.Generator) -> Tensor:
        """x [n, n_features]. One uniform number decides both: below 1 - sparsity it is active, and its value spread."""
        active = 1 - self.sparsity
        drawn = torch.rand(n, self.W.shape[1], generator=generator, device=self.W.device)
        return ((active - drawn) / active).clamp_min_(0)

    def __repr__(self) -> str:
        kept = int(self.represented.sum())
        return (
            f"ToySuperposition(n_features={self.n_features}, d={self.d}, sparsity={self.sparsity}, represented={kept})"
        )


def _importance(importance: Tensor | None, n_features: int) -> Tensor:
    if importance is None:
        return torch.ones(n_features)
    if not isinstance(importance, Tensor) or importance.shape != (n_features,):
        found = tuple(importance.shape) if isinstance(importance, Tensor) else type(importance).__name__
        raise ValueError(f"importance is {found}: expected a tensor [n_features] = [{n_features}]")
    if not ((importance >= 0) & importance.isfinite()).all():
        raise ValueError(
            f"importance runs from {importance.min():.4g} to {importance.max():.4g}: expected finite, >= 0"
        )
    return importance.detach().float().clone()
