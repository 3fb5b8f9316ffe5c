"""SAELoss: a loss, its terms by name, and how well a batch was reconstructed."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes

RECONSTRUCTIONS = ("fvu", "mse", "mse_mean")


@dataclass
class SAELoss:
    """A loss and its terms, 0-dimensional tensors; `total` is the one to call backward on.

    total: what training minimises, the reconstruction error and every other term times its coefficient.
    terms: each term by name, without its coefficient; an attribute too (`loss.mse`). All architectures have
        mse: mean over tokens of ‖x̂ - x‖² (summed over d_out), in the normalised space that is encoded;
        fvu: fraction of variance unexplained, Σ‖x̂ - x‖² / Σ‖x - mean(x)‖²; 1 - fvu is the explained variance;
        an architecture's docstring names its own.
    codes: what the batch was encoded to.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(repr=False)
    codes: SparseCodes

    def __getattr__(self, name: str) -> Tensor:
        terms = self.__dict__.get("terms", {})
        if name not in terms:
            raise AttributeError(f"{name}: expected total, codes or one of {', '.join(terms)}")
        return terms[name]

    def parts(self) -> dict[str, Tensor]:
        """The total and every term by name."""
        return {"total": self.total, **self.terms}


class Reconstruction(NamedTuple):
    """How a batch was reconstructed."""

    residual: Tensor  # x̂ - target [n_tokens, d_out]
    objective: Tensor  # what the total counts of it
    terms: dict[str, Tensor]


class Penalty(NamedTuple):
    """A term beside the reconstruction and its weight in the total."""

    value: Tensor
    coefficient: float


def objective_of(mse: Tensor, fvu: Tensor, reconstruction: str, d_out: int) -> Tensor:
    """`fvu`, `mse` (summed over d_out, mean over tokens) or `mse_mean` (mean over both)."""
    if reconstruction == "fvu":
        return fvu
    return mse if reconstruction == "mse" else mse / d_out


def variance(x: Tensor) -> Tensor:
    """Σ_d Var(x_d) of x [n_tokens, d], with n_tokens in the denominator; float32 (float64 for float64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.detach().to(wide).var(dim=0, unbiased=False).sum()


def zero_of(x: Tensor) -> Tensor:
    """The term that is not there: 0 in the dtype of losses."""
    return x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
