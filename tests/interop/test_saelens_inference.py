"""SAELens' inference classes: the same results after fastsae.accelerate as before it, hooks, folding and files."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from interop.saelens_cases import INFERENCE, TRAINING, K, accelerated, named, of, paths, reasons, weighted
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file
from torch import Tensor

import fastsae
from fastsae.interop.record import record_of
from fastsae.interop.saelens import base
from fastsae.testing import assert_same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SAES = [case for case in INFERENCE if "Transcoder" not in case.name]


@pytest.fixture(autouse=True)
def _small_is_sparse(monkeypatch):
    """At these sizes a third of the latents is active."""
    monkeypatch.setattr(base, "MOST_DENSE", 1.0)


def results_of(sae, call, problem):
    """What a call returns, and every gradient of it."""
    x = problem["x"].clone().requires_grad_()
    found = call(sae, x)
    found = (found,) if isinstance(found, Tensor) else found
    assert all(type(t) is Tensor for t in found)
    weighted(*found).backward()
    # A bias times False has a gradient of zeros in SAELens, and none in fastsae.
    grads = {
        f"gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in sae.named_parameters()
    }
    return {str(number): t.detach() for number, t in enumerate(found)} | grads | {"gradient of x": x.grad}


CALLS = {
    "forward": lambda sae, x: sae(x),
    "encode": lambda sae, x: sae.encode(x),
    "decode": lambda sae, x: sae.decode(sae.encode(x)),
    "forward_with_activations": lambda sae, x: sae.forward_with_activations(x),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", ["forward", "encode", "forward_with_activations"])
@pytest.mark.parametrize("case", INFERENCE + TRAINING, ids=lambda case: f"{case}-{case.sae_class.__name__}")
def test_calls(case, call, dtype):
    if not hasattr(case.sae_class, call):
        return

    def ours(problem):
        sae = accelerated(case.build(problem))
        found = results_of(sae, CALLS[call], problem)
        assert paths(sae) == {(call, "fastsae")}
        return found

    problems = [case.problem(seed) for seed in range(SEEDS)]
    assert_agrees(dtype, ours, lambda problem: results_of(case.build(problem), CALLS[call], problem), problems)


@pytest.mark.parametrize("case", SAES, ids=str)
def test_dense_activations_are_decoded_by_the_library(case):
    problem = case.problem(0)
    sae = accelerated(case.build(problem))
    with torch.no_grad():
        acts = sae.encode(problem["x"])
        assert_same_bits(sae.decode(acts), case.build(problem).decode(acts))
    assert reasons(sae, "decode") == ["its activations are a dense tensor"]


@pytest.mark.parametrize("shape", [(20,), (1, 20), (0, 20), (3, 4, 20), (2, 0, 20)], ids=str)
@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_shapes(case, shape):
    problem = case.problem(0)
    x = torch.randn(shape)
    sae, plain = accelerated(case.build(problem)), case.build(problem)
    with torch.no_grad():
        for call in ("forward", "encode"):
            torch.testing.assert_close(CALLS[call](sae, x), CALLS[call](plain, x))


def with_options(case, **options):
    return replace(case, options=case.options | options)


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale", "expected_average_only_in"])
@pytest.mark.parametrize("case", SAES, ids=str)
def test_normalised_activations(case, mode):
    case = with_options(case, normalize_activations=mode)
    problems = [case.problem(seed, silent=False) for seed in range(SEEDS)]

    def run(sae, problem):
        return results_of(sae, CALLS["forward"], problem)

    assert_agrees(
        torch.float32, lambda p: run(accelerated(case.build(p)), p), lambda p: run(case.build(p), p), problems
    )


@pytest.mark.parametrize("case", SAES, ids=str)
def test_heads(case):
    """reshape_activations="hook_z": activations [..., n_heads, d_head]."""
    case = with_options(case, reshape_activations="hook_z")
    problem = case.problem(0)
    x = problem["x"].reshape(37, 5, 4)
    with torch.no_grad():
        y = accelerated(case.build(problem))(x)
        assert y.shape == x.shape
        torch.testing.assert_close(y, case.build(problem)(x))


@pytest.mark.parametrize("intervene", [False, True])
@pytest.mark.parametrize("case", SAES, ids=str)
def test_error_term(case, intervene):
    """The output is the input again, unless somebody changes activations."""
    problem, outputs = case.problem(0), []
    for accelerate in (False, True):
        sae = case.build(problem)
        if accelerate:
            accelerated(sae)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae.use_error_term = True
        if intervene:
            sae.hook_sae_acts_post.add_hook(lambda acts, hook: 2 * acts)
        with torch.no_grad():
            outputs.append(sae(problem["x"]))
    torch.testing.assert_close(*outputs)
    if not intervene:
        torch.testing.assert_close(outputs[1], problem["x"], rtol=1e-4, atol=1e-5)
    # What is clean is encoded without hooks.
    assert ("forward", "fastsae") in paths(sae)
    assert bool(reasons(sae, "forward")) == intervene


@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_run_with_cache(case):
    problem = case.problem(0)
    sae, plain = accelerated(case.build(problem)), case.build(problem)
    with torch.no_grad():
        y, cache = sae.run_with_cache(problem["x"])
        expected, expected_cache = plain.run_with_cache(problem["x"])
    torch.testing.assert_close(y, expected)
    assert cache.keys() == expected_cache.keys()
    for name in cache:
        torch.testing.assert_close(cache[name], expected_cache[name])
    sae.run_with_cache(problem["x"], names_filter=["hook_sae_recons", "hook_sae_input"])
    assert ("forward", "fastsae") in paths(sae)


def test_backward_hooks_see_dense_gradients():
    case, seen = named(INFERENCE, "topk")[0], []
    for accelerate in (False, True):
        sae = case.build(case.problem(0))
        if accelerate:
            accelerated(sae)
        sae.hook_sae_acts_post.add_hook(lambda grad, hook: seen.append(grad), dir="bwd")
        sae(case.problem(0)["x"]).sum().backward()
    assert_same_bits(seen[1][0], seen[0][0])


def folded(sae, how):
    if how == "W_dec":
        sae.fold_W_dec_norm()
    elif how == "scale":
        sae.fold_activation_norm_scaling_factor(1.7)
    else:
        matrix = torch.eye(D_IN) + 0.1 * torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5))
        sae.fold_activation_whitening(torch.linspace(-1, 1, D_IN), matrix, matrix.inverse())


@pytest.mark.parametrize("how", ["W_dec", "scale", "whitening"])
@pytest.mark.parametrize("case", SAES + named(TRAINING, "topk", "gated", "jumprelu", "batchtopk"), ids=str)
def test_folding(case, how):
    if how == "W_dec" and case.name == "topk" and not case.build(case.problem(0)).cfg.rescale_acts_by_decoder_norm:
        with pytest.raises(NotImplementedError):
            accelerated(case.build(case.problem(0))).fold_W_dec_norm()
        return
    problem = case.problem(0)
    sae, plain = accelerated(case.build(problem)), case.build(problem)
    folded(sae, how)
    folded(plain, how)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[name], tensor)
    assert sae.W_enc.T.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(sae(problem["x"]), plain(problem["x"]))


@pytest.mark.parametrize("case", INFERENCE + TRAINING, ids=lambda case: f"{case}-{case.sae_class.__name__}")
def test_what_stays(case):
    problem = case.problem(0)
    sae = case.build(problem)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    parameters, cfg = dict(sae.named_parameters()), copy.deepcopy(sae.cfg)
    fastsae.accelerate(sae)
    assert fastsae.accelerate(sae) is sae
    assert isinstance(sae, case.sae_class)
    assert all(parameter is parameters[name] for name, parameter in sae.named_parameters())
    assert list(sae.state_dict()) == list(before)
    for name, tensor in sae.state_dict().items():
        assert_same_bits(tensor, before[name])
    assert sae.cfg == cfg
    assert sae.W_enc.T.is_contiguous()
    with torch.no_grad():
        ours = sae(problem["x"])
        assert fastsae.restore(sae) is sae
        assert type(sae) is case.sae_class
        assert sae.W_enc.is_contiguous()
        assert record_of(sae) is None
        assert all(parameter is parameters[name] for name, parameter in sae.named_parameters())
        assert not [name for name in vars(sae) if "fastsae" in name]
        torch.testing.assert_close(sae(problem["x"]), ours)
        assert_same_bits(sae(problem["x"]), case.build(problem)(problem["x"]))


@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_files(case, tmp_path):
    """Saved while accelerated: the same file as before, and it loads as the class it would have been."""
    problem = case.problem(0)
    sae = accelerated(case.build(problem))
    case.build(problem).save_model(tmp_path / "before")
    sae.save_model(tmp_path / "after")
    assert_same_files(tmp_path)
    for loaded in (SAE.load_from_disk(tmp_path / "after"), type(sae).load_from_disk(tmp_path / "after")):
        assert type(loaded) is case.sae_class
        with torch.no_grad():
            torch.testing.assert_close(accelerated(loaded)(problem["x"]), sae(problem["x"]))
    assert type(type(sae).from_dict(sae.cfg.to_dict())) is case.sae_class


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_files_of_training(case, tmp_path):
    problem = case.problem(0)
    sae, plain = accelerated(case.build(problem)), case.build(problem)
    if case.options.get("rescale_acts_by_decoder_norm") is False or "topk" not in case.name:
        plain.save_model(tmp_path / "before")
        sae.save_model(tmp_path / "after")
        assert_same_files(tmp_path)
        assert type(TrainingSAE.load_from_disk(tmp_path / "after")) is case.sae_class
    plain.save_inference_model(tmp_path / "before")
    sae.save_inference_model(tmp_path / "after")
    assert_same_files(tmp_path)
    assert sae.W_enc.T.is_contiguous()
    loaded, expected = (SAE.load_from_disk(tmp_path / name) for name in ("after", "before"))
    with torch.no_grad():
        torch.testing.assert_close(accelerated(loaded)(problem["x"]), expected(problem["x"]))


def assert_same_files(folder):
    before, after = (load_file(folder / name / "sae_weights.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor)
    texts = [(folder / name / "cfg.json").read_text() for name in ("before", "after")]
    assert texts[0] == texts[1]


def test_state_dict_goes_through_torch_save(tmp_path):
    case = named(INFERENCE, "topk")[0]
    problem = case.problem(0)
    sae = accelerated(case.build(problem))
    torch.save(sae.state_dict(), tmp_path / "state.pt")
    plain = case.build(case.problem(1))
    plain.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert plain.W_enc.is_contiguous()
    with torch.no_grad():
        assert_same_bits(plain(problem["x"]), case.build(problem)(problem["x"]))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later(assign):
    """In whatever layout: a row-major W_enc is served too, and the record says that it is copied."""
    case = named(INFERENCE, "jumprelu")[0]
    sae, other = accelerated(case.build(case.problem(0))), case.build(case.problem(1))
    sae.load_state_dict(other.state_dict(), assign=assign)
    assert sae.W_enc.T.is_contiguous() != assign
    x = case.problem(1)["x"]
    torch.testing.assert_close(sae(x), other(x))
    sae(x).sum().backward()
    assert sae.W_enc.grad.shape == sae.W_enc.shape
    assert list(record_of(sae).calls) == [
        ("forward", "fastsae", "W_enc is row-major and copied in each call" if assign else "")
    ]


def test_another_dtype():
    case = named(INFERENCE, "topk")[0]
    sae = accelerated(case.build(case.problem(0))).to(torch.bfloat16)
    assert sae.W_enc.T.is_contiguous()
    assert sae.cfg.dtype == "bfloat16"
    assert sae(case.problem(0)["x"]).dtype == torch.bfloat16


@pytest.mark.parametrize("case", SAES, ids=str)
def test_autocast(case):
    """Products of float32 weights stay float32: nearer to the exact result than autocast's."""
    problem = case.problem(0)
    with torch.no_grad():
        exact = case.build(problem)(problem["x"])
        with torch.autocast("cpu", torch.bfloat16):
            plain, ours = (sae(problem["x"]) for sae in (case.build(problem), accelerated(case.build(problem))))
    assert ours.dtype == plain.dtype
    assert (ours - exact).abs().max() <= (plain - exact).abs().max()


