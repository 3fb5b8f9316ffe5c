"""Inputs of encoders that break careless ones: faults of x and of weights, and hypothesis' mixtures of them."""

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from torch import Tensor


@dataclass
class Problem:
    """The arguments of the operator, in its order."""

    x: Tensor
    w_enc: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None
    k: int
    relu_first: bool

    @property
    def arguments(self):
        return self.x, self.w_enc, self.b_enc, self.b_dec, self.k, self.relu_first


# What can be wrong with an activation: each spoils one row of x, or one column, or all.
def spoil_x(x: Tensor, how: str, at: int) -> None:
    row = x[at % len(x)]
    place = at % x.shape[1]
    if how == "nan":
        row[place] = torch.nan
    elif how == "inf":
        row[place] = torch.inf
    elif how == "both_infs":
        row[place], row[0] = -torch.inf, torch.inf
    elif how == "zero":
        row.zero_()
    elif how == "huge":
        row.mul_(1e30)
    elif how == "tiny":
        row.mul_(1e-30)
    elif how == "denormal":
        row.mul_(1e-39)
    elif how == "outlier_dimension":
        x[:, place] *= 1e4


def spoil_w(w: Tensor, how: str, at: int) -> None:
    f = at % len(w)
    if how == "nan":
        w[f, at % w.shape[1]] = torch.nan
    elif how == "inf":
        w[f, at % w.shape[1]] = -torch.inf
    elif how == "zero":
        w[f] = 0
    elif how == "huge":
        w[f] *= 1e30
    elif how == "tiny":
        w[f] *= 1e-30
    elif how == "duplicates":
        w[f:] = w[f].clone()
    elif how == "near_duplicates":
        # Spreads from far under to far over what a screen can tell apart.
        spread = 10.0 ** -(1 + at % 7)
        generator = torch.Generator(torch.get_default_device()).manual_seed(at)
        w[f:] = w[f] * (1 + spread * torch.rand(len(w) - f, 1, generator=generator)).to(w.dtype)
    elif how == "all_negative":
        w.abs_().neg_()


X_FAULTS = ("nan", "inf", "both_infs", "zero", "huge", "tiny", "denormal", "outlier_dimension")
W_FAULTS = ("nan", "inf", "zero", "huge", "tiny", "duplicates", "near_duplicates", "all_negative")


@st.composite
def problems(draw, dtypes):
    # Off every block: 16 lanes, 512 latents of a chunk, 256 latents under which nothing is screened.
    n_tokens = draw(st.sampled_from([1, 3, 37, 199]))
    d_in = draw(st.sampled_from([1, 3, 16, 17, 50]))
    widths = [1, 255, 256, 300] + ([512, 513, 700, 1100] if n_tokens <= 37 else [])
    d_sae = draw(st.sampled_from(widths))
    k = min(d_sae, draw(st.sampled_from([1, 2, 5, 8, 32, 70, d_sae])))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.integers(0, 2)):

        def tensor(*shape):
            return torch.randn(shape, generator=generator).to(dtype)
    else:
        # Small integers: sums are exact and most of them are tied.
        def tensor(*shape):
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    x, w_enc = tensor(n_tokens, d_in), tensor(d_sae, d_in)
    relu_first = draw(st.booleans())
    for fault, at in draw(st.lists(st.tuples(st.sampled_from(X_FAULTS), st.integers(0, 5000)), max_size=3)):
        spoil_x(x, fault, at)
    for fault, at in draw(st.lists(st.tuples(st.sampled_from(W_FAULTS), st.integers(0, 5000)), max_size=3)):
        spoil_w(w_enc, fault, at)
    b_enc = tensor(d_sae) if draw(st.booleans()) else None
    b_dec = tensor(d_in) if draw(st.booleans()) else None
    return Problem(x, w_enc, b_enc, b_dec, k, relu_first)
