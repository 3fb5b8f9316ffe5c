"""dictionary_learning's dictionaries before and after fastsae.accelerate, as `dict_class`, in files."""

import copy
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dictionary_learning import dictionary as library
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from interop.installed import load_dictionary, trainSAE
from interop.test_dictionary_learning import CASES, EVERY, _id, served_by_fastsae, ten_steps
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, cast, draw, gradients, load, widening_to

import fastsae
from fastsae.interop import dictionary_learning as drop_ins
from fastsae.interop.activations import Activations
from fastsae.interop.dictionary_learning import dictionaries
from fastsae.interop.record import record_of
from fastsae.testing import assert_same_bits

GROUPS = [8, 16, 16, 40]


@dataclass(frozen=True)
class Call:
    """A way to encode: a class, its arguments, what is set on it, the arguments of `encode`; weights by name."""

    kind: type
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    case: str = "topk"

    def build(self, inputs):
        sae = self.kind(D_IN, D_SAE, *self.arguments).to(inputs["x"].dtype)
        load(sae, {name: value for name, value in inputs.items() if name != "x"}, NAMES[self.case])
        for name, value in self.attributes.items():
            if isinstance(getattr(sae, name), torch.Tensor):
                getattr(sae, name).fill_(value)
            else:
                setattr(sae, name, value)
        return sae


CALLS = {
    "topk": Call(AutoEncoderTopK, (5,)),
    "topk, by threshold": Call(AutoEncoderTopK, (5,), {"threshold": 0.5}, {"use_threshold": True}),
    "topk, everything": Call(AutoEncoderTopK, (5,), {"threshold": 0.5}, {"use_threshold": True, "return_topk": True}),
    "topk, with its picks": Call(AutoEncoderTopK, (5,), {}, {"return_topk": True}),
    "batchtopk": Call(BatchTopKSAE, (5,), {}, {"use_threshold": False}),
    "batchtopk, active": Call(BatchTopKSAE, (5,), {}, {"use_threshold": False, "return_active": True}),
    "batchtopk, by threshold": Call(BatchTopKSAE, (5,), {"threshold": 0.5}),
    "batchtopk, untrained": Call(BatchTopKSAE, (5,)),
    "matryoshka": Call(MatryoshkaBatchTopKSAE, (5, GROUPS), {"threshold": 0.5}, case="matryoshka"),
    "matryoshka, two groups": Call(
        MatryoshkaBatchTopKSAE, (5, GROUPS), {"active_groups": 2}, {"use_threshold": False}, "matryoshka"
    ),
    "relu": Call(library.AutoEncoder, case="standard"),
    "relu, new": Call(library.AutoEncoderNew, case="new"),
    "gated": Call(library.GatedAutoEncoder, case="gated"),
    "gated, with gate": Call(library.GatedAutoEncoder, (), {}, {"return_gate": True}, "gated"),
    "gated, by norms": Call(library.GatedAutoEncoder, (), {}, {"normalize_decoder": True}, "gated"),
    "jumprelu": Call(library.JumpReluAutoEncoder, case="jumprelu"),
    "jumprelu, less b_dec": Call(
        library.JumpReluAutoEncoder, (), {"apply_b_dec_to_input": True}, {"output_pre_jump": True}, "jumprelu"
    ),
}
# AutoEncoderNew, which no trainer makes.
_NEW = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
NAMES = {name: case.names for name, case in CASES.items()} | {"new": _NEW}
OWN = {name: case.own for name, case in CASES.items()} | {"new": ("b_enc",)}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def _codes_however_dense(monkeypatch):
    monkeypatch.setattr(dictionaries, "MOST_DENSE", 1.0)


