"""Elementwise work on codes: what belongs to a latent brought to its entries, and sums of entries.

Each is one of the sparse products with a dictionary of one column, so sums have a fixed order on every device.
"""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.decode import decode_op
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.ops.transpose import transposed


def at_entries(vector: Tensor, codes: SparseCodes) -> Tensor:
    """vector[f] for each entry of latent f: [d_sae] -> the shape of codes.values; differentiable in `vector`."""
    ones = vector.new_ones(codes.n_tokens, 1)
    return sampled_dot_op(ones, codes.indices, codes.offsets, vector[:, None], None)


def token_sums(values: Tensor, codes: SparseCodes) -> Tensor:
    """Σ_j values_nj for each token n: [n_tokens], in the dtype of `values`; differentiable."""
    ones = values.new_ones(codes.d_sae, 1)
    return decode_op(values, codes.indices, codes.offsets, ones, None)[:, 0]


def latent_sums(values: Tensor, codes: SparseCodes) -> Tensor:
    """Σ_n values_nf over the entries of each latent f: [d_sae], in the dtype of `values`; differentiable."""
    ones = values.new_ones(codes.n_tokens, 1)
    latent_major = transposed(codes.indices, codes.offsets, codes.d_sae)
    return accumulate_rows_op(values, *latent_major, ones, None, None)[0][:, 0]


def wide(values: Tensor) -> Tensor:
    """Half precision as float32: penalties are sums over many entries."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
