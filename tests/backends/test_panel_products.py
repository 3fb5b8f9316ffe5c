"""The products behind the one-pass screens, of every instruction set, and how close their scores are.

encode_threshold's survivors show a score: with an error bound e, a latent survives a threshold t if P + e > t.
"""

import pytest
import torch

from fastsae.backends import native
from fastsae.backends.packed_encoders import packed_encoder
from fastsae.backends.screen_panels import LANES, Kind, Panels

if native.cpu is None:
    pytest.skip(native.why_not_cpu, allow_module_level=True)

ISAS = [isa for isa, _, runs_here in native.cpu.isas() if runs_here]


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.cpu.isa()
    native.cpu.select_isa(request.param)
    yield request.param
    native.cpu.select_isa(before)


def survivors(panels, x, threshold):
    d_sae = len(threshold)
    indices = torch.empty(len(x), d_sae + LANES, dtype=torch.int32)
    counts = torch.empty(len(x), dtype=torch.int32)
    panels.survivors(x, threshold, indices, counts)
    found = torch.zeros(len(x), d_sae, dtype=torch.bool)
    for n, count in enumerate(counts.tolist()):
        found[n, indices[n, : max(count, 0)].long()] = True
    return found, counts


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("n_tokens", "d_in", "d_sae"), [(1, 1, 1), (37, 199, 65), (70, 64, 200), (33, 130, 128)])
def test_scores_lie_within_their_bounds(isa, kind, n_tokens, d_in, d_sae):
    """A latent above its threshold survives, and one that lies below by more than the screen is coarse does not."""
    x, w_enc, b_enc = torch.randn(n_tokens, d_in), torch.randn(d_sae, d_in), torch.randn(d_sae)
    panels = Panels(packed_encoder(w_enc, kind), b_enc, None, None)
    exact = x.double() @ w_enc.double().T + b_enc
    scale = x.double().norm(dim=1, keepdim=True) * w_enc.double().norm(dim=1)
    coarse = {Kind.bfloat16: 0.02, Kind.int8: 0.1, Kind.int16: 0.002}[kind]
    for level in (-1.0, 0.0, 0.7):
        found, counts = survivors(panels, x, torch.full((d_sae,), level))
        assert (counts >= 0).all()
        assert found[exact > level].all()
        assert not found[exact < level - coarse * scale - 1e-5].any()


@pytest.mark.parametrize("kind", [Kind.int8, Kind.int16])
def test_sums_of_whole_numbers_are_exact(isa, kind):
    """Entries that are whole multiples of their row's scale lose nothing, so each score is its pre-activation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (40, 96), generator=generator).float()
    w_enc = torch.randint(-127, 128, (130, 96), generator=generator).float()
    if kind is Kind.int8:
        x[:, 0], w_enc[:, 0] = 127, -127
        exact = x @ w_enc.T
        found, _ = survivors(Panels(packed_encoder(w_enc, kind), None, None, None), x, exact[7] - 4)
        assert found[7].all()
        found, _ = survivors(Panels(packed_encoder(w_enc, kind), None, None, None), x, exact[7] + 4)
        assert not found[7].any()
        return
    exact = x @ w_enc.T
    norms = x.norm(dim=1)[7] * w_enc.norm(dim=1)
    found, _ = survivors(Panels(packed_encoder(w_enc, kind), None, None, None), x, exact[7] + 2e-3 * norms)
    assert not found[7].any()


@pytest.mark.parametrize("kind", Kind)
def test_the_largest_sums_do_not_overflow(isa, kind):
    """All the weight of a row in one dimension, in two, and spread over all: the sums reach their limits."""
    d_in = 512
    x = torch.zeros(6, d_in)
    x[0, 3], x[1, [0, 511]], x[2], x[3] = 1e10, 1.0, 1e-10, -1.0
    x[4, ::2], x[5] = 1.0, torch.randn(d_in)
    w_enc = torch.cat([x, -x]) * 1e5
    exact = x.double() @ w_enc.double().T
    panels = Panels(packed_encoder(w_enc, kind), None, None, None)
    norms = x.double().norm(dim=1, keepdim=True) * w_enc.double().norm(dim=1)
    for n in range(6):
        inside, _ = survivors(panels, x, (exact[n] - 0.1 * norms[n]).float())
        outside, _ = survivors(panels, x, (exact[n] + 0.1 * norms[n]).float())
        assert inside[n].all()
        assert not outside[n].any()


@pytest.mark.parametrize("kind", Kind)
def test_rows_that_are_not_finite_take_no_part(isa, kind):
    x, w_enc = torch.randn(5, 20), torch.randn(70, 20)
    x[1, 3], x[4, 0] = torch.nan, -torch.inf
    found, counts = survivors(Panels(packed_encoder(w_enc, kind), None, None, None), x, torch.zeros(70))
    assert (counts < 0).tolist() == [False, True, False, False, True]
    w_enc[9, 9] = torch.inf
    found, _ = survivors(Panels(packed_encoder(w_enc, kind), None, None, None), x, torch.full((70,), 1e30))
    assert found[0].nonzero().tolist() == [[9]]
