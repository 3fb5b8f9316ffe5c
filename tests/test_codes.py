"""SparseCodes: conversions, counts and rows against the dense tensor; every argument checked."""

import copy
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fastsae import SparseCodes
from fastsae.testing import assert_same_bits, random_codes

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = pytest.mark.parametrize("k", [4, None], ids=["fixed_k", "csr"])


def draw(k=4, leading=(2, 3), dtype=torch.float32):
    codes = random_codes(torch.Size(leading).numel(), 17, k, dtype=dtype)
    return SparseCodes(codes.values, codes.indices, 17, offsets=codes.offsets, leading_shape=leading)


def by_hand(codes):
    """The dense activations, entry by entry."""
    dense = torch.zeros(codes.n_tokens, codes.d_sae, dtype=codes.dtype)
    values, indices = codes.values.reshape(-1), codes.indices.reshape(-1)
    for n in range(codes.n_tokens):
        if codes.offsets is None:
            entries = range(n * codes.k, (n + 1) * codes.k)
        else:
            entries = range(int(codes.offsets[n]), int(codes.offsets[n + 1]))
        for e in entries:
            dense[n, indices[e]] += values[e]
    return dense.reshape(codes.shape)


@KINDS
@pytest.mark.parametrize("leading", [(6,), (2, 3), (), (0,), (1, 0, 4)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_to_dense(k, leading, dtype):
    codes = draw(k, leading, dtype)
    assert_same_bits(codes.to_dense(), by_hand(codes))
    assert codes.shape == (*leading, 17)
    assert codes.n_tokens == len(codes) == torch.Size(leading).numel()
    assert codes.nnz == codes.values.numel()
    assert codes.k == k
    assert (codes.dtype, codes.device) == (dtype, torch.device("cpu"))


@KINDS
def test_to_dense_is_differentiable(k):
    codes = draw(k, dtype=torch.float64)
    values = codes.values.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: codes.with_values(values).to_dense(), values)


@st.composite
def dense_tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=2))
    d_sae = draw(st.integers(1, 9))
    values = st.sampled_from([0.0, -0.0, 1.0, -2.5, float("nan"), float("inf")])
    count = torch.Size(shape).numel() * d_sae
    flat = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(flat, dtype=draw(st.sampled_from(FLOATS))).reshape(*shape, d_sae)


@hypothesis.given(dense_tensors())
def test_dense_round_trip(dense):
    codes = SparseCodes.from_dense(dense)
    assert_same_bits(codes.to_dense(), dense)
    assert codes.nnz == int((dense != 0).sum())
    assert codes.indices.dtype == torch.int32
    # What from_dense trusts itself with holds.
    SparseCodes(codes.values, codes.indices, codes.d_sae, offsets=codes.offsets, leading_shape=codes.leading_shape)
    assert codes.l0().equal((dense != 0).sum(dim=-1))
    assert codes.feature_counts().equal((dense != 0).reshape(-1, dense.shape[-1]).sum(dim=0))


def test_from_dense_is_differentiable():
    dense = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0]], requires_grad=True)
    SparseCodes.from_dense(dense).values.square().sum().backward()
    assert_same_bits(dense.grad, 2 * dense.detach())


@KINDS
@pytest.mark.parametrize("leading", [(6,), (2, 3), (0,)], ids=str)
def test_to_sparse_csr(k, leading):
    codes = draw(k, leading)
    sparse = codes.to_sparse_csr()
    assert_same_bits(sparse.to_dense(), codes.to_dense().reshape(-1, 17))
    for n in range(codes.n_tokens):
        columns = sparse.col_indices()[sparse.crow_indices()[n] : sparse.crow_indices()[n + 1]]
        assert columns.equal(columns.sort().values)


@KINDS
def test_counts_leave_out_stored_zeros(k):
    codes = draw(k).relu()
    active = codes.to_dense() != 0
    assert codes.l0().equal(active.sum(dim=-1))
    assert codes.feature_counts().equal(active.reshape(-1, 17).sum(dim=0))


@KINDS
@pytest.mark.parametrize(
    "chosen",
    [0, -1, slice(1, 4), slice(None, None, 2), slice(3, 3), [5, 0, 0], torch.tensor([4, 1]), torch.arange(6) % 2 == 0],
    ids=str,
)
def test_rows(k, chosen):
    codes = draw(k)
    codes.input_statistics = torch.randn(2, 3, 1), torch.randn(2, 3, 1)
    rows = codes.rows(chosen)
    assert_same_bits(rows.to_dense(), codes.to_dense().reshape(6, 17)[chosen].reshape(-1, 17))
    for part, whole in zip(rows.input_statistics, codes.input_statistics, strict=True):
        assert_same_bits(part, whole.reshape(6, 1)[chosen].reshape(-1, 1))


@KINDS
def test_rows_are_differentiable(k):
    codes = draw(k, dtype=torch.float64)
    values = codes.values.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: codes.with_values(values).rows([3, 1, 3]).values, values)


@KINDS
def test_to(k):
    codes = draw(k)
    codes.input_statistics = torch.randn(2, 3, 1), torch.randn(2, 3, 1)
    half = codes.to(torch.bfloat16)
    assert_same_bits(half.values, codes.values.bfloat16())
    assert half.indices.equal(codes.indices)
    assert half.input_statistics[0].dtype == torch.bfloat16
    away = codes.to("meta")
    parts = [away.values, away.indices, *away.input_statistics] + ([] if k else [away.offsets])
    assert all(part.device.type == "meta" for part in parts)


def test_relu_detach_and_with_values():
    codes = draw()
    codes.values.requires_grad_()
    codes.input_statistics = torch.ones(2, 3, 1), torch.ones(2, 3, 1)
    for other in (codes.relu(), codes.detach(), codes.with_values(2 * codes.values)):
        assert other.indices is codes.indices
        assert other.leading_shape == codes.leading_shape
        assert other.input_statistics is codes.input_statistics
    assert not codes.detach().values.requires_grad
    codes.relu().values.sum().backward()
    assert_same_bits(codes.values.grad, (codes.values > 0).float())


@KINDS
def test_copies(k):
    codes = draw(k)
    for other in (copy.deepcopy(codes), pickle.loads(pickle.dumps(codes))):
        assert_same_bits(other.to_dense(), codes.to_dense())


def test_repr_is_short():
    assert repr(draw()) == "SparseCodes(shape=(2, 3, 17), k=4, dtype=torch.float32, device='cpu')"
    nnz = draw(None).nnz
    assert repr(draw(None)) == f"SparseCodes(shape=(2, 3, 17), nnz={nnz}, dtype=torch.float32, device='cpu')"


def test_int64_indices_are_converted():
    codes = SparseCodes(torch.ones(2, 1), torch.tensor([[0], [4]]), 5)
    assert codes.indices.dtype == torch.int32
    assert codes.indices.tolist() == [[0], [4]]
