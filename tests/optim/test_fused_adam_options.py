"""FusedAdam's options, each against torch's own optimizers and clipping on autograd's gradients."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from architectures import SETTINGS, batch, build
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastsae
from fastsae import ops
from fastsae.ops import Slot
from fastsae.optim import FusedAdam, _dense, fused_adam
from fastsae.testing import assert_accurate, assert_same_bits, backends, random_codes
from fastsae.training import update

from . import data_parallel

D_IN, D_SAE, K = 12, 40, 4
CLIPS = {"clip_value": 0.002, "clip_row_norm": 0.006, "clip_norm": 0.02}


def new(dtype=torch.float64, **options):
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(D_IN, D_SAE, K, dtype=dtype, **options)
    with torch.no_grad():
        # Every pick is positive, so that an entry of the codes has a gradient.
        sae.b_enc += 3
    return sae


def idle_latents(codes):
    """Those without an entry; a JumpReLU's entries may be zero."""
    return torch.bincount(codes.indices.reshape(-1).long(), minlength=codes.d_sae) == 0


def batches(count, dtype=torch.float64, n_tokens=16):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return [torch.randn(n_tokens, D_IN, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def schedule(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))


def autograd_step(sae, optimizer, x, target=None, *, clip_value=None, clip_row_norm=None, clip_norm=None):
    """torch's optimizer and torch's clipping; -> the norm before the last clip."""
    optimizer.zero_grad()
    sae.loss(x, target).total.backward()
    sae.project_decoder_grad_()
    if clip_value is not None:
        torch.nn.utils.clip_grad_value_(sae.parameters(), clip_value)
    if clip_row_norm is not None:
        for row in (*sae.W_enc.grad.T, *sae.W_dec.grad):
            holder = torch.nn.Parameter(torch.zeros_like(row))
            holder.grad = row
            torch.nn.utils.clip_grad_norm_([holder], clip_row_norm)
    norm = None if clip_norm is None else torch.nn.utils.clip_grad_norm_(sae.parameters(), clip_norm)
    optimizer.step()
    sae.normalize_decoder_()
    return norm


def assert_close(ours, theirs, allowed=1e-12):
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p - q[1]).abs().max() < allowed, name


def native_and_plain():
    """The widest instruction set, whose bits are those of the others, and plain PyTorch."""
    known = {backend.name: backend for backend in backends() if not backend.spared}
    return [(known[name], dtype) for name, dtype in (("cpu", torch.float32), ("torch", torch.float64)) if name in known]


