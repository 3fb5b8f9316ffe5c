"""What bad arguments get: a TypeError or ValueError that names the argument, its value and what was expected."""

import re

import pytest
import torch

from fastsae import SparseCodes, ops
from fastsae.backends import native
from fastsae.ops.decode import decode_op
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.ops.squared_error import squared_error_op
from fastsae.ops.transpose import transpose_op
from fastsae.testing import backends, random_codes

D, D_SAE, K, N_TOKENS = 6, 20, 3, 4
X, W_ENC, W_DEC = torch.randn(N_TOKENS, D), torch.randn(D_SAE, D).T, torch.randn(D_SAE, D)
B_ENC, B_DEC = torch.randn(D_SAE), torch.randn(D)
CODES = random_codes(N_TOKENS, D_SAE, K)
ONES, PLACES = torch.ones(3), torch.tensor([0, 1, 2])


def encode(x=X, W_enc=W_ENC, b_enc=B_ENC, k=K, b_dec=None):
    return ops.encode_topk(x, W_enc, b_enc, k, b_dec=b_dec)


def csr(*offsets, **changed):
    arguments = {"values": ONES, "indices": PLACES, "d_sae": 5, "offsets": torch.tensor(offsets)} | changed
    return SparseCodes(**arguments)


# (call, exception, every piece that its message must hold)
BAD_CALLS = {
    "k_zero": (lambda: encode(k=0), ValueError, ["k = 0", "1 <= k <= d_sae = 20"]),
    "k_negative": (lambda: encode(k=-2), ValueError, ["k = -2", "1 <= k"]),
    "k_over_d_sae": (lambda: encode(k=21), ValueError, ["k = 21", "d_sae = 20"]),
    "k_bool": (lambda: encode(k=True), TypeError, ["k is True", "int"]),
    "k_float": (lambda: encode(k=3.0), TypeError, ["k is 3.0", "int"]),
    "x_of_integers": (lambda: encode(x=X.long()), TypeError, ["x has dtype torch.int64", "float32"]),
    "x_a_list": (lambda: encode(x=[[1.0] * D]), TypeError, ["x is a list", "torch.Tensor"]),
    "x_complex": (lambda: encode(x=X.to(torch.complex64)), TypeError, ["x has dtype torch.complex64"]),
    "x_float8": (lambda: encode(x=X.to(torch.float8_e4m3fn)), TypeError, ["x has dtype torch.float8_e4m3fn"]),
    "x_of_another_width": (lambda: encode(x=X[:, :5]), ValueError, ["(4, 5)", "(6, 20)", "[..., d_in]"]),
    "x_without_dimensions": (lambda: encode(x=X[0, 0]), ValueError, ["x has shape ()", "[..., d_in]"]),
    "x_of_another_dtype": (lambda: encode(x=X.double()), TypeError, ["x has dtype torch.float64", "torch.float32"]),
    "x_elsewhere": (lambda: encode(x=X.to("meta")), ValueError, ["x is on meta", "W_enc on cpu"]),
    "W_enc_of_integers": (lambda: encode(W_enc=W_ENC.int()), TypeError, ["W_enc has dtype torch.int32"]),
    "W_enc_transposed": (lambda: encode(W_enc=W_ENC.T), ValueError, ["(20, 6)", "[d_in, d_sae]"]),
    "W_enc_a_vector": (lambda: encode(W_enc=B_DEC), ValueError, ["W_enc (6,)", "[d_in, d_sae]"]),
    "b_enc_of_another_width": (lambda: encode(b_enc=B_DEC), ValueError, ["b_enc has shape (6,)", "[20]"]),
    "b_enc_a_number": (lambda: encode(b_enc=0.0), TypeError, ["b_enc is a float", "torch.Tensor"]),
    "b_enc_of_another_dtype": (lambda: encode(b_enc=B_ENC.half()), TypeError, ["b_enc has dtype torch.float16"]),
    "b_dec_of_another_width": (lambda: encode(b_dec=B_ENC), ValueError, ["b_dec has shape (20,)", "[6]"]),
    "b_dec_elsewhere": (lambda: encode(b_dec=B_DEC.to("meta")), ValueError, ["b_dec is on meta", "W_enc on cpu"]),
    "decode_dense_codes": (lambda: ops.decode(torch.ones(4, D_SAE), W_DEC), TypeError, ["codes is a Tensor"]),
    "decode_codes_of_another_width": (
        lambda: ops.decode(CODES, W_DEC[:19]),
        ValueError,
        ["W_dec has shape (19, 6)", "d_sae = 20"],
    ),
    "decode_codes_of_another_dtype": (
        lambda: ops.decode(CODES.to(torch.float64), W_DEC),
        TypeError,
        ["codes has dtype torch.float64", "W_dec torch.float32"],
    ),
    "decode_codes_elsewhere": (
        lambda: ops.decode(CODES.to("meta"), W_DEC),
        ValueError,
        ["codes is on meta", "W_dec on cpu"],
    ),
    "decode_b_dec_of_another_width": (lambda: ops.decode(CODES, W_DEC, B_ENC), ValueError, ["b_dec has shape (20,)"]),
    "decode_b_dec_a_number": (lambda: ops.decode(CODES, W_DEC, 0), TypeError, ["b_dec is a int"]),
    "target_of_another_width": (
        lambda: ops.squared_error(CODES, W_DEC, None, X[:, :5]),
        ValueError,
        ["target has shape (4, 5)", "(4, 6)"],
    ),
    "target_of_other_tokens": (
        lambda: ops.squared_error(CODES, W_DEC, None, X[:3]),
        ValueError,
        ["target has shape (3, 6)", "(4, 6)"],
    ),
    "target_of_integers": (
        lambda: ops.squared_error(CODES, W_DEC, None, X.long()),
        TypeError,
        ["target has dtype torch.int64"],
    ),
    "sampled_dot_dense_codes": (lambda: ops.sampled_dot(X, X, W_DEC), TypeError, ["codes is a Tensor"]),
    "sampled_dot_codes_elsewhere": (
        lambda: ops.sampled_dot(X, CODES.to("meta"), W_DEC),
        ValueError,
        ["codes is on meta", "g on cpu"],
    ),
    "sampled_dot_g_of_other_tokens": (
        lambda: ops.sampled_dot(X[:3], CODES, W_DEC),
        ValueError,
        ["g has shape (3, 6)", "(4, 6)"],
    ),
    "sampled_dot_g_of_another_dtype": (
        lambda: ops.sampled_dot(X.double(), CODES, W_DEC),
        TypeError,
        ["g has dtype torch.float64"],
    ),
    "accumulate_rows_dense_codes": (lambda: ops.accumulate_rows(X, X), TypeError, ["codes is a Tensor"]),
    "accumulate_rows_g_of_other_tokens": (
        lambda: ops.accumulate_rows(CODES, X[:3]),
        ValueError,
        ["g has shape (3, 6)", "(4, 'd')"],
    ),
    "accumulate_rows_g_without_dimensions": (
        lambda: ops.accumulate_rows(CODES, torch.ones(())),
        ValueError,
        ["g has shape ()"],
    ),
    "transpose_dense_codes": (lambda: ops.transpose(X), TypeError, ["codes is a Tensor"]),
    "normalize_a_vector": (lambda: ops.normalize_rows_(B_DEC), ValueError, ["rows has shape (6,)", "[d_sae, d]"]),
    "normalize_integers": (lambda: ops.normalize_rows_(X.int()), TypeError, ["rows has dtype torch.int32"]),
    "project_other_rows": (
        lambda: ops.project_rows_(X.clone(), X[:3]),
        ValueError,
        ["rows has shape (3, 6)", "(4, 6)"],
    ),
    "project_rows_of_another_dtype": (
        lambda: ops.project_rows_(X.clone(), X.double()),
        TypeError,
        ["grad has dtype torch.float32", "rows torch.float64"],
    ),
    "index_d_sae": (
        lambda: SparseCodes(torch.ones(1, 2), torch.tensor([[0, 5]]), 5),
        ValueError,
        ["indices run from 0 to 5", "[0, 5)"],
    ),
    "index_negative": (
        lambda: SparseCodes(torch.ones(1, 2), torch.tensor([[-1, 4]]), 5),
        ValueError,
        ["indices run from -1 to 4", "[0, 5)"],
    ),
    # As int32 it would be 0.
    "index_of_64_bits": (
        lambda: SparseCodes(torch.ones(1, 1), torch.tensor([[2**32]]), 5),
        ValueError,
        ["4294967296", "[0, 5)"],
    ),
    "indices_floating": (lambda: csr(0, 3, indices=ONES), TypeError, ["indices is torch.float32", "int32"]),
    "indices_elsewhere": (lambda: csr(0, 3, indices=PLACES.to("meta")), ValueError, ["values is on cpu", "on meta"]),
    "values_of_integers": (lambda: csr(0, 3, values=PLACES), TypeError, ["values is torch.int64", "floating"]),
    "values_a_list": (lambda: csr(0, 3, values=[1.0] * 3), TypeError, ["values is", "list", "floating"]),
    "values_of_another_shape": (lambda: csr(0, 2, values=ONES[:2]), ValueError, ["(2,)", "(3,)", "[nnz]"]),
    "flat_values_without_offsets": (lambda: csr(offsets=None), ValueError, ["(3,)", "[n_tokens, k]"]),
    "d_sae_zero": (lambda: csr(0, 3, d_sae=0), ValueError, ["d_sae = 0"]),
    "d_sae_a_float": (lambda: csr(0, 3, d_sae=5.0), ValueError, ["d_sae = 5.0"]),
    "d_sae_over_int32": (lambda: csr(0, 3, d_sae=2**31), ValueError, [f"d_sae = {2**31}"]),
    "offsets_fall": (lambda: csr(0, 2, 1, 3), ValueError, ["offsets", "never falling"]),
    "offsets_overrun": (lambda: csr(0, 4), ValueError, ["from 0 to 4", "nnz = 3"]),
    "offsets_fall_short": (lambda: csr(0, 2), ValueError, ["from 0 to 2", "nnz = 3"]),
    "offsets_start_late": (lambda: csr(1, 3), ValueError, ["from 1 to 3"]),
    "offsets_of_32_bits": (
        lambda: csr(offsets=torch.tensor([0, 3], dtype=torch.int32)),
        ValueError,
        ["offsets is torch.int32", "int64"],
    ),
    "offsets_empty": (
        lambda: csr(offsets=torch.empty(0, dtype=torch.int64)),
        ValueError,
        ["offsets", "[n_tokens + 1]"],
    ),
    "offsets_a_list": (lambda: csr(offsets=[0, 3]), TypeError, ["offsets is a list", "int64"]),
    "offsets_elsewhere": (
        lambda: csr(offsets=torch.tensor([0, 3]).to("meta")),
        ValueError,
        ["offsets is on meta", "values on cpu"],
    ),
    "leading_shape": (lambda: csr(0, 3, leading_shape=(2, 3)), ValueError, ["(2, 3)", "6 places", "expected 1"]),
    "other_values": (lambda: CODES.with_values(ONES), ValueError, ["(3,)", "(4, 3)"]),
    "from_dense_of_integers": (lambda: SparseCodes.from_dense(PLACES), TypeError, ["torch.int64", "floating"]),
    "from_dense_a_number": (lambda: SparseCodes.from_dense(torch.ones(())), TypeError, ["[..., d_sae]"]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_public_functions(name):
    call, exception, pieces = BAD_CALLS[name]
    with pytest.raises(exception) as caught:
        call()
    for piece in pieces:
        assert piece in str(caught.value), f"{piece!r} is not in: {caught.value}"


def raw_calls(indices, offsets):
    """Every operator that follows indices, as torch.ops.fastsae has it, past the checks of SparseCodes."""
    n_tokens = len(indices) if offsets is None else len(offsets) - 1
    values, g = torch.ones(indices.shape), torch.ones(n_tokens, D)
    return {
        "decode": lambda: decode_op(values, indices, offsets, W_DEC, None),
        "squared_error": lambda: squared_error_op(values, indices, offsets, W_DEC, None, g),
        "sampled_dot": lambda: sampled_dot_op(g, indices, offsets, W_DEC, None),
        "transpose": lambda: transpose_op(indices, offsets, D_SAE),
    }


RAW = pytest.mark.parametrize("name", ["decode", "squared_error", "sampled_dot", "transpose"])
NATIVE = next((backend for backend in backends() if backend.isa), None)


@pytest.fixture
def raw():
    """Raw operators on native code: a wrong index there reads memory that is not the caller's."""
    if NATIVE is None:
        pytest.skip(native.why_not_cpu or "FASTSAE_TEST_BACKENDS leaves out cpu")
    with NATIVE.active():
        yield raw_calls


@RAW
@pytest.mark.parametrize("wrong", [-1, D_SAE, 2**31 - 1, -(2**31)])
def test_raw_indices_out_of_range(raw, name, wrong):
    indices = torch.zeros(2, 3, dtype=torch.int32)
    indices[1, 1] = wrong
    with pytest.raises(ValueError, match=re.escape("expected them in [0, 20)")):
        raw(indices, None)[name]()


@RAW
@pytest.mark.parametrize("offsets", [[0, 4], [0, 2], [0, 3, 2, 3], [-1, 3], [1, 3], [0, 2**40, 3]], ids=str)
def test_raw_offsets_that_fall_or_overrun(raw, name, offsets):
    with pytest.raises(ValueError, match="offsets"):
        raw(torch.zeros(3, dtype=torch.int32), torch.tensor(offsets))[name]()


@RAW
def test_raw_indices_of_64_bits(raw, name):
    with pytest.raises(TypeError, match=r"indices.*int32"):
        raw(torch.zeros(2, 3, dtype=torch.int64), None)[name]()


@pytest.mark.parametrize("name", ["decode", "squared_error"])
def test_raw_values_of_another_dtype(raw, name):
    indices, g = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, D)
    values = torch.ones(2, 3, dtype=torch.bfloat16)
    call = {
        "decode": lambda: decode_op(values, indices, None, W_DEC, None),
        "squared_error": lambda: squared_error_op(values, indices, None, W_DEC, None, g),
    }[name]
    with pytest.raises(TypeError, match=r"values.*bfloat16"):
        call()


def test_raw_rows_of_other_tokens(raw):
    """Fewer rows than tokens: the kernel would read past the last one."""
    indices, g = torch.zeros(4, 3, dtype=torch.int32), torch.ones(3, D)
    with pytest.raises(ValueError, match="g has 3 rows: expected 4"):
        sampled_dot_op(g, indices, None, W_DEC, None)
    with pytest.raises(ValueError, match="target has 3 rows: expected 4"):
        squared_error_op(torch.ones(4, 3), indices, None, W_DEC, None, g)
