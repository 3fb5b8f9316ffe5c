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
    switched_to_plain.load_state_dict(fused.state_dict())
    switched_to_fused.load_state_dict(plain.state_dict())
    plain.zero_grad()
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


def test_a_gradient_is_not_passed_over():
    """Neither added to what step(x) makes nor thrown away."""
    sae, _ = pair()
    optimizer = fastsae.optim.FusedAdam(sae)
    x = batches(1)[0]
    sae.loss(x).total.backward()
    with pytest.raises(RuntimeError, match=r"W_enc holds a gradient, which step\(x\) would not use"):
        optimizer.step(x)
    optimizer.step_from_gradients()
    optimizer.zero_grad()
    optimizer.step(x)


def test_refuses_what_it_cannot_train():
    with pytest.raises(TypeError, match=r"sae is a Linear: expected an SAE of fastsae"):
        fastsae.optim.FusedAdam(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lr = -1"):
        fastsae.optim.FusedAdam(pair()[0], lr=-1)


@pytest.mark.parametrize("options", [{}, {"dead_after_tokens": 100}], ids=["no AuxK", "AuxK"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_go_where_float32_goes(dtype, options):
    """Forty steps of about a hundredth of a parameter's last bit, beside the same run in float32."""
    start, _ = pair(dtype, normalize_decoder=False, **options)

    def moved(to, **more):
        sae = copy.deepcopy(start).to(to)
        optimizer = fastsae.optim.FusedAdam(sae, lr=2e-5, **more)
        for x in batches(40, dtype):
            optimizer.step(x.to(to))
        for p in sae.parameters():
            if more:
                assert optimizer.state[p]["master"].dtype == optimizer.state[p]["exp_avg"].dtype == torch.float32
                assert torch.equal(optimizer.state[p]["master"].to(dtype), p.detach())
        weights = optimizer.state[sae.W_dec]["master"] if more else sae.W_dec.detach()
        return weights.float() - start.W_dec.detach().float()

    right = moved(torch.float32)
    assert (moved(dtype, master_weights=True) - right).norm() < 0.2 * right.norm()
    assert (moved(dtype) - right).norm() > 0.5 * right.norm()


def test_masters_follow_changes_from_elsewhere():
    sae, _ = pair(torch.bfloat16)
    optimizer = fastsae.optim.FusedAdam(sae, lr=1e-3, master_weights=True)
    x = batches(1, torch.bfloat16)[0]
    optimizer.step(x)
    kept = optimizer.state[sae.b_enc]["master"].clone()
    with torch.no_grad():
        sae.b_enc[3] = 5.0
    optimizer.step(x)
    master = optimizer.state[sae.b_enc]["master"]
    assert (master[3] - 5).abs() < 0.01
    assert (master - kept).abs()[torch.arange(len(kept)) != 3].max() < 0.01
    assert torch.equal(master.to(torch.bfloat16), sae.b_enc.detach())


def test_masters_come_back_from_a_state_dict():
    """To the bit: two steps, or one, a save, a load and another."""
    data = batches(4, torch.bfloat16)
    results = []
    for split in (4, 2):
        torch.manual_seed(7)
        sae, _ = pair(torch.bfloat16)
        optimizer = fastsae.optim.FusedAdam(sae, lr=1e-3, master_weights=True)
        for x in data[:split]:
            optimizer.step(x)
        if split < 4:
            saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(sae.state_dict())
            sae, _ = pair(torch.bfloat16)
            optimizer = fastsae.optim.FusedAdam(sae, lr=1e-3, master_weights=True)
            optimizer.load_state_dict(saved)
            sae.load_state_dict(weights)
            for x in data[split:]:
                optimizer.step(x)
        results.append([optimizer.state[p]["master"] for p in sae.parameters()])
        assert results[-1][0].T.is_contiguous()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_refuses_masters_of_wide_weights():
    with pytest.raises(ValueError, match=r"master_weights = True for an SAE in torch.float32"):
        fastsae.optim.FusedAdam(pair()[0], master_weights=True)
