"""SAELens' training classes and its trainer: the same results after fastsae.accelerate as before it."""

import copy

import pytest
import torch
from interop.saelens_cases import TRAINING, accelerated, named, paths, reasons, train_step, weighted
from peers import saelens
from peers.comparison import D_IN, SEEDS, assert_agrees, dead_latents
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastsae
from fastsae.interop.record import record_of
from fastsae.interop.saelens import base
from fastsae.testing import assert_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
FAST = ("training_forward_pass", "fastsae")


@pytest.fixture(autouse=True)
def _small_is_sparse(monkeypatch):
    """At these sizes a third of the latents is active."""
    monkeypatch.setattr(base, "MOST_DENSE", 1.0)


# AuxK keeps d_in // 2 = 10 of the dead: as many are dead, or more.
@pytest.mark.parametrize("n_dead", [0, 13])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_step(case, dtype, n_dead):
    dead = dead_latents(n_dead)

    def ours(problem):
        sae = accelerated(case.build(problem))
        results = train_step(sae, case, problem, dead)
        assert paths(sae) == {FAST}
        return results

    def theirs(problem):
        return train_step(case.build(problem), case, problem, dead)

    assert_agrees(dtype, ours, theirs, [case.problem(seed, dead) for seed in range(SEEDS)])


def trainer_of(sae, *, autocast=False, window=1000):
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10_000,
        device="cpu",
        autocast=autocast,
        lr=1e-2,
        lr_end=1e-3,
        lr_scheduler_name="constant",
        lr_warm_up_steps=2,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=37,
        dead_feature_window=window,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter([]))
    # With its own 1e-8 a gradient that is zero but for rounding moves a weight by a whole step, either way.
    trainer.optimizer.param_groups[0]["eps"] = 1e-3
    return trainer


def batches(problem, steps=10):
    """Other rows of the same kind for each step."""
    return [problem["x"].roll(step, dims=1) for step in range(steps)]


def trained(case, problem, accelerate, **options):
    """Ten steps of SAELens' trainer: the losses, what it counted, and the weights."""
    trainer = trainer_of(case.build(problem), **options)
    if accelerate:
        fastsae.accelerate(trainer)
    losses = []
    for x in batches(problem):
        losses.append(trainer.step(x).loss.detach())
        trainer.n_training_steps += 1
    if accelerate:
        assert paths(trainer.sae) == {FAST}
    results = {"losses": torch.stack(losses), "firing": trainer.act_freq_scores, **trainer.sae.state_dict()}
    return {name: result.to(problem["x"].dtype) for name, result in results.items()}


