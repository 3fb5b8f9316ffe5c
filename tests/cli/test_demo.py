"""The demo on a tiny budget: what it writes, that it repeats to the bit, and that text stays text."""

import json

import pytest
import torch
from typer.testing import CliRunner

import fastsae
from fastsae.cli import app

TEXT = "\n".join(
    f"def function_{i}(self, value):\n    <script>alert({i})</script> & return self.value[{i % 7}] + {i * i}\n"
    for i in range(1500)
)
BUDGET = ["--lm-steps", "3", "--steps", "6", "--batch-size", "128", "--eval-tokens", "2000", "--k", "8"]
BUDGET += ["--d-sae", "256", "--latents", "5", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(folder, *arguments):
    arguments = ["demo", "--text", str(folder / "text.txt"), "--cache", str(folder / "cache"), *BUDGET, *arguments]
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def first(folder):
    result = run(folder, "--out", str(folder / "first"))
    assert result.exit_code == 0, result.output
    return folder / "first"


def test_report_has_every_figure(first):
    report = json.loads((first / "report.json").read_text())
    figures = ("loss_recovered", "explained_variance", "l0", "dead_fraction", "step_seconds", "dense_step_seconds")
    assert all(isinstance(report[name], float) for name in figures)
    assert report["seed"] == 0
    assert "torch" in json.dumps(report["versions"])
    assert 0 <= report["dead_fraction"] <= 1
    assert report["l0"] <= 8


def test_page_stands_alone_and_text_stays_text(first):
    page = (first / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page or "&lt;" in page
    for reference in ("http://", "https://", "src=", "@import", "url("):
        assert reference not in page, reference


def test_saved_sae_takes_raw_activations(first):
    sae = fastsae.load(first / "sae")
    assert (sae.d_in, sae.d_sae, sae.k) == (512, 256, 8)
    assert sae.activation_scale != 1
    assert sae(torch.rand(3, 512)).sae_out.shape == (3, 512)


def test_same_seed_same_bits_with_the_model_from_the_cache(folder, first):
    result = run(folder, "--out", str(folder / "second"))
    assert result.exit_code == 0, result.output
    a, b = fastsae.load(first / "sae").state_dict(), fastsae.load(folder / "second/sae").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    result = run(folder, "--out", str(folder / "third"), "--seed", "1")
    assert result.exit_code == 0, result.output
    assert not torch.equal(fastsae.load(folder / "third/sae").W_dec, a["W_dec"])


def test_a_given_model_and_hook(folder, first):
    own = next(path.parent for path in (folder / "cache").rglob("model.safetensors"))
    out = str(folder / "given")
    result = run(folder, "--out", out, "--model", str(own), "--hook", "transformer.h.0.mlp.act")
    assert result.exit_code == 0, result.output
    result = run(folder, "--out", out, "--model", str(own), "--hook", "transformer.h.0.mlp.axt")
    assert result.exit_code == 1
    assert "transformer.h.0.mlp.act" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "/nowhere"], "/nowhere does not exist"),
        (["--k", "9999"], "--k 9999"),
        (["--steps", "5", "--tokens", "5000"], "expected one of them"),
        (["--lr", "0"], "--lr 0"),
    ],
    ids=["text", "k", "steps", "lr"],
)
def test_bad_choices_are_one_line(folder, first, arguments, message):
    result = run(folder, "--out", str(folder / "bad"), *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (folder / "bad").exists()


def test_stopping_leaves_nothing_half_written(folder, first, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    monkeypatch.setattr("fastsae.demo.experiment.latent_pages", stop)
    for out in (first, folder / "stopped"):
        result = run(folder, "--out", str(out), "--seed", "7")
        assert result.exit_code == 130
        assert "Stopped" in result.output
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert not (folder / "stopped").exists()


def test_missing_packages_are_named_with_the_way_to_get_them(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(folder)
    assert result.exit_code == 1
    assert 'pip install "fastsae[demo]"' in result.output
