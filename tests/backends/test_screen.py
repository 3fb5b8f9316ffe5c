"""The screen of encode_topk on a CPU: it may only ever save work. Every path gives the bits of the exhaustive one.

Inputs here are larger than those of tests/ops/test_encode_selection.py: several blocks of rows and of latents.
"""

import collections

import pytest
import torch

from fastsae.backends import native
from fastsae.backends.screen import Screen, screen_dtype
from fastsae.ops.encode import encode_topk_op
from fastsae.testing import assert_same_bits, backends

if native.cpu is None:
    pytest.skip(native.why_not_cpu, allow_module_level=True)

# Values of a row's `redo` flag (csrc/include/fastsae/abi.h), as the last step finds them.
PATHS = {0: "screened", 1: "exhaustive", 2: "overflowed", 3: "left_out"}


def run(x, w_enc, b_enc=None, b_dec=None, k=8, *, dtype=None, exhaustive=None):
    screen = Screen(x, w_enc, b_enc, b_dec, k, dtype=dtype)
    if exhaustive is not None:
        screen.exhaustive = exhaustive
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32)
    screen.run(values, indices)
    return values, indices


def check_same(actual, expected):
    assert actual[1].equal(expected[1])
    assert_same_bits(actual[0], expected[0])


@pytest.fixture
def paths(monkeypatch):
    """How many rows each path of the last step has served, by the precision of their screen."""
    counts = collections.Counter()
    finish = Screen._finish

    def counting(self, x, state, values, indices):
        for flag in state.redo[: len(x)].tolist():
            counts[str(self.dtype)[6:], PATHS[flag]] += 1
        finish(self, x, state, values, indices)

    monkeypatch.setattr(Screen, "_finish", counting)
    return counts


def with_outliers(n_tokens, d_in, d_sae, dtype):
    """Activations as models make them: a few dimensions a hundred times the others, tokens of unequal norm."""
    x = torch.randn(n_tokens, d_in) * torch.rand(n_tokens, 1).mul(6).exp()
    x[:, ::29] *= 100
    return x.to(dtype), torch.randn(d_sae, d_in).to(dtype)


@pytest.mark.parametrize("k", [1, 32, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_screened_is_exhaustive(native, screen, dtype, k):
    """1,100 rows are over one block, 1,300 latents are two chunks and a half."""
    n_tokens = 1100 if k == 32 and native.isa != "portable" else 150
    x, w_enc = with_outliers(n_tokens, 57, 1300, dtype)
    b_enc, b_dec = torch.randn(1300), torch.randn(57)
    check_same(run(x, w_enc, b_enc, b_dec, k), run(x, w_enc, b_enc, b_dec, k, exhaustive=True))


def test_most_rows_are_screened(screen, paths):
    """Correctness by redoing every row would be slow without failing any other test."""
    x, w_enc = with_outliers(200, 64, 2000, torch.float32)
    run(x, w_enc, torch.zeros(2000), torch.zeros(64))
    assert paths == {(screen, "screened"): 200}


def crowded(n_tokens, d_sae, spread):
    """Latents that differ by `spread` of their size: no screen coarser than that can tell them apart."""
    direction = torch.randn(1, 40)
    w_enc = direction * (1 + spread * torch.rand(d_sae, 1))
    return torch.randn(n_tokens, 1) * direction, w_enc


def test_rows_that_overflow_bfloat16_are_screened_in_float32(native, paths):
    x, w_enc = crowded(20, 3000, 1e-2)
    x[7] = torch.randn(40)
    expected = run(x, w_enc, exhaustive=True)
    paths.clear()
    check_same(run(x, w_enc, dtype=torch.bfloat16), expected)
    assert paths["bfloat16", "left_out"] >= 19
    assert paths["float32", "screened"] == paths["bfloat16", "left_out"]


def test_a_few_rows_that_overflow_are_exhaustive(native, paths):
    """A float32 screen reads all of W_enc again: not worth it for a few rows."""
    x, w_enc = crowded(5, 3000, 1e-2)
    expected = run(x, w_enc, exhaustive=True)
    paths.clear()
    check_same(run(x, w_enc, dtype=torch.bfloat16), expected)
    assert paths == {("bfloat16", "overflowed"): 5}


def test_rows_that_overflow_float32_are_exhaustive(native, paths):
    """Thousands of equal latents: no screen decides between them, indices do."""
    x, w_enc = torch.randn(20, 40), torch.randn(1, 40).expand(3000, 40)
    values, indices = run(x, w_enc, dtype=torch.bfloat16)
    assert paths == {("bfloat16", "left_out"): 20, ("float32", "overflowed"): 20}
    assert indices.equal(torch.arange(8, dtype=torch.int32).expand(20, 8))
    assert (values == values[:, :1]).all()


def test_rows_that_are_not_finite_are_exhaustive(native, screen, paths):
    x, w_enc = with_outliers(30, 40, 1000, torch.float32)
    expected = run(x, w_enc)
    x[3, 1], x[17, 39] = torch.nan, torch.inf
    paths.clear()
    actual = run(x, w_enc)
    assert paths == {(screen, "exhaustive"): 2, (screen, "screened"): 28}
    others = [n for n in range(30) if n not in (3, 17)]
    check_same([part[others] for part in actual], [part[others] for part in expected])
    check_same(actual, run(x, w_enc, exhaustive=True))


def test_rows_of_zeros_are_decided_by_the_screen(native, screen, paths):
    """A row of zeros (padding) ties everywhere; its bound is exactly zero, so the screen settles it."""
    x, w_enc = torch.zeros(20, 40), torch.randn(3000, 40)
    b_enc = torch.randn(3000).round()
    for bias in (None, b_enc):
        paths.clear()
        actual = run(x, w_enc, bias)
        assert paths == {(screen, "screened"): 20}
        check_same(actual, run(x, w_enc, bias, exhaustive=True))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_float32_products_are_allowed_for(precision):
    """Where torch may round the factors of a float32 GEMM, the bound is wider and the result the same."""
    before = torch.get_float32_matmul_precision()
    x, w_enc = with_outliers(100, 64, 2000, torch.float32)
    expected = run(x, w_enc, exhaustive=True)
    try:
        torch.set_float32_matmul_precision(precision)
        check_same(run(x, w_enc, dtype=torch.float32), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("d_sae", "k"), [(255, 4), (256, 64), (256, 65), (257, 64), (300, 300)])
def test_around_the_fewest_latents_worth_screening(native, screen, d_sae, k):
    x, w_enc = with_outliers(20, 30, d_sae, torch.float32)
    check_same(run(x, w_enc, k=k), run(x, w_enc, k=k, exhaustive=True))
    check_same(run(x, w_enc, k=k, exhaustive=False), run(x, w_enc, k=k, exhaustive=True))


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-5, 1e-7])
def test_latents_that_are_nearly_equal(native, screen, spread):
    """Differences about as large as the bounds: where a bound that is too narrow would drop a winner."""
    x, w_enc = crowded(40, 1500, spread)
    x = x + spread * torch.randn(40, 40)
    check_same(run(x, w_enc), run(x, w_enc, exhaustive=True))


