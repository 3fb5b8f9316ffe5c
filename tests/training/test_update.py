"""training.update against the same steps written out, and the layout it leaves behind."""

import copy

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import fastsae
from fastsae.testing import assert_same_bits
from fastsae.training import update


def build():
    torch.manual_seed(0)
    return fastsae.TopKSAE(24, 300, 5)


def gradients(sae, seed):
    x = torch.randn(37, 24, generator=torch.Generator().manual_seed(seed))
    sae.zero_grad()
    sae.loss(x).total.backward()


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "Adam fused amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_same_bits_as_the_steps_written_out(make, clip):
    ours, theirs = build(), build()
    optimizer, other = make(ours.parameters()), make(theirs.parameters())
    for seed in range(4):
        gradients(ours, seed), gradients(theirs, seed)
        norm = update(ours, optimizer, clip)
        theirs.project_decoder_grad_()
        expected = None if clip is None else clip_grad_norm_(theirs.parameters(), clip)
        other.step()
        theirs.normalize_decoder_()
        assert norm == expected
        assert_same_bits(ours.W_enc.grad, theirs.W_enc.grad)
    for name, tensor in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], tensor)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, value in other.state[q].items():
            assert_same_bits(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value))


def test_layout_is_as_before():
    sae = build()
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    W_enc, pointer = sae.W_enc, sae.W_enc.data_ptr()
    gradients(sae, 0)
    grad = sae.W_enc.grad
    update(sae, optimizer)
    assert sae.W_enc is W_enc
    assert sae.W_enc.data_ptr() == pointer
    assert sae.W_enc.grad is grad
    state = optimizer.state[W_enc]
    for tensor in (sae.W_enc, sae.W_enc.grad, state["exp_avg"], state["exp_avg_sq"]):
        assert tensor.shape == (24, 300)
        assert tensor.T.is_contiguous()
    assert_same_bits(optimizer.state_dict()["state"][0]["exp_avg"], state["exp_avg"])


def test_layout_is_as_before_when_the_optimizer_raises():
    sae = build()
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    gradients(sae, 0)
    update(sae, optimizer)
    before = copy.deepcopy(sae.state_dict())

    def interrupt(*_):
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        update(sae, optimizer)
    assert sae.W_enc.shape == sae.W_enc.grad.shape == optimizer.state[sae.W_enc]["exp_avg"].shape == (24, 300)
    for name, tensor in before.items():
        assert_same_bits(sae.state_dict()[name], tensor)
    gradients(sae, 1)


def test_a_parameter_without_gradient_is_left_alone():
    sae = build()
    before = sae.W_enc.detach().clone()
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    sae.W_enc.requires_grad_(False)
    gradients(sae, 0)
    update(sae, optimizer)
    assert_same_bits(sae.W_enc.detach(), before)


@pytest.mark.parametrize("fused", [True, False])
def test_square_weights(fused):
    """With as many latents as dimensions the shape does not tell a transpose."""
    torch.manual_seed(0)
    ours = fastsae.TopKSAE(16, 16, 3)
    theirs = copy.deepcopy(ours)
    optimizer = torch.optim.Adam(ours.parameters(), fused=fused)
    other = torch.optim.Adam(theirs.parameters(), fused=fused)
    theirs.register_optimizer_hooks(other)
    for seed in range(3):
        x = torch.randn(37, 16, generator=torch.Generator().manual_seed(seed))
        for sae in (ours, theirs):
            sae.zero_grad()
            sae.loss(x).total.backward()
        update(ours, optimizer)
        other.step()
    assert ours.W_enc.T.is_contiguous()
    assert optimizer.state[ours.W_enc]["exp_avg"].T.is_contiguous()
    for name, tensor in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], tensor)
