"""The packed forms of W_enc are those of the weights as they are now, however the weights were changed."""

import gc

import pytest
import torch

import fastsae
from fastsae.backends import native, packed_encoders
from fastsae.backends.packed_encoders import packed_encoder, rest, resting
from fastsae.backends.screen_panels import Kind
from fastsae.testing import assert_same_bits

if native.cpu is None:
    pytest.skip(native.why_not_cpu, allow_module_level=True)

D_IN, D_SAE, K = 37, 331, 5


@pytest.fixture(autouse=True)
def _no_forms_of_others(monkeypatch):
    monkeypatch.setattr(packed_encoders, "_entries", {})


def by_optimizer(sae, other):
    optimizer = torch.optim.SGD([sae.W_enc], lr=1.0)
    sae.W_enc.grad = torch.zeros_like(sae.W_enc)
    sae.W_enc.grad[3, 77] = 100.0
    optimizer.step()


def by_fused_adam(sae, other):
    fastsae.optim.FusedAdam(sae, lr=0.5).step(torch.randn(64, D_IN))


def by_data(sae, other):
    sae.W_enc.data[:, 200] *= -3


def by_data_of_a_row(sae, other):
    sae.W_enc.data.T[D_SAE - 1].normal_()


def by_swapping_data(sae, other):
    sae.W_enc.data = other.W_enc.data.clone()


def by_copy(sae, other):
    with torch.no_grad():
        sae.W_enc.copy_(other.W_enc)


def by_loading(sae, other):
    sae.load_state_dict(other.state_dict())


def by_assigning(sae, other):
    sae.load_state_dict(other.state_dict(), assign=True)


def by_moving(sae, other):
    sae.to(torch.bfloat16).to(torch.float32)


def in_place(sae, other):
    with torch.no_grad():
        sae.W_enc.mul_(-1)


def one_bit(sae, other):
    """The least a weight can change: no norm of 16 latents tells."""
    sae.W_enc.data.T.view(torch.int32)[17, 5] ^= 1


def two_latents_swapped(sae, other):
    sae.W_enc.data.T[[4, 300]] = sae.W_enc.data.T[[300, 4]].clone()


def two_latents_of_a_strip_swapped(sae, other):
    sae.W_enc.data.T[[32, 33]] = sae.W_enc.data.T[[33, 32]].clone()


def by_numpy(sae, other):
    sae.W_enc.data.numpy()[:, 10] = 5.0


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    "change",
    [
        by_optimizer, by_fused_adam, by_data, by_data_of_a_row, by_swapping_data, by_copy, by_loading, by_assigning,
        by_moving, in_place, one_bit, two_latents_swapped, two_latents_of_a_strip_swapped, by_numpy,
    ],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_never_stale(kind, change, monkeypatch):
    """After any change the packed form is, byte for byte, that of the same weights in new memory."""
    monkeypatch.setenv("FASTSAE_SCREEN", kind.name)
    sae, other = (fastsae.TopKSAE(D_IN, D_SAE, K) for _ in range(2))
    x = torch.randn(40, D_IN)
    sae.encode(x)
    change(sae, other)
    codes = sae.encode(x)
    now = packed_encoder(sae.W_enc.T.detach(), kind)
    fresh = packed_encoder(sae.W_enc.T.detach().clone(), kind)
    assert now is not fresh
    assert now.packed.equal(fresh.packed)
    assert now.norm.equal(fresh.norm)
    assert now.residual.equal(fresh.residual)
    monkeypatch.setenv("FASTSAE_SCREEN", "float32")
    expected = sae.encode(x)
    assert codes.indices.equal(expected.indices)
    assert_same_bits(codes.values, expected.values)


@pytest.mark.parametrize("kind", Kind)
def test_what_has_not_changed_is_not_packed_again(kind):
    """Bytes written into the packed memory of one panel stay there until that panel's weights change."""
    w_enc = torch.randn(D_SAE, D_IN)
    entry = packed_encoder(w_enc, kind)
    packed = entry.packed.view(-1, 64, entry.bytes)
    before = packed.clone()
    packed[1] = 7
    assert packed_encoder(w_enc, kind) is entry
    assert (packed[1] == 7).all()
    assert packed[2:].equal(before[2:])
    w_enc[64:128] += 1
    packed_encoder(w_enc, kind)
    assert not (packed[1] == 7).all()


def test_goes_with_the_weights():
    w_enc = torch.randn(D_SAE, D_IN)
    packed_encoder(w_enc, Kind.int8)
    assert len(packed_encoders._entries) == 1
    del w_enc
    gc.collect()
    kept = torch.randn(5, 3)
    packed_encoder(kept, Kind.int16)
    assert [key[1] for key in packed_encoders._entries] == [kept.shape]


def test_a_screen_of_no_use_rests():
    w_enc = torch.randn(D_SAE, D_IN)
    assert not resting(w_enc, Kind.int8)
    packed_encoder(w_enc, Kind.int8)
    rest(w_enc, Kind.int8)
    uses = 0
    while resting(w_enc, Kind.int8):
        uses += 1
    assert uses == packed_encoders._RESTED_USES
    assert not resting(w_enc, Kind.int16)


def test_a_row_of_weights_that_outlier_weights_crowd_rests_int8(monkeypatch):
    """Rows of x that int8 cannot tell apart overflow it: the next call asks int16 at once, with the same result."""
    monkeypatch.setenv("FASTSAE_SCREEN", "int8")
    direction = torch.randn(1, D_IN)
    w_enc = direction * (1 + 1e-3 * torch.rand(3000, 1))
    x = torch.randn(50, 1) * direction
    first = fastsae.ops.encode_topk(x, w_enc.T, None, 2)
    assert packed_encoders._entries[packed_encoders._key(w_enc, Kind.int8)].resting
    second = fastsae.ops.encode_topk(x, w_enc.T, None, 2)
    assert first.indices.equal(second.indices)
    assert_same_bits(first.values, second.values)
    assert packed_encoders._key(w_enc, Kind.int16) in packed_encoders._entries