def test_screens_have_names(monkeypatch):
    monkeypatch.setenv("FASTSAE_SCREEN", "float32")
    assert screen_dtype() == torch.float32
    monkeypatch.setenv("FASTSAE_SCREEN", "fp4")
    with pytest.raises(ValueError, match=r"FASTSAE_SCREEN='fp4': expected float32, bfloat16, int8, int16"):
        encode_topk_op(torch.randn(2, 4), torch.randn(300, 4), None, None, 2, False)


def test_all_instruction_sets_agree_at_size(screen):
    x, w_enc = with_outliers(60, 100, 1500, torch.float32)
    results = []
    for backend in backends():
        if backend.isa:
            with backend.active():
                results.append(run(x, w_enc, k=16))
    for result in results[1:]:
        check_same(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_cancels_a_rounded_score(native, screen, dtype):
    """Small integers are exact in bfloat16, their sums are not: the only error is that of storing the score.

    Scores just above 1,024 are stored in steps of 8; the bias takes them away and leaves winners about an eighth apart.
    """
    x = torch.ones(1, 64, dtype=dtype)
    x[:, 0] = 32
    for _ in range(50):
        w = torch.randint(0, 2, (4096, 64)).to(dtype)
        w[:, 0] = 32
        b_enc = torch.randint(-2048, 2049, (4096,)) / 8 - w.float() @ x[0].float()
        check_same(run(x, w, b_enc, k=4), run(x, w, b_enc, k=4, exhaustive=True))


@pytest.mark.parametrize("rounded", ["x", "w_enc"])
def test_what_bfloat16_loses_may_all_point_one_way(native, paths, rounded):
    """Cauchy-Schwarz attained: what rounding takes from every entry adds up, for 8 latents up, for 60 down.

    Signs are balanced, so that scores are small and lose nothing themselves. The last dimension sets the 60 nine
    tenths of what is lost above the 8: the screen sees them in the wrong order, and all within its bounds.
    """
    d_in, lost = 65, 0.0019
    signs = torch.ones(d_in).index_fill(0, torch.arange(0, d_in - 1, 2), -1)
    rises = torch.full((300, 1), -1.0)
    rises[50:58] = 1
    if rounded == "x":
        x, w_enc = (1 + lost * signs)[None], rises * signs
    else:
        x, w_enc = torch.ones(1, d_in), signs + rises * lost
    x[:, -1] = 1
    w_enc[:, -1] = -10
    w_enc[50:118, -1] = torch.where(rises[50:118, 0] > 0, 0, 2 * 0.9 * lost * (d_in - 1))
    w_enc[50:118, -1] += 1e-4 * torch.rand(68)
    values, indices = run(x, w_enc, dtype=torch.bfloat16)
    assert paths == {("bfloat16", "screened"): 1}
    assert indices.sort().values.tolist() == [list(range(50, 58))]
    check_same((values, indices), run(x, w_enc, exhaustive=True))
    by_screen = (x.bfloat16() @ w_enc.bfloat16().T).topk(8).indices
    assert not torch.isin(by_screen, torch.arange(50, 58)).any()
