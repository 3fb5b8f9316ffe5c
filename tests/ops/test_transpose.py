"""transpose: an exact permutation, so every backend must give the one answer."""

import pytest
import torch

from fastsae import SparseCodes, ops
from fastsae.ops.transpose import transposed
from fastsae.testing import random_codes

CODES = {
    "fixed_k": lambda: random_codes(37, 50, 6),
    "csr": lambda: random_codes(37, 50),
    "no_tokens": lambda: random_codes(0, 50, 6),
    "no_entries": lambda: SparseCodes(
        torch.empty(0), torch.empty(0, dtype=torch.int32), 5, offsets=torch.zeros(4, dtype=torch.int64)
    ),
    "one_latent": lambda: SparseCodes(torch.ones(300, 1), torch.zeros(300, 1, dtype=torch.int32), 1),
    "first_and_last": lambda: SparseCodes(torch.ones(2, 3), torch.tensor([[99, 0, 99], [0, 99, 0]]), 100),
}


@pytest.mark.parametrize("name", CODES)
def test_is_the_stable_sort_by_latent(backend, name):
    codes = CODES[name]()
    latent_offsets, tokens, entries = ops.transpose(codes)
    flat = codes.indices.reshape(-1).tolist()
    token_of = codes.tokens().reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda e: flat[e])
    assert entries.tolist() == order
    assert tokens.tolist() == [token_of[e] for e in order]
    assert latent_offsets.tolist() == [sum(i < f for i in flat) for f in range(codes.d_sae + 1)]
    assert [part.dtype for part in (latent_offsets, tokens, entries)] == [
        torch.int64,
        torch.int32,
        torch.int64,
    ]


def test_strided_indices(backend):
    codes = random_codes(12, 50, 6)
    strided = SparseCodes(codes.values, codes.indices.T.contiguous().T, 50)
    for actual, expected in zip(ops.transpose(strided), ops.transpose(codes), strict=True):
        assert actual.equal(expected)


def test_codes_made_in_inference_mode(backend):
    """Their tensors count no versions, so nothing about them can be remembered; they are transposed anew."""
    with torch.inference_mode():
        codes = random_codes(12, 50, 6)
    expected = ops.transpose(codes)
    for _ in range(2):
        for actual, part in zip(transposed(codes.indices, None, 50), expected, strict=True):
            assert actual.equal(part)


def test_the_same_transposition_twice_is_computed_once(backend):
    codes = random_codes(12, 50)
    first = transposed(codes.indices, codes.offsets, 50)
    assert transposed(codes.indices, codes.offsets, 50) is first
    assert transposed(codes.indices, codes.offsets, 51) is not first
