"""FusedAdam's state: in bfloat16, saved and loaded, and exchanged with torch.optim.Adam."""

import copy

import pytest
import torch

from fastsae import ops
from fastsae.ops import Slot
from fastsae.optim import FusedAdam, _dense
from fastsae.testing import assert_same_bits, random_codes

from .runs import assert_close, autograd_step, batches, idle_latents, new


def whole_numbers(dtype=torch.float32):
    """Gradients, moments and weights whose step, with betas of a half, has no rounding but that of the moments."""
    codes = random_codes(23, 31, 5)
    codes = codes.with_values((3 * codes.values).round())
    slots = [
        (torch.zeros(shape), (99 * torch.randn(shape)).round().bfloat16(), (999 * torch.rand(shape)).round().bfloat16())
        for shape in ((31, 40), (31,), (31, 40))
    ]
    return codes, (3 * torch.randn(23, 5)).round(), (9 * torch.randn(23, 40)).round(), slots


@pytest.mark.parametrize("lazy", [False, True], ids=["adam", "lazy"])
def test_steps_on_gradients_round_as_fused_ones(backend, lazy):
    codes, grad_values, g, slots = whole_numbers()
    group = {"lr": 1e-2, "betas": (0.5, 0.5), "eps": 1e-8, "weight_decay": 0.0, "seed": 11}
    w_enc, b_enc, w_dec = ([t.clone() for t in slot] for slot in slots)
    ops.fused_update(
        codes, grad_values, g, g, Slot(*(t.T for t in w_enc)), Slot(*b_enc), Slot(*w_dec), step=3, lazy=lazy, **group
    )
    at = codes.tokens().reshape(-1), codes.indices.reshape(-1).long()
    dense = torch.zeros(codes.n_tokens, codes.d_sae)
    by_value, by_grad = (dense.index_put(at, v.reshape(-1)) for v in (codes.values, grad_values))
    gradients = {"W_enc": g.T @ by_grad, "b_enc": by_grad.sum(0), "W_dec": by_value.T @ g}
    touched = (~idle_latents(codes)).nonzero()[:, 0] if lazy else None
    for (name, gradient), fused, (p, m, s) in zip(gradients.items(), (w_enc, b_enc, w_dec), slots, strict=True):
        slot = Slot(*(t.T if name == "W_enc" else t for t in (p, m, s)))
        _dense.adam_(_dense.rows_of(name, slot, gradient, list(gradients)), group, 3, touched)
        assert_same_bits(m, fused[1])
        assert_same_bits(s, fused[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"dead_after_tokens": 100}], ids=["no AuxK", "AuxK"])
def test_bfloat16_state_goes_where_float32_state_goes(dtype, options):
    masters = dtype == torch.bfloat16

    def moved(state_dtype):
        sae = new(dtype, normalize_decoder=False, **options)
        start = sae.W_dec.detach().float().clone()
        optimizer = FusedAdam(sae, lr=1e-3, master_weights=masters, state_dtype=state_dtype)
        for x in batches(40, dtype):
            optimizer.step(x)
        for p in sae.parameters():
            state = optimizer.state[p]
            assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {state_dtype}
            assert p.dtype == dtype
            assert not masters or state["master"].dtype == torch.float32
        return (optimizer.state[sae.W_dec]["master"] if masters else sae.W_dec.detach()) - start

    right = moved(torch.float32)
    assert (moved(torch.bfloat16) - right).norm() < 0.1 * right.norm()


def test_bfloat16_state_comes_back_from_a_state_dict():
    """To the bit, the seed with it: two steps, a save, a load and two more."""
    data = batches(4, torch.float32)
    results = []
    for split in (4, 2):
        sae = new(torch.float32)
        optimizer = FusedAdam(sae, lr=1e-3, state_dtype=torch.bfloat16, seed=5, clip_norm=0.1)
        for x in data[:split]:
            optimizer.step(x)
        if split < 4:
            saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(sae.state_dict())
            sae = new(torch.float32)
            optimizer = FusedAdam(sae, state_dtype=torch.bfloat16)
            optimizer.load_state_dict(saved)
            sae.load_state_dict(weights)
            assert optimizer.param_groups[0]["seed"] == 5
            assert optimizer.param_groups[0]["clip_norm"] == 0.1
            for x in data[split:]:
                optimizer.step(x)
        state = [optimizer.state[p][moment] for p in sae.parameters() for moment in ("exp_avg", "exp_avg_sq")]
        assert {moment.dtype for moment in state} == {torch.bfloat16}
        results.append([*(p.detach() for p in sae.parameters()), *state])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_state_of_adam_both_ways():
    """Straight from one to the other, layouts and dtypes included; options stay where Adam has none."""
    ours, theirs = new(), new()
    # A large eps: a gradient near zero is not divided by its own rounding.
    plain = torch.optim.Adam(theirs.parameters(), lr=3e-3, eps=1e-4)
    for x in batches(3):
        autograd_step(theirs, plain, x)
    saved = plain.state_dict()
    # As a file in plain layout would have it.
    saved["state"] = {i: {k: v.contiguous().clone() for k, v in state.items()} for i, state in saved["state"].items()}
    ours.load_state_dict(theirs.state_dict())
    fused = FusedAdam(ours, lr=1.0, clip_norm=0.02, lazy=True)
    fused.load_state_dict(saved)
    group = fused.param_groups[0]
    assert (group["lr"], group["clip_norm"], group["lazy"]) == (3e-3, 0.02, True)
    assert "foreach" not in group
    assert fused.state[ours.W_enc]["exp_avg"].T.is_contiguous()
    assert fused.state[ours.W_enc]["exp_avg"].data_ptr() != saved["state"][0]["exp_avg"].data_ptr()
    assert all(fused.state[p]["step"] == 3 for p in ours.parameters())
    group |= {"lazy": False, "clip_norm": None}
    back = new()
    for x in batches(3):
        fused.step(x)
        autograd_step(theirs, plain, x)
    assert_close(ours, theirs)
    back.load_state_dict(ours.state_dict())
    again = torch.optim.Adam(back.parameters(), lr=1.0)
    again.load_state_dict(copy.deepcopy(fused.state_dict()))
    for x in batches(3):
        fused.step(x)
        autograd_step(back, again, x)
    assert_close(ours, back)


def test_bfloat16_state_and_adam():
    sae = new(torch.float32)
    fused = FusedAdam(sae, state_dtype=torch.bfloat16)
    fused.step(batches(1, torch.float32)[0])
    plain = torch.optim.Adam(sae.parameters())
    plain.load_state_dict(copy.deepcopy(fused.state_dict()))
    for p in sae.parameters():
        assert plain.state[p]["exp_avg"].dtype == torch.float32
        assert_same_bits(plain.state[p]["exp_avg"], fused.state[p]["exp_avg"].float())
        plain.state[p]["exp_avg"].mul_(1.001)
    fused.load_state_dict(plain.state_dict())
    for p in sae.parameters():
        assert_same_bits(fused.state[p]["exp_avg"], plain.state[p]["exp_avg"].bfloat16())


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (torch.optim.Adam, {"amsgrad": True}, "amsgrad"),
        (torch.optim.Adam, {"maximize": True}, "maximize"),
        (torch.optim.AdamW, {}, "decoupled_weight_decay"),
    ],
)
def test_refuses_the_state_of_another_adam(kind, options, word):
    sae = new()
    other = kind(sae.parameters(), **options)
    autograd_step(sae, other, batches(1)[0])
    sae.zero_grad()
    with pytest.raises(ValueError, match=f"of an Adam with {word}=True"):
        FusedAdam(sae).load_state_dict(other.state_dict())