def encoded(call, accelerated):
    """Everything that `encode` returns, the output, and gradients of a weighted sum of all of it."""

    def run(inputs):
        sae = call.build(inputs)
        if accelerated:
            fastsae.accelerate(sae)
        x = inputs["x"].clone().requires_grad_()
        found = sae.encode(x, **call.options)
        f, *more = found if isinstance(found, tuple) else (found,)
        output = sae(x)
        if accelerated:
            assert isinstance(f, Activations)
            assert served_by_fastsae(sae)
        if call.options.get("return_topk"):
            values, places, *more = more
            more.append(torch.zeros(x.shape[0], D_SAE, dtype=x.dtype).scatter(-1, places, values))
        results = {"output": output, "activations": f + 0} | {f"more {i}": part + 0 for i, part in enumerate(more)}
        total = sum(
            (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum()
            for t in results.values()
            if t.is_floating_point()
        )
        total.backward()
        results = {name: value.detach().to(x.dtype) for name, value in results.items()} | {"gradient of x": x.grad}
        weights = {name: value for name, value in inputs.items() if name != "x"}
        return results | gradients(sae, weights, NAMES[call.case])

    return run


def problems_of(call, dtype=torch.float32):
    """Of numbers that `dtype` holds: else which latents are above zero is one matter of rounding the input."""
    return [cast(cast(draw(seed, *OWN[call.case]), dtype), torch.float32) for seed in range(SEEDS)]


@every_dtype
@every_call
def test_encode_and_forward(call, dtype):
    assert_agrees(dtype, encoded(call, True), encoded(call, False), problems_of(call, dtype))


@every_call
def test_parameters_stay_and_restore_gives_the_class_back(call):
    sae = call.build(problems_of(call)[0])
    # k, threshold and all else that is no weight.
    fields, before = set(sae.__dict__), {name: value.clone() for name, value in sae.state_dict().items()}
    parameters = {name: id(p) for name, p in sae.named_parameters()}
    assert fastsae.accelerate(sae) is sae
    assert isinstance(sae, call.kind)
    assert {name: id(p) for name, p in sae.named_parameters()} == parameters
    after = sae.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert_same_bits(after[name], value)
    duplicate = copy.deepcopy(sae)
    assert type(duplicate) is type(sae)
    assert fastsae.restore(sae) is sae
    assert type(sae) is call.kind
    assert set(sae.__dict__) == fields
    x = torch.randn(7, D_IN)
    torch.testing.assert_close(duplicate(x), sae(x))


@pytest.mark.parametrize("call", [CALLS[name] for name in ("topk", "relu", "gated", "jumprelu")], ids=str)
def test_any_leading_dimensions(call):
    sae = call.build(problems_of(call)[0])
    x = torch.randn(2, 3, 5, D_IN)
    expected = sae(x, output_features=True)
    for part, other in zip(fastsae.accelerate(sae)(x, output_features=True), expected, strict=True):
        torch.testing.assert_close(part + 0, other)


def test_batchtopk_counts_the_first_dimension_alone():
    """k · x.size(0) of the whole batch are kept, however many dimensions it has."""
    call = CALLS["batchtopk"]
    sae = call.build(problems_of(call)[0])
    x = torch.randn(3, 7, D_IN)
    expected = sae.encode(x, use_threshold=False)
    assert (expected != 0).sum() == 15
    torch.testing.assert_close(fastsae.accelerate(sae).encode(x, use_threshold=False) + 0, expected)


def test_ghost_gradients():
    call = CALLS["relu"]
    sae, x = call.build(problems_of(call)[0]), torch.randn(7, D_IN)
    mask = torch.arange(D_SAE) % 3 == 0
    expected = sae(x, output_features=True, ghost_mask=mask)
    fastsae.accelerate(sae)
    for part, other in zip(sae(x, output_features=True, ghost_mask=mask), expected, strict=True):
        torch.testing.assert_close(part, other)
    assert any("ghost gradients" in reason for _, _, reason in record_of(sae).calls)


@pytest.mark.parametrize(("name", "dtype"), EVERY, ids=map(_id, EVERY))
def test_dict_class_alone(name, dtype):
    """A trainer of the library's that is given fastsae's dictionary: its own loss and update go by the codes too."""
    case = CASES[name]
    kind = dictionaries.DICTIONARIES[type(case.build(case.problems()[0]).ae)]
    with_dict_class = copy.deepcopy(case.options) | {"dict_class": kind}

    def run(inputs):
        own = type(case)(case.trainer, with_dict_class, case.names, case.own)
        trainer = own.build(inputs)
        losses = []
        with widening_to(inputs["x"].dtype):
            for step in range(3):
                losses.append(trainer.loss(inputs["x"], step=step))
                trainer.update(step, inputs["x"])
        assert type(trainer) is case.trainer
        if case.trainer is not JumpReluTrainer:
            calls = record_of(trainer.ae).calls
            assert {path for _, path, _ in calls} == {"fastsae"}
        return finished(trainer, losses)

    def theirs(inputs):
        trainer = case.build(inputs)
        losses = []
        with widening_to(inputs["x"].dtype):
            for step in range(3):
                losses.append(trainer.loss(inputs["x"], step=step))
                trainer.update(step, inputs["x"])
        return finished(trainer, losses)

    assert_agrees(dtype, run, theirs, case.problems(silent=False))


def finished(trainer, losses):
    found = {name: parameter.detach() for name, parameter in trainer.ae.named_parameters()}
    return found | {"losses": torch.stack(losses).detach().to(next(iter(found.values())).dtype)}


@pytest.mark.parametrize("name", CASES)
def test_trainer_classes(name):
    """fastsae's class of the same name, in a config instead of the library's, makes the accelerated trainer.

    These weights are loaded in the library's memory order after that, which is slower and as right.
    """
    case = CASES[name]
    ours = type(case)(getattr(drop_ins, case.trainer.__name__), case.options, case.names, case.own)
    problems = case.problems(silent=False)
    trainer, theirs = ours.build(problems[0]), case.build(problems[0])
    assert trainer.config == theirs.config
    assert isinstance(trainer, case.trainer)
    assert_agrees(torch.float32, ten_steps(ours, False), ten_steps(case, False), problems)
    fastsae.restore(trainer)
    assert (type(trainer), type(trainer.ae)) == (type(theirs), type(theirs.ae))


def changing(case):
    """Three steps of the library, then four accelerated, two in the library's memory order, and one restored."""

    def run(inputs):
        trainer = case.build(inputs)
        for step in range(10):
            if step == 3:
                fields = set(trainer.__dict__), set(trainer.optimizer.__dict__)
                step_before = trainer.optimizer.step
                fastsae.accelerate(trainer)
            if step == 7:
                for parameter in trainer.ae.parameters():
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
                assert served_by_fastsae(trainer)
            if step == 9:
                reasons = [reason for _, path, reason in record_of(trainer).calls if path != "fastsae"]
                assert len(reasons) == 1
                assert "memory order" in reasons[0]
                fastsae.restore(trainer)
                assert (set(trainer.__dict__), set(trainer.optimizer.__dict__)) == fields
                assert trainer.optimizer.step == step_before
                assert not any(group["fused"] for group in trainer.optimizer.param_groups)
            trainer.update(step, inputs["x"].roll(step, 0)[:29])
        return {name: parameter.detach() for name, parameter in trainer.ae.named_parameters()}

    return run


@pytest.mark.parametrize("name", CASES)
def test_accelerated_and_restored_in_the_middle_of_a_run(name):
    case = CASES[name]

    def unchanged(inputs):
        found = ten_steps(case, False)(inputs)
        return {name: value for name, value in found.items() if name != "losses"}

    assert_agrees(torch.float32, changing(case), unchanged, case.problems(silent=False))


@pytest.mark.parametrize("name", CASES)
def test_train_sae(name, tmp_path):
    """The library's loop, log and files: nothing that it logs makes activations dense, and its files are as ever."""
    case = CASES[name]
    given = {key: value for key, value in case.options.items() if key != "warmup_steps"}
    data = torch.randn(6, 37, D_IN)
    trainers = []

    def training(kind, folder):
        torch.manual_seed(0)
        config = {"trainer": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 0, "lm_name": "none"}
        config |= {"device": "cpu", "warmup_steps": 2, "sparsity_warmup_steps": 2, "steps": 6, "seed": 0} | given
        if case.is_topk:
            del config["sparsity_warmup_steps"]
        make = kind.__init__

        def noted(self, *args, **kwargs):
            make(self, *args, **kwargs)
            trainers.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "__init__", noted)
            options = {"verbose": True, "log_steps": 1, "save_dir": str(folder), "device": "cpu"}
            trainSAE(iter(data), [config], 6, normalize_activations=False, **options)

    training(case.trainer, tmp_path / "before")
    training(getattr(drop_ins, case.trainer.__name__), tmp_path / "after")
    assert served_by_fastsae(trainers[1])
    configs = [json.loads((tmp_path / run / "trainer_0" / "config.json").read_text()) for run in ("before", "after")]
    assert configs[0] == configs[1]
    if case.trainer in (JumpReluTrainer, PAnnealTrainer):
        return
    before, after = (load_dictionary(str(tmp_path / run / "trainer_0"), "cpu")[0] for run in ("before", "after"))
    assert type(before) is type(after)
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "relu", "gated", "jumprelu", "matryoshka"])
def test_from_pretrained(name, tmp_path):
    call = CALLS[name]
    sae = call.build(problems_of(call)[0])
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    kind = getattr(drop_ins, call.kind.__name__)
    options = {"normalize_decoder": False} if name == "relu" else {}
    loaded = kind.from_pretrained(str(tmp_path / "ae.pt"), **options)
    assert type(loaded) is kind
    x = torch.randn(7, D_IN)
    torch.testing.assert_close(loaded(x), sae(x))
    assert served_by_fastsae(loaded)