def test_copies():
    case = named(INFERENCE, "topk")[0]
    sae = accelerated(case.build(case.problem(0)))
    twin = copy.deepcopy(sae)
    with torch.no_grad():
        assert_same_bits(twin(case.problem(0)["x"]), sae(case.problem(0)["x"]))
    fastsae.restore(twin)
    assert type(twin) is case.sae_class
    assert type(sae) is not case.sae_class


def test_equal_pre_activations_and_too_few():
    """The lower index first where SAELens leaves it open; a token with fewer than k positive ones keeps those."""
    case = named(INFERENCE, "topk")[0]
    problem = case.problem(0)
    problem["W_enc"][:, 1::2] = problem["W_enc"][:, ::2]
    problem["b_enc"][1::2] = problem["b_enc"][::2]
    sae, plain = accelerated(case.build(problem)), case.build(problem)
    with torch.no_grad():
        acts, expected = sae.encode(problem["x"]), plain.encode(problem["x"])
    torch.testing.assert_close(acts.sort(dim=1).values, expected.sort(dim=1).values)
    positive = (acts > 0).sum(1)
    assert torch.equal(positive, (expected > 0).sum(1))
    assert positive.min() == 0
    assert positive.max() == K


def test_nan_stays_in_its_row():
    case = named(INFERENCE, "topk")[0]
    problem = case.problem(0)
    sae = accelerated(case.build(problem))
    with torch.no_grad():
        clean = sae(problem["x"])
        problem["x"][5] = torch.nan
        y = sae(problem["x"])
    assert y[5].isnan().all()
    others = torch.arange(37) != 5
    assert_same_bits(y[others], clean[others])


