"""FusedAdam's options, each against torch's own optimizers and clipping on autograd's gradients."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from architectures import SETTINGS, batch, build
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastsae import ops
from fastsae.optim import FusedAdam, fused_adam
from fastsae.testing import assert_accurate, assert_same_bits, backends
from fastsae.training import update

from . import data_parallel
from .runs import CLIPS, D_SAE, K, assert_close, autograd_step, batches, idle_latents, new, schedule


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