def test_resampled_latents():
    """StandardTrainer writes new directions over dead latents, and zeros over their Adam state."""
    case = CASES["standard"]
    options = case.options | {"resample_steps": 4, "warmup_steps": 2}
    case = type(case)(case.trainer, options, case.names, case.own)
    inputs = case.problems(silent=False)[0]
    inputs["b_enc"][:9] = -100.0
    runs = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        runs.append(ten_steps(case, accelerated)(inputs))
        assert (runs[-1]["encoder.bias"][:9] > -1).all()
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value)


@pytest.mark.parametrize(
    ("prepare", "options", "reason"),
    [
        (lambda sae: (sae.double(), torch.randn(7, D_IN).double()), {}, "float32 and bfloat16, not torch.float64"),
        (lambda sae: (sae.bfloat16(), torch.randn(7, D_IN)), {}, "the input is torch.float32"),
        (lambda sae: (sae, torch.randn(7, D_IN)), {"use_threshold": True}, "of the latents are active"),
    ],
    ids=["float64", "mixed", "dense"],
)
def test_what_falls_back_runs_the_library_and_says_why(prepare, options, reason, monkeypatch):
    monkeypatch.setattr(dictionaries, "MOST_DENSE", 0.12)
    sae, x = prepare(CALLS["topk"].build(problems_of(CALLS["topk"])[0]))
    results = []
    for accelerated in (False, True):
        if accelerated:
            fastsae.accelerate(sae)
        try:
            results.append(sae.encode(x, **options))
        except RuntimeError as error:
            results.append(torch.tensor(len(str(error))))
    assert_same_bits(*results)
    (((method, path, why), _),) = record_of(sae).calls.items()
    assert (method, path) == ("encode", "dictionary_learning")
    assert reason in why


