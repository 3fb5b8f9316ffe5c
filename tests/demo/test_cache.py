"""Where the language model is kept, and that it is kept whole or not at all."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from fastsae.demo.cache import cache_folder, fingerprint
from fastsae.demo.corpus import Corpus
from fastsae.demo.language_model import LanguageModelConfig
from fastsae.demo.subject import own_subject

TEXT = "".join(f"line {i} of {i * i}\n" for i in range(2000))
CORPUS = Corpus("a test", [TEXT], [TEXT[:2000]])
CONFIG = LanguageModelConfig(vocab_size=300, d_model=16, d_mlp=24, n_heads=2, context=16, steps=3, batch_windows=2)


def subject(cache, hook=None, corpus=CORPUS):
    return own_subject(corpus, CONFIG, hook, cache, Console(quiet=True))


def test_folder_is_given_or_named_by_the_environment_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path))
    assert cache_folder(Path("given")) == Path("given")
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FASTSAE_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fastsae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fastsae"


def test_fingerprint_changes_with_anything():
    prints = [
        fingerprint(["ab", "c"], {"x": 1}),
        fingerprint(["a", "bc"], {"x": 1}),
        fingerprint(["c", "ab"], {"x": 1}),
        fingerprint(["ab", "c"], {"x": 2}),
        fingerprint(["abc"], {"x": 1}),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(["ab", "c"], {"x": 1}) == prints[0]


def test_the_kept_model_is_the_trained_one_to_the_bit(tmp_path):
    trained, kept = subject(tmp_path), subject(tmp_path)
    weights = kept.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained.model.state_dict().items())
    assert torch.equal(trained.training, kept.training)
    assert torch.equal(trained.held_out, kept.held_out)
    assert len(list(tmp_path.iterdir())) == 1


def test_training_twice_gives_the_same_model_to_the_bit(tmp_path):
    a, b = subject(tmp_path / "a").model.state_dict(), subject(tmp_path / "b").model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_other_text_is_another_model(tmp_path):
    subject(tmp_path)
    subject(tmp_path, corpus=Corpus("another", [TEXT + "!"], [TEXT[:2000]]))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def break_off(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", break_off)
    with pytest.raises(KeyboardInterrupt):
        subject(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_named(tmp_path):
    subject(tmp_path)
    folder = next(tmp_path.iterdir())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{folder.name} holds no whole model: delete"):
        subject(tmp_path)


def test_an_unknown_hook_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"hook = 'mlp\.act'.*transformer\.h\.0\.mlp\.act"):
        subject(tmp_path, hook="mlp.act")
    assert list(tmp_path.iterdir()) == []