@pytest.mark.parametrize(("way", "dtype"), native_and_plain(), ids=str)
def test_a_thousand_steps_are_those_of_autograd(way, dtype):
    """To the rule of tolerance: as near to the run in float64 as autograd with torch.optim.Adam is."""
    steps, data, sae = 1000, batches(7, torch.float32), new(torch.float32)
    start = [p.detach().clone() for p in sae.parameters()]
    settings = {"lr": 1e-2, "weight_decay": 1e-3, "eps": 1e-3}
    sae.to(dtype)
    fused = FusedAdam(sae, **settings)
    scheduler = schedule(fused, steps)
    with way.active():
        for at in range(steps):
            fused.step(data[at % len(data)].to(dtype))
            scheduler.step()

    runs = {}

    def dense_run(*inputs):
        x, weights = inputs[: len(data)], inputs[len(data) :]
        # The rule asks for the run in float64 twice.
        key = x[0].dtype, x[0][0, 0].item()
        if key not in runs:
            W_enc, b_enc, W_dec, b_dec = parameters = [torch.nn.Parameter(w.clone()) for w in weights]
            optimizer = torch.optim.Adam(parameters, fused=True, **settings)
            scheduler = schedule(optimizer, steps)
            for at in range(steps):
                optimizer.zero_grad()
                dense_loss(x[at % len(x)], W_enc, b_enc, W_dec, b_dec).backward()
                with torch.no_grad():
                    W_dec.grad -= (
                        (W_dec.grad * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
                    )
                optimizer.step()
                scheduler.step()
                with torch.no_grad():
                    W_dec /= W_dec.norm(dim=1, keepdim=True)
            runs[key] = [p.detach() for p in parameters]
        return runs[key]

    assert_accurate([p.detach() for p in sae.parameters()], dense_run, *data, *start)


def dense_loss(x, W_enc, b_enc, W_dec, b_dec):
    values, indices = ((x - b_dec) @ W_enc + b_enc).topk(K)
    dense = torch.zeros(len(x), D_SAE, dtype=x.dtype).scatter(1, indices, values.relu())
    return (dense @ W_dec + b_dec - x).square().sum() / (x - x.mean(dim=0)).square().sum()


@pytest.mark.parametrize("names", [[name] for name in CLIPS] + [list(CLIPS)], ids="+".join)
@pytest.mark.parametrize("options", [{}, {"normalize_decoder": False}, {"dead_after_tokens": 40}], ids=str)
def test_clipped_run_is_that_of_torch(names, options):
    """In float64, with weight decay; the last options make AuxK act, so that the steps go by autograd."""
    clips = {name: CLIPS[name] for name in names}
    ours, theirs = new(**options), new(**options)
    fused = FusedAdam(ours, lr=1e-2, weight_decay=0.01, **clips)
    plain = torch.optim.Adam(theirs.parameters(), lr=1e-2, weight_decay=0.01)
    for x in batches(20):
        fused.step(x)
        norm = autograd_step(theirs, plain, x, **clips)
        if norm is None:
            assert fused.grad_norm is None
        else:
            assert norm > CLIPS["clip_norm"]
            assert abs(fused.grad_norm - norm) < 1e-12
    assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
def test_clipping_to_a_norm_is_that_of_training_update(clip):
    ours, theirs = new(), new()
    fused = FusedAdam(ours, lr=1e-2, clip_norm=clip)
    plain = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for x in batches(5):
        fused.step(x)
        plain.zero_grad()
        theirs.loss(x).total.backward()
        update(theirs, plain, clip)
    assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_every_architecture_and_option(name, options, monkeypatch):
    """Clipped steps in float64 beside autograd's, some latents dead; the fused pass runs where the SAE says so."""
    passes = []

    def fused_update(*args, **settings):
        passes.append(args)
        ops.fused_update(*args, **settings)

    monkeypatch.setattr(fused_adam, "fused_update", fused_update)
    ours = build(name, options, torch.float64)
    theirs = copy.deepcopy(ours)
    settings = {"lr": 1e-2, "eps": 1e-3}
    fused, plain = FusedAdam(ours, **settings, **CLIPS), torch.optim.Adam(theirs.parameters(), **settings)
    expected = 0
    for _ in range(3):
        x, target = (None if t is None else t.double() for t in batch(ours))
        expected += ours.gradients_by_formula and not ours.auxk_will_act(x)
        fused.step(x, target)
        assert all(p.grad is None for p in ours.parameters())
        autograd_step(theirs, plain, x, target, **CLIPS)
    # A JumpReLU's thresholds are float32 in any SAE.
    assert_close(ours, theirs, 1e-12 if {p.dtype for p in ours.parameters()} == {torch.float64} else 1e-6)
    assert len(passes) == expected


@pytest.mark.parametrize("lazy", [False, True], ids=["adam", "lazy"])
def test_accumulated_gradients_take_the_same_step(lazy):
    """The mean of a batch's halves is the gradient of the batch, where the loss is a mean over tokens."""
    ours, theirs = (new(reconstruction="mse") for _ in range(2))
    options = {"lr": 1e-2, "lazy": lazy, "weight_decay": 0.0 if lazy else 0.01, **CLIPS}
    whole, halves = FusedAdam(ours, **options), FusedAdam(theirs, **options)
    schedules = [schedule(optimizer, 50) for optimizer in (whole, halves)]
    for x in batches(10, n_tokens=4):
        whole.step(x)
        for half in x.chunk(2):
            (theirs.loss(half).total / 2).backward()
        halves.step_from_gradients()
        halves.zero_grad()
        for each in schedules:
            each.step()
    assert_close(ours, theirs)
    assert abs(whole.grad_norm - halves.grad_norm) < 1e-12


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BatchTopKSAE", {"k": 3.7}),
        ("ReLUSAE", {"l1_weight": "none"}),
        ("JumpReLUSAE", {"bandwidth": 0.5, "threshold_init": 0.3, "penalty": "quadratic", "target_l0": 7}),
    ],
)
def test_lazy_steps_of_ragged_codes(name, options):
    """The fused pass beside the step on autograd's gradients; few tokens, so that most latents rest."""
    ours = build(name, options, torch.float64)
    theirs = copy.deepcopy(ours)
    fused, other = (FusedAdam(sae, lr=1e-2, eps=1e-3, lazy=True, **CLIPS) for sae in (ours, theirs))
    for _ in range(4):
        x = batch(ours, 2)[0].double()
        before = ours.W_enc.detach().T.clone()
        loss = fused.step(x)
        idle = idle_latents(loss.codes)
        assert idle.any()
        assert_same_bits(ours.W_enc.detach().T[idle], before[idle])
        theirs.loss(x).total.backward()
        other.step_from_gradients()
        other.zero_grad()
    assert_close(ours, theirs, 1e-12 if {p.dtype for p in ours.parameters()} == {torch.float64} else 1e-6)