def made(trainer, dict_class):
    sizes = {"steps": 9, "activation_dim": D_IN, "dict_size": D_SAE, "k": 2, "warmup_steps": 2}
    return trainer(dict_class=dict_class, layer=0, lm_name="none", device="cpu", **sizes)


class OwnDictionary(AutoEncoderTopK):
    pass


@pytest.mark.parametrize("kind", [CASES["topk"].trainer, drop_ins.TopKTrainer], ids=["library", "drop-in"])
def test_a_dictionary_of_ones_own_stays_as_it_is(kind):
    trainer = fastsae.accelerate(made(kind, OwnDictionary))
    assert (type(trainer), type(trainer.ae)) == (CASES["topk"].trainer, OwnDictionary)
    assert "not one of the library's" in record_of(trainer).why_not
    trainer.update(0, torch.randn(7, D_IN))
    fastsae.restore(trainer)
    assert record_of(trainer) is None
    assert "none of the library's classes" in record_of(fastsae.accelerate(trainer.ae)).why_not
    assert type(fastsae.restore(trainer.ae)) is OwnDictionary


@pytest.mark.parametrize("base", [CASES["topk"].trainer, drop_ins.TopKTrainer], ids=["library", "drop-in"])
def test_a_trainer_of_ones_own_stays_as_it_is(base):
    class Own(base):
        pass

    trainer = fastsae.accelerate(made(Own, AutoEncoderTopK))
    assert (type(trainer), type(trainer.ae)) == (Own, drop_ins.AutoEncoderTopK)
    assert (record_of(trainer).why_not is None) == (base is drop_ins.TopKTrainer)
    trainer.update(0, torch.randn(7, D_IN))
    fastsae.restore(trainer)
    assert (type(trainer), type(trainer.ae)) == (Own, AutoEncoderTopK)
    trainer.update(1, torch.randn(7, D_IN))


@pytest.mark.parametrize("name", CALLS)
def test_in_inference_mode(name):
    sae = CALLS[name].build(problems_of(CALLS[name])[0])
    x = torch.randn(7, D_IN)
    with torch.inference_mode():
        expected = sae(x, output_features=True)
        fastsae.accelerate(sae)
        for part, other in zip(sae(x, output_features=True), expected, strict=True):
            torch.testing.assert_close(part + 0, other)


def test_under_autocast():
    """In bfloat16 as the library; the products themselves stay more exact."""
    call = CALLS["topk, with its picks"]
    sae, x = call.build(problems_of(call)[0]), torch.randn(37, D_IN)
    exact, runs = sae(x), []
    for accelerated in (False, True):
        if accelerated:
            fastsae.accelerate(sae)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            runs.append((sae(x), *sae.encode(x, **call.options)))
    assert [part.dtype for part in runs[0]] == [part.dtype for part in runs[1]]
    assert served_by_fastsae(sae)
    errors = [(run[0] - exact).abs().max() for run in runs]
    assert errors[1] <= 2 * errors[0]
