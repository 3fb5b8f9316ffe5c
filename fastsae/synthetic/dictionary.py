"""SparseDictionary: a sparse linear dictionary, the model that SAEs assume."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import decode
from fastsae.synthetic.source import KnownFeatures, checked_count, checked_sizes, random_directions, seeded

MAGNITUDES = ("shifted_exponential", "uniform")


class SparseDictionary(KnownFeatures):
    """Activations that are exactly what a sparse autoencoder assumes, up to the noise.

        x_n = offset + Σ_f a_nf m_nf features_f + noise · ε_n
        a_nf ~ Bernoulli(probability_f),  ε_n ~ N(0, I),  all independent

    Features are drawn evenly from the unit sphere, so in d dimensions two of them have a cosine of about 1/√d. Memory
    and time of a sample go with its active features: nothing is [n, n_features].

    Args:
        n_features, d: number of features, width of an activation.
        probability: chance of each feature to be active in a token: one number for all, or [n_features]
            (`zipf_probabilities` makes skewed ones). Their sum is the mean L0.
        magnitudes: "shifted_exponential" is m = 1 + Exp(1), "uniform" is m ~ U(0, 1], as in Elhage et al. 2022.
        noise: standard deviation of the noise, in each dimension.
        offset_norm: norm of a constant vector of random direction that is added to all activations.
        seed: of the features and the offset.
        device, dtype: of features and samples.

    Raises ValueError for an argument out of its range.

    Source of the model: Olshausen and Field 1996, "Emergence of simple-cell receptive field properties by learning a
    sparse code for natural images"; as ground truth for SAEs: Sharkey, Braun and Millidge 2022, "Taking features out
    of superposition with sparse autoencoders".
    """

    def __init__(
        self,
        n_features: int,
        d: int,
        *,
        probability: float | Tensor,
        magnitudes: str = "shifted_exponential",
        noise: float = 0.0,
        offset_norm: float = 0.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        checked_sizes(n_features=n_features, d=d)
        if magnitudes not in MAGNITUDES:
            raise ValueError(f"magnitudes = {magnitudes!r}: expected one of {', '.join(map(repr, MAGNITUDES))}")
        for name, value in (("noise", noise), ("offset_norm", offset_norm)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value!r}: expected a finite number of at least 0")
        generator = seeded(seed, "sparse dictionary", device)
        self.features = random_directions(n_features, d, generator).to(dtype)
        self.offset = (offset_norm * random_directions(1, d, generator)[0]).to(dtype)
        self.probability = _probabilities(probability, n_features).to(generator.device)
        self.magnitudes = magnitudes
        self.noise = noise
        # A Poisson process with this rate in a place leaves it empty with chance 1 - probability.
        rates = -torch.log1p(-self.probability)
        self._cumulative_rates = rates.cumsum(0)

    @property
    def mean_l0(self) -> float:
        """Expected number of active features of a token."""
        return self.probability.sum().item()

    def sample_with_codes(self, n: int, generator: torch.Generator) -> tuple[Tensor, SparseCodes]:
        """n activations [n, d] and the codes over `features` that made them, features of a token ascending.

        `generator` is one of the device of `features`; the sample depends on its state alone. Raises ValueError for
        n < 0.
        """
        places = self._active_places(checked_count(n), generator)
        counts = torch.bincount(places // self.n_features, minlength=n)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        magnitudes = self._draw_magnitudes(len(places), generator)
        codes = SparseCodes(magnitudes, (places % self.n_features).int(), self.n_features, offsets=offsets)
        x = decode(codes, self.features, self.offset)
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x, codes

    def _active_places(self, n: int, generator: torch.Generator) -> Tensor:
        """Places token · n_features + feature of the active ones, ascending, int64; exactly independent Bernoulli.

        Points are thrown into the n · n_features places as a Poisson process does: their number is Poisson, each falls
        on a place by its rate. A place with rate -log(1 - p) is hit with probability p, whatever happens elsewhere.
        """
        total = self._cumulative_rates[-1]
        n_points = int(torch.poisson(n * total, generator=generator))
        drawn = torch.rand(2, n_points, generator=generator, device=total.device, dtype=torch.float64)
        tokens = (drawn[0] * n).long()
        features = torch.searchsorted(self._cumulative_rates, drawn[1] * total, right=True)
        return torch.unique(tokens * self.n_features + features.clamp_max(self.n_features - 1))

    def _draw_magnitudes(self, n: int, generator: torch.Generator) -> Tensor:
        # 1 - U is in (0, 1]: an active feature is never zero, and its logarithm is finite.
        uniform = 1 - torch.rand(n, generator=generator, device=self.features.device, dtype=torch.float32)
        drawn = uniform if self.magnitudes == "uniform" else 1 - uniform.log()
        return drawn.to(self.features.dtype)

    def __repr__(self) -> str:
        return (
            f"SparseDictionary(n_features={self.n_features}, d={self.d}, mean_l0={self.mean_l0:.4g}, "
            f"magnitudes={self.magnitudes!r}, noise={self.noise})"
        )


def zipf_probabilities(n_features: int, mean_l0: float, exponent: float = 1.0) -> Tensor:
    """Chances p_f = c / (f + 1)^exponent with Σ p_f = mean_l0: a few frequent features, many rare ones.

    float64 [n_features], falling. Raises ValueError for sizes out of their range, or where p_0 would reach 1.
    """
    checked_sizes(n_features=n_features)
    if not 0 <= exponent < float("inf") or not 0 < mean_l0 < float("inf"):
        raise ValueError(f"mean_l0 = {mean_l0}, exponent = {exponent}: expected mean_l0 > 0 and exponent >= 0, finite")
    weights = torch.arange(1, n_features + 1, dtype=torch.float64) ** -exponent
    probabilities = mean_l0 * weights / weights.sum()
    if probabilities[0] >= 1:
        raise ValueError(
            f"mean_l0 = {mean_l0} of {n_features} features with exponent = {exponent} gives the most frequent a chance "
            f"of {probabilities[0]:.3g}: expected below 1; lower mean_l0 or exponent, or take more features"
        )
    return probabilities


def _probabilities(probability: float | Tensor, n_features: int) -> Tensor:
    """Checked, float64 [n_features] with memory of its own."""
    given = torch.as_tensor(probability, dtype=torch.float64)
    if given.shape not in ((), (n_features,)):
        raise ValueError(f"probability has shape {tuple(given.shape)}: expected a number or [{n_features}]")
    if not ((given >= 0) & (given < 1)).all():
        worst = f"from {given.min():.4g} to {given.max():.4g}" if given.dim() else f"{given:.4g}"
        raise ValueError(f"probability = {worst}: expected at least 0 and below 1")
    return given.expand(n_features).clone()
