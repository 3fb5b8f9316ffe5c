"""FusedAdam against torch.optim.Adam on autograd's gradients."""

import copy

import pytest
import torch

import fastsae
from fastsae.testing import assert_accurate


def pair(dtype=torch.float32, **options):
    sae = fastsae.TopKSAE(24, 200, 5, dtype=dtype, **options)
    return sae, copy.deepcopy(sae)


def adam(sae, **options):
    optimizer = torch.optim.Adam(sae.parameters(), **options)
    sae.register_optimizer_hooks(optimizer)
    return optimizer


def plain_step(sae, optimizer, x):
    optimizer.zero_grad()
    loss = sae.loss(x)
    loss.total.backward()
    optimizer.step()
    return loss


def batches(count, dtype=torch.float32):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return [torch.randn(37, 24, generator=generator, dtype=torch.float32).to(dtype) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relu": "before"},
        {"apply_b_dec_to_input": False},
        {"normalize_decoder": False},
        {"normalize_activations": "layer_norm"},
        {"dead_after_tokens": 100},
    ],
    ids=str,
)
def test_same_run_as_adam_in_float64(options):
    """In float64 rounding cannot change a selection: thirty steps stay together to 1e-12, AuxK's included."""
    ours, theirs = pair(torch.float64, **options)
    fused, plain = fastsae.optim.FusedAdam(ours, lr=1e-2, weight_decay=0.01), adam(theirs, lr=1e-2, weight_decay=0.01)
    for x in batches(30, torch.float64):
        a, b = fused.step(x), plain_step(theirs, plain, x)
        assert abs(a.total.item() - b.total.item()) < 1e-12
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12, name
    assert torch.equal(ours.tokens_since_fired, theirs.tokens_since_fired)


def test_native_step_is_as_accurate_as_autograd(native):
    """One step from zero state: each parameter moves as in float64, to the rule of tolerance."""
    ours, theirs = pair()
    x = batches(1)[0]
    start = [p.detach().clone() for p in ours.parameters()]
    # A large eps: without it the first step of Adam is lr · sign(gradient), which hides the gradient.
    fastsae.optim.FusedAdam(ours, lr=1.0, eps=1.0).step(x)

    def formula(x, *weights):
        sae = copy.deepcopy(theirs).to(x.dtype)
        with torch.no_grad():
            for p, w in zip(sae.parameters(), weights, strict=True):
                p.copy_(w)
        with fastsae.backend("torch"):
            plain_step(sae, adam(sae, lr=1.0, eps=1.0), x)
        return [p.detach() for p in sae.parameters()]

    assert_accurate([p.detach() for p in ours.parameters()], formula, x, *start)


def test_state_goes_both_ways():
    ours, theirs = pair(torch.float64)
    fused, plain = fastsae.optim.FusedAdam(ours, lr=1e-2), adam(theirs, lr=1e-2)
    data = batches(6, torch.float64)
    for x in data[:2]:
        fused.step(x)
        plain_step(theirs, plain, x)
    switched_to_plain, switched_to_fused = adam(ours, lr=1e-2), fastsae.optim.FusedAdam(theirs, lr=1e-2)
    switched_to_plain.load_state_dict(fused.state_dict() | {"param_groups": plain.state_dict()["param_groups"]})
    switched_to_fused.load_state_dict(plain.state_dict() | {"param_groups": fused.state_dict()["param_groups"]})
    for x in data[2:]:
        plain_step(ours, switched_to_plain, x)
        switched_to_fused.step(x)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12


def test_schedulers_drive_it():
    ours, theirs = pair(torch.float64)
    fused, plain = fastsae.optim.FusedAdam(ours, lr=1e-2), adam(theirs, lr=1e-2)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (fused, plain)]
    for x in batches(4, torch.float64):
        fused.step(x)
        plain_step(theirs, plain, x)
        for schedule in schedules:
            schedule.step()
    assert (ours.W_dec - theirs.W_dec).abs().max() < 1e-12


def test_no_gradient_is_left_or_made():
    sae, _ = pair()
    fastsae.optim.FusedAdam(sae).step(torch.randn(37, 24))
    assert all(p.grad is None for p in sae.parameters())


def test_refuses_what_it_cannot_train():
    with pytest.raises(TypeError, match=r"sae is a Linear: expected a fastsae\.TopKSAE"):
        fastsae.optim.FusedAdam(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lr = -1"):
        fastsae.optim.FusedAdam(pair()[0], lr=-1)