# A window of 3 steps: latents die on the way.
@pytest.mark.parametrize("case", TRAINING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_steps_of_the_trainer(case, dtype):
    problem = {name: tensor.to(dtype) for name, tensor in case.problem(0, silent=False).items()}
    names = list(problem)

    def theirs(*tensors):
        results = trained(case, dict(zip(names, tensors, strict=True)), accelerate=False, window=3)
        return [results[name] for name in found]

    found = trained(case, problem, accelerate=True, window=3)
    assert_accurate(list(found.values()), theirs, *problem.values())


def test_trainer_under_autocast():
    """bfloat16 products of float32 weights: fastsae's are float32, and nearer to the exact ones."""
    case = named(TRAINING, "topk")[0]
    exact, plain, ours = (
        trained(case, case.problem(0), accelerate, autocast=autocast)["losses"]
        for accelerate, autocast in ((False, False), (False, True), (True, True))
    )
    assert (ours - exact).abs().max() <= (plain - exact).abs().max()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", named(TRAINING, "topk", "jumprelu"), ids=str)
def test_accelerated_halfway(case, fused):
    """Gradients and moments made before take the layout of the weights, in place, and give the same steps.

    torch's fused Adam would take the moments of other weights for those of W_enc.
    """
    problem = case.problem(0, silent=False)
    names = list(problem)

    def run(accelerate, problem):
        sae = case.build(problem)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-3, fused=fused)
        for step, x in enumerate(batches(problem)):
            # Gradients stay, as those of one's own loop that accumulates.
            optimizer.zero_grad(set_to_none=False)
            sae.training_forward_pass(saelens.step_input(x, case.coefficients)).loss.backward()
            if step == 5 and accelerate:
                moment = optimizer.state[sae.W_enc]["exp_avg"]
                fastsae.accelerate(sae)
                assert sae.W_enc.grad.stride() == (1, D_IN)
            optimizer.step()
            if step == 5 and accelerate:
                assert optimizer.state[sae.W_enc]["exp_avg"] is moment
                assert moment.stride() == sae.W_enc.stride() == (1, D_IN)
            if step == 7 and accelerate:
                fastsae.restore(sae)
        return list(sae.state_dict().values())

    def theirs(*tensors):
        return run(False, dict(zip(names, tensors, strict=True)))

    assert_accurate(run(True, problem), theirs, *problem.values())


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns, views included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if type(t) is torch.Tensor]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return result


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_nothing_is_as_large_as_the_activations(case):
    """In a step of the trainer, from the second on (the first one looks how many latents are active)."""
    n_tokens, d_sae = 256, 40_960
    options = {name: value for name, value in case.options.items() if name != "matryoshka_widths"}
    if "matryoshka" in case.name:
        options["matryoshka_widths"] = [d_sae // 4, d_sae]
    sae = case.sae_class(case.config_class(d_in=8, d_sae=d_sae, **options))
    with torch.no_grad():
        for name, level in (("b_enc", -0.4), ("b_gate", -0.4), ("threshold", 0.4)):
            if getattr(sae, name, None) is not None:
                getattr(sae, name).fill_(level)
    trainer = fastsae.accelerate(trainer_of(sae, window=1))
    x = torch.randn(n_tokens, 8)
    trainer.step(x)
    trainer.step(x)
    with Largest() as largest:
        trainer.step(x)
    assert paths(sae) == {FAST}
    assert largest.elements < n_tokens * d_sae / 2


def test_log_of_the_trainer():
    case = named(TRAINING, "topk")[0]
    logs = []
    for accelerate in (False, True):
        trainer = trainer_of(case.build(case.problem(0)))
        if accelerate:
            fastsae.accelerate(trainer)
        logs.append(trainer.build_train_step_log_dict(trainer.step(case.problem(0)["x"]), 37))
    assert logs[0].keys() == logs[1].keys()
    assert logs[0]["metrics/l0"] == logs[1]["metrics/l0"] <= 9
    assert paths(trainer.sae) == {FAST}


def test_trainer_of_several():
    case = named(TRAINING, "batchtopk")[0]
    saes = {name: case.build(case.problem(seed)) for seed, name in enumerate("ab")}
    trainer = MultiSAETrainer(
        cfg=trainer_of(saes["a"]).cfg, saes=saes, hook_names=dict.fromkeys(saes, "hook"), data_provider=iter([])
    )
    fastsae.accelerate(trainer)
    for name, one in trainer.trainers.items():
        one.step(case.problem(3)["x"])
        assert paths(saes[name]) == {FAST}
    fastsae.restore(trainer)
    assert all(type(sae) is case.sae_class and record_of(sae) is None for sae in saes.values())


@pytest.mark.parametrize("case", named(TRAINING, "topk", "standard"), ids=str)
def test_results_are_tensors_to_who_reads_them(case):
    """A loss of one's own on activations and pre-activations has the gradients it had; the record tells of it."""

    def run(accelerate, problem):
        sae = case.build(problem)
        if accelerate:
            accelerated(sae)
        out = sae.training_forward_pass(saelens.step_input(problem["x"], case.coefficients))
        (out.loss + weighted(out.feature_acts, out.hidden_pre.square())).backward()
        if accelerate:
            assert reasons(sae, "activations")
            assert reasons(sae, "hidden_pre")
        return {name: parameter.grad for name, parameter in sae.named_parameters()}

    problems = [case.problem(seed) for seed in range(SEEDS)]
    assert_agrees(torch.float64, lambda p: run(True, p), lambda p: run(False, p), problems)
    assert_agrees(torch.float32, lambda p: run(True, p), lambda p: run(False, p), problems)


def test_pre_activations_of_other_weights_are_refused():
    case = named(TRAINING, "topk")[0]
    trainer = fastsae.accelerate(trainer_of(case.build(case.problem(0))))
    out = trainer.step(case.problem(0)["x"])
    with pytest.raises(RuntimeError, match="after its weights have changed"):
        out.hidden_pre.sum()


@pytest.mark.parametrize("case", named(TRAINING, "standard", "jumprelu", "gated"), ids=str)
def test_dense_batches_run_in_the_library(case, monkeypatch):
    """So long as many latents are active; a few tokens are looked at each time, and the input hook runs once."""
    monkeypatch.setattr(base, "MOST_DENSE", 0.2)
    problem = case.problem(0)
    sae, plain = accelerated(case.build(problem)), case.build(problem)
    found, expected = train_step(sae, case, problem), train_step(plain, case, problem)
    for name, result in expected.items():
        torch.testing.assert_close(found[name], result, msg=name)
    assert reasons(sae, "training_forward_pass") == [
        "more than 20% of the latents are active: dense products are faster"
    ]
    inputs = []
    sae.hook_sae_input.add_hook(lambda x, hook: inputs.append(x))
    if case.name != "gated":
        train_step(sae, case, problem)
        assert len(inputs) == 1
    sae.hook_sae_input.remove_hooks()
    with torch.no_grad():
        (sae.b_gate if case.name == "gated" else sae.b_enc).sub_(1.5)
    train_step(sae, case, problem)
    assert FAST in paths(sae)


@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
@pytest.mark.parametrize("case", named(TRAINING, "topk", "jumprelu"), ids=str)
def test_hooks_see_dense_tensors(case, hook):
    problem, seen = case.problem(0), []
    for accelerate in (False, True):
        sae = case.build(problem)
        if accelerate:
            accelerated(sae)
        getattr(sae, hook).add_hook(lambda acts, hook: seen.append(acts))
        train_step(sae, case, problem)
    assert type(seen[1]) is torch.Tensor
    torch.testing.assert_close(*seen)
    assert reasons(sae, "training_forward_pass") == [f"a hook on {hook} asks for dense activations"]
    getattr(sae, hook).remove_hooks()
    train_step(sae, case, problem)
    assert FAST in paths(sae)


def test_layer_norm_refuses_auxk_as_before():
    case = named(TRAINING, "topk")[0]
    options = case.options | {"normalize_activations": "layer_norm"}
    sae = accelerated(saelens.build(case.sae_class, case.config_class, weights_of(case), **options))
    x, dead = case.problem(0)["x"], dead_latents(5)
    with pytest.raises(ValueError, match="does not support activation normalization"):
        sae.training_forward_pass(saelens.step_input(x, {}, dead))


def weights_of(case):
    return {name: tensor for name, tensor in case.problem(0).items() if name != "x"}


def test_sparse_activations_train():
    """SAELens' sparse tensors fail in a training step with the norms of decoder rows; `encode` returns them as before.

    On a CPU: the gradient of the product with the norms wants a view of a sparse tensor.
    """
    case = named(TRAINING, "topk")[0]
    problem = case.problem(0)

    def build():
        options = case.options | {"use_sparse_activations": True}
        return saelens.build(case.sae_class, case.config_class, weights_of(case), **options)

    with pytest.raises(NotImplementedError, match="SparseCPU"):
        train_step(build(), case, problem)
    sae = accelerated(build())
    assert sae.encode(problem["x"]).is_sparse
    assert build().encode(problem["x"]).is_sparse
    found, expected = train_step(sae, case, problem), train_step(case.build(problem), case, problem)
    torch.testing.assert_close(found["gradient of W_enc"], expected["gradient of W_enc"])


def test_k_may_be_changed():
    case = named(TRAINING, "topk")[0]
    sae = accelerated(case.build(case.problem(0)))
    sae.activation_fn.k = 3
    assert (sae.encode(case.problem(0)["x"]) != 0).sum(-1).max() == 3


def test_inputs_of_another_dtype():
    """The error is that of the input as it came: in float32, of a bfloat16 SAE."""
    case = named(TRAINING, "topk")[0]
    problem = {name: tensor.bfloat16() for name, tensor in case.problem(0).items()} | {"x": case.problem(0)["x"]}
    found = train_step(accelerated(case.build(problem)), case, problem, dead_latents(13))
    expected = train_step(case.build(problem), case, problem, dead_latents(13))
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=2**-7, atol=0)


def test_copies_train_on():
    case = named(TRAINING, "jumprelu")[0]
    problem = case.problem(0)
    sae = accelerated(case.build(problem))
    twin = copy.deepcopy(sae)
    assert type(twin) is type(sae)
    assert twin.W_enc.T.is_contiguous()
    found, expected = train_step(twin, case, problem), train_step(sae, case, problem)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert record_of(twin) is not record_of(sae)


def test_made_by_its_class():
    case = named(TRAINING, "topk")[0]
    problem = case.problem(0)
    other = type(accelerated(case.build(problem)))(case.build(problem).cfg)
    train_step(other, case, problem)
    assert FAST in paths(other)


def test_compiled():
    """What torch.compile traces is the library's code."""
    torch.compiler.reset()
    case = named(TRAINING, "topk")[0]
    problem = case.problem(0)
    sae = accelerated(case.build(problem))
    sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="eager")
    found, expected = train_step(sae, case, problem), train_step(case.build(problem), case, problem)
    torch.testing.assert_close(found, expected)
    assert reasons(sae, "training_forward_pass") == ["torch.compile takes the library's code"]