@pytest.mark.parametrize("name", ["MatchingPursuitSAE", "AbsTopKSAE"])
def test_classes_without_a_fast_form(name):
    sae_class, config_class = of(name)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE))
    fastsae.accelerate(sae)
    assert type(sae) is sae_class
    assert name in record_of(sae).why_not
    fastsae.restore(sae)
    assert record_of(sae) is None


def test_classes_of_ones_own():
    """They may have changed any method."""
    case = named(INFERENCE, "topk")[0]

    class Mine(case.sae_class):
        pass

    sae = Mine(case.build(case.problem(0)).cfg)
    fastsae.accelerate(sae)
    assert type(sae) is Mine
    assert "Mine" in record_of(sae).why_not


def test_patched_methods():
    case = named(INFERENCE, "topk")[0]
    sae = case.build(case.problem(0))
    sae.encode = lambda x: x
    fastsae.accelerate(sae)
    assert type(sae) is case.sae_class
    assert record_of(sae).why_not.startswith("encode of this SAE")


def test_another_activation_function():
    case = named(INFERENCE, "standard")[0]
    sae = accelerated(case.build(case.problem(0)))
    sae.activation_fn = torch.nn.GELU()
    x = case.problem(0)["x"]
    assert (sae.encode(x) < 0).any()
    assert reasons(sae, "encode") == ["activation_fn is a GELU"]


def test_another_module_in_place_of_a_hook():
    case = named(INFERENCE, "standard")[0]
    problem = case.problem(0)
    sae, plain = accelerated(case.build(problem)), case.build(problem)
    sae.hook_sae_acts_post = plain.hook_sae_acts_post = torch.nn.Tanh()
    with torch.no_grad():
        torch.testing.assert_close(sae(problem["x"]), plain(problem["x"]))
    assert reasons(sae, "forward") == ["hook_sae_acts_post is a Tanh"]


def test_objects_without_an_sae():
    with pytest.raises(TypeError, match="expected an SAE of SAELens"):
        fastsae.accelerate(torch.nn.Linear(2, 2))


def test_several_in_a_module():
    cases = named(INFERENCE, "topk", "jumprelu")
    both = torch.nn.ModuleList([case.build(case.problem(0)) for case in cases])
    fastsae.accelerate(both)
    assert all(record_of(sae) is not None for sae in both)
