"""`fastsae train` and `fastsae eval` on a small dictionary, from files to a table."""

import json

import numpy
import pytest
import torch
import typer
from typer.testing import CliRunner

import fastsae.evaluation
import fastsae.training
from fastsae.cli.eval import eval as eval_command
from fastsae.cli.train import train as train_command
from fastsae.testing import assert_same_bits

OPTIONS = ["--d-sae", "64", "--k", "3", "--batch-size", "128", "--lr", "0.01", "--device", "cpu", "--log-every", "20"]


@pytest.fixture
def run():
    app = typer.Typer()
    app.command("train")(train_command)
    app.command("eval")(eval_command)

    def run(*arguments, exit_code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == exit_code, result.output
        return result.output

    return run


@pytest.fixture
def activations(tmp_path):
    """Sums of 3 of 32 unit directions around a mean far from zero."""
    directions = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    active = torch.rand(8192, 32).topk(3).indices
    x = (directions[active] * (torch.rand(8192, 3, 1) + 0.5)).sum(dim=1) + 5
    path = tmp_path / "activations.npy"
    numpy.save(path, x.numpy())
    return path


@pytest.mark.parametrize("flags", [[], ["--fused"]], ids=["Adam", "FusedAdam"])
def test_train_then_eval(run, activations, tmp_path, flags):
    out = tmp_path / "sae"
    printed = json.loads(run("train", activations, "--out", out, *OPTIONS, "--steps", 150, *flags).splitlines()[-1])
    assert (printed["steps"], printed["tokens"]) == (150, 150 * 128)
    found = json.loads(run("eval", out, activations, "--json"))
    assert found["tokens"] == 8192
    assert found["explained_variance"] == 1 - found["fvu"] > 0.8
    assert 2 < found["l0"] <= 3
    metrics = fastsae.evaluation.evaluate(fastsae.load(out), torch.from_numpy(numpy.load(activations)))
    assert found["dead_fraction"] == metrics.dead_fraction < 0.2
    table = run("eval", out, activations, "--tokens", 1000)
    assert "explained variance" in table
    assert "1,000" in table


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("relu", ["--option", "l1_coefficient=0.1", "--sparsity-warmup-steps", "20", "--resample-every", "50"]),
        ("jumprelu", ["--option", "penalty=target", "--option", "target_l0=3", "--option", "l0_coefficient=1"]),
        ("batchtopk", ["--k", "2.5"]),
        ("matryoshka", ["--k", "3", "--option", "widths=[16, 64]"]),
        ("gated", ["--option", "l1_coefficient=0.1", "--fused"]),
    ],
)
def test_every_architecture(run, activations, tmp_path, architecture, options):
    out = tmp_path / "sae"
    common = OPTIONS[:2] + OPTIONS[4:]
    run("train", activations, "--out", out, *common, "--architecture", architecture, *options, "--steps", 150)
    assert fastsae.load(out).architecture == architecture
    assert json.loads(run("eval", out, activations, "--json"))["explained_variance"] > 0.8


def test_options_of_an_architecture_are_checked(run, activations, tmp_path):
    def message(*arguments):
        return run("train", activations, "--out", tmp_path / "sae", "--d-sae", 64, *arguments, exit_code=1)

    assert "k = None with architecture = topk: expected a number" in message()
    assert "k = 3.0 with architecture = relu: expected none" in message("--k", 3, "--architecture", "relu")
    assert "architecture = 'sparse': expected one of" in message("--architecture", "sparse")
    assert "NAME=VALUE" in message("--k", 3, "--option", "relu")
    assert "expected options of TopKSAE" in message("--k", 3, "--option", "l1_coefficient=1")


def test_resume_is_the_same_run(run, activations, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*OPTIONS, "--steps", 20, "--checkpoint-every", 10]
    run("train", activations, "--out", whole, *options)

    train_step = fastsae.training.Trainer._train_step

    def interrupted(trainer, *batch):
        if trainer.step == 15:
            raise KeyboardInterrupt
        return train_step(trainer, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastsae.training.Trainer, "_train_step", interrupted)
        run("train", activations, "--out", cut, *options, exit_code=130)
    assert not (cut / "model.safetensors").exists()
    assert "pass --resume" in run("train", activations, "--out", cut, *options, exit_code=1)
    other = run("train", activations, "--out", cut, *options, "--resume", "--seed", 1, exit_code=1)
    assert "seed = 1: expected 0" in other
    run("train", activations, "--out", cut, *options, "--resume")
    expected = fastsae.load(whole).state_dict()
    for name, tensor in fastsae.load(cut).state_dict().items():
        assert_same_bits(tensor, expected[name])
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, cut)]
    assert [[record["step"] for record in log] for log in logs] == [[1, 10, 20]] * 2
    again = json.loads(run("train", activations, "--out", cut, *options, "--resume"))
    assert again == {"out": str(cut), "steps": 20, "tokens": 20 * 128}
    assert [record["total"] for record in logs[0]] == [record["total"] for record in logs[1]]


def test_bad_input_is_one_line(run, activations, tmp_path):
    def message(*arguments):
        output = run(*arguments, exit_code=1)
        assert "Traceback" not in output
        return output

    out = tmp_path / "sae"
    assert "Error: k = 3: expected" in message("train", activations, "--out", out, "--d-sae", 2, "--k", 3)
    assert "nowhere.npy does not exist" in message("train", tmp_path / "nowhere.npy", "--out", out, *OPTIONS)
    assert not out.exists(), "a run that never began should leave nothing"
    assert "holds no SAE that fastsae knows" in message("eval", tmp_path, activations)


def test_eval_of_constant_activations(run, tmp_path):
    fastsae.TopKSAE(4, 8, 2).save_pretrained(tmp_path / "sae")
    numpy.save(tmp_path / "x.npy", numpy.ones((5, 4), dtype=numpy.float32))
    assert json.loads(run("eval", tmp_path / "sae", tmp_path / "x.npy", "--json"))["fvu"] is None
