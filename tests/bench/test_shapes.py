"""The registry of sizes and the problem that is made of one."""

import pytest
import torch

from fastsae.bench import SHAPES, Shape, get_shape, machine, shapes
from fastsae.bench.problem import Problem


def test_every_shape_is_of_a_model_and_has_its_source():
    widths = {"gpt2-small": 768, "pythia-70m": 512, "pythia-160m": 768, "gemma-2-2b": 2304, "llama-3-8b": 4096}
    for name, shape in SHAPES.items():
        (width,) = {width for model, width in widths.items() if name.startswith(model)}
        assert shape.name == name
        assert shape.d_in == width
        assert shape.source
    assert {"gpt2-small", "gemma-2-2b", "gemma-2-2b-65k", "llama-3-8b"} <= set(SHAPES)


def test_get_shape_overrides():
    shape = get_shape("gpt2-small", n_tokens=17, k=5)
    assert (shape.d_in, shape.d_sae, shape.k, shape.n_tokens) == (768, 24_576, 5, 17)
    assert shape.nnz == 85
    assert shape.parameters == 2 * 768 * 24_576


def test_a_server_takes_more_tokens(monkeypatch):
    monkeypatch.setattr(shapes.machine, "machine_class", lambda: "laptop")
    laptop = get_shape("gemma-2-2b").n_tokens
    monkeypatch.setattr(shapes.machine, "machine_class", lambda: "server")
    assert get_shape("gemma-2-2b").n_tokens > laptop == SHAPES["gemma-2-2b"].n_tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gpt5"}, "shape = 'gpt5': expected one of gpt2-small"),
        ({"name": "gpt2-small", "n_tokens": 0}, "n_tokens = 0: expected an int of at least 1"),
        ({"name": "gpt2-small", "k": 24_577}, "k = 24577: expected at most d_sae = 24576"),
    ],
)
def test_bad_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_shape(**arguments)


@pytest.mark.parametrize("inputs", ["mixture", "gaussian"])
def test_problem_is_the_same_each_time(tiny, inputs):
    before = torch.get_rng_state()
    first, second = (Problem(tiny, torch.float32, inputs) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.sae.W_enc, second.sae.W_enc)
    assert first.codes.nnz == tiny.nnz
    assert len(first.sample) == 64
    assert first.sample.unique().numel() == 64


def test_a_mixture_has_busy_and_idle_latents():
    counts = Problem(Shape("tiny", 64, 512, 8, 2_000, "tests"), torch.float32).codes.feature_counts()
    assert counts.max() > 20 * counts.double().median()


def test_bad_inputs(tiny):
    with pytest.raises(ValueError, match="inputs = 'noise': expected one of mixture, gaussian"):
        Problem(tiny, torch.float32, "noise")


def test_machine_says_where_it_ran():
    about = machine.describe()
    assert about["cores"] >= 1
    assert about["memory_bytes"] > 2**28
    assert set(machine.versions()) == {"fastsae", "torch", "triton", "python", "os"}
    commit = machine.commit()
    assert commit is None or (len(commit["hash"]) == 40 and isinstance(commit["dirty"], bool))