def test_lazy_run_is_that_of_sparse_adam():
    """W_enc, b_enc and W_dec by torch.optim.SparseAdam on sparse gradients, b_dec by Adam; in float64."""
    ours, theirs = new(), new()
    fused = FusedAdam(ours, lr=1e-2, lazy=True)
    rows = [torch.nn.Parameter(p.detach().clone()) for p in (theirs.W_enc.T, theirs.b_enc, theirs.W_dec)]
    sparse, dense = torch.optim.SparseAdam(rows, lr=1e-2), torch.optim.Adam([theirs.b_dec], lr=1e-2)
    for x in batches(20, n_tokens=3):
        before = [p.detach().clone() for p in (ours.W_enc.T, ours.b_enc, ours.W_dec)]
        loss = fused.step(x)
        theirs.zero_grad()
        theirs.loss(x).total.backward()
        theirs.project_decoder_grad_()
        idle = idle_latents(loss.codes)
        used = (~idle).nonzero()
        assert idle.any()
        for new_rows, old_rows in zip((ours.W_enc.T, ours.b_enc, ours.W_dec), before, strict=True):
            assert_same_bits(new_rows[idle], old_rows[idle])
        for row, grad in zip(rows, (theirs.W_enc.grad.T, theirs.b_enc.grad, theirs.W_dec.grad), strict=True):
            values = grad[used[:, 0]]
            row.grad = torch.sparse_coo_tensor(used.T, values, grad.shape, check_invariants=True)
        sparse.step()
        dense.step()
        with torch.no_grad():
            rows[2][used[:, 0]] = torch.nn.functional.normalize(rows[2][used[:, 0]])
            for p, row in zip((theirs.W_enc.T, theirs.b_enc, theirs.W_dec), rows, strict=True):
                p.copy_(row)
    assert_close(ours, theirs)


def test_a_lazy_step_by_autograd_moves_what_the_batch_names():
    """AuxK's dead latents and, with a gradient of zero, latents with an entry; no others."""
    sae = new(dead_after_tokens=20, auxk=3)
    optimizer = FusedAdam(sae, lr=1e-2, lazy=True)
    sae.tokens_since_fired.fill_(0)
    sae.tokens_since_fired[:10] = 1000
    before = sae.W_enc.detach().T.clone()
    loss = optimizer.step(batches(1, n_tokens=3)[0])
    moved = (before != sae.W_enc.detach().T).any(dim=1)
    named = ~idle_latents(loss.codes)
    assert moved[named].all()
    assert not moved[10:][~named[10:]].any()


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


def test_a_frozen_parameter_is_left():
    ours, theirs = new(), new()
    for sae in (ours, theirs):
        sae.b_enc.requires_grad_(False)
    fused, plain = FusedAdam(ours, lr=1e-2, clip_norm=0.02), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for at, x in enumerate(batches(6)):
        if at == 3:
            for sae in (ours, theirs):
                sae.b_enc.requires_grad_(True)
        fused.step(x)
        autograd_step(theirs, plain, x, clip_norm=0.02)
    assert_close(ours, theirs)
    assert fused.state[ours.b_enc]["step"] == 3


def test_several_processes_need_gradients():
    """A process group of two, of which one is here: step(x) would train two SAEs."""
    sae, x = new(), batches(1)[0]
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        optimizer = FusedAdam(sae)
        before = [p.detach().clone() for p in sae.parameters()]
        with pytest.raises(RuntimeError, match=r"the 2 processes of torch.distributed could average"):
            optimizer.step(x)
        for p, old in zip(sae.parameters(), before, strict=True):
            assert_same_bits(p.detach(), old)
        sae.loss(x).total.backward()
        optimizer.step_from_gradients()
        optimizer.zero_grad()
        FusedAdam(sae, independent=True).step(x)
    finally:
        torch.distributed.destroy_process_group()
    optimizer.step(x)


def test_two_processes_train_one_sae(tmp_path):
    """Each on half of the tokens, with their gradients averaged: the steps of one process on all of them."""
    file = tmp_path / "meeting"
    other = subprocess.Popen([sys.executable, data_parallel.__file__, "1", str(file)])
    try:
        ours, optimizer = data_parallel.train(0, file)
    finally:
        assert other.wait(timeout=60) == 0
    theirs, alone, x = data_parallel.build()
    for _ in range(3):
        alone.step(x)
    assert_close(ours, theirs)
    assert alone.grad_norm > 0.5
    assert abs(optimizer.grad_norm - alone.grad_norm) < 1e-12


def test_a_scheduler_knows_of_steps_from_gradients(recwarn):
    sae = new()
    optimizer = FusedAdam(sae)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    sae.loss(batches(1)[0]).total.backward()
    optimizer.step_from_gradients()
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]
    assert optimizer.param_groups[0]["lr"] == 1e-4


def test_refuses_options_out_of_their_range():
    sae = new(torch.float32)
    for name in CLIPS:
        for value in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name} = {value}: expected a number above 0, or None"):
                FusedAdam(sae, **{name: value})
    with pytest.raises(ValueError, match=r"weight_decay = 0.1 with lazy=True: expected 0"):
        FusedAdam(sae, weight_decay=0.1, lazy=True)
    with pytest.raises(ValueError, match=r"state_dtype = torch.float16 with weights in torch.float32"):
        FusedAdam(sae, state_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"state_dtype = torch.bfloat16 with weights in torch.float64"):
        FusedAdam(new(), state_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"no parameter holds a gradient"):
        FusedAdam(sae).step_from_gradients()
