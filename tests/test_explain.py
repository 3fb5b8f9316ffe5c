"""fastsae.explain tells which backend serves what, and fastsae.backend changes it."""

import collections
import importlib

import pytest
import torch

import fastsae
from fastsae.backends import dispatch, native, screen

explain = importlib.import_module("fastsae.explain")


def test_tells_what_would_run():
    explanation = fastsae.explain(torch.zeros(1, dtype=torch.float64))
    assert {choice.backend for op, choice in explanation.choices.items() if op != "transpose"} == {"torch"}
    assert "float64" in str(explanation)
    if native.cpu is not None:
        sae = fastsae.TopKSAE(4, 8, 2)
        assert {choice.backend for choice in fastsae.explain(sae).choices.values()} == {"cpu"}
        assert native.cpu.isa() in str(fastsae.explain(sae))


def test_tells_what_ran():
    sae = fastsae.TopKSAE(4, 8, 2)
    with fastsae.backend("torch"):
        sae(torch.randn(3, 4))
        assert fastsae.explain().choices["decode"].backend == "torch"
        assert "asked for by fastsae.backend" in str(fastsae.explain())


@pytest.mark.skipif(native.cpu is None, reason=native.why_not_cpu)
def test_tells_what_became_of_the_screened_rows(monkeypatch):
    monkeypatch.setattr(screen, "served", collections.Counter())
    monkeypatch.setattr(explain, "served", screen.served)
    monkeypatch.setenv("FASTSAE_SCREEN", "int16")
    x, W_enc = torch.randn(30, 16), torch.randn(16, 600)
    x[:2] = torch.inf
    with fastsae.backend("cpu"):
        fastsae.ops.encode_topk(x, W_enc, None, 4)
        fastsae.ops.encode_topk(x[2:], torch.ones(16, 600), None, 4)
    text = str(fastsae.explain())
    assert "28 screened (int16)" in text
    assert "2 every value computed (int16)" in text
    assert "28 overflowed (int16)" in text
    assert "28 every value computed (float32)" in text


def test_tells_the_precision_of_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_last", {"encode_topk": dispatch.Choice("triton", "")})
    for setting, precision in (("highest", "ieee"), ("high", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert f"float32 products of Triton's encoders in {precision}" in str(fastsae.explain())
    monkeypatch.setattr(dispatch, "_last", {"encode_topk": dispatch.Choice("cpu", "")})
    assert "Triton" not in str(fastsae.explain())


def test_override_ends_with_its_block():
    before = fastsae.explain(torch.zeros(1)).choices
    with fastsae.backend("torch"):
        assert fastsae.explain(torch.zeros(1)).choices["decode"].backend == "torch"
    assert fastsae.explain(torch.zeros(1)).choices == before


def test_override_by_environment(monkeypatch):
    monkeypatch.setenv("FASTSAE_BACKEND", "torch")
    assert fastsae.explain(torch.zeros(1)).choices["decode"].backend == "torch"
    monkeypatch.setenv("FASTSAE_BACKEND", "abacus")
    with pytest.raises(ValueError, match="FASTSAE_BACKEND='abacus'"):
        fastsae.TopKSAE(4, 8, 2)(torch.randn(3, 4))


def test_unknown_names_and_objects():
    with pytest.raises(ValueError, match="name='abacus': expected one of torch, cpu"):
        fastsae.backend("abacus")
    with pytest.raises(TypeError, match="obj is a str"):
        fastsae.explain("decode")


def test_a_backend_that_cannot_serve_says_why():
    sae = fastsae.TopKSAE(4, 8, 2, dtype=torch.float64)
    with fastsae.backend("cpu"), pytest.raises(ValueError, match="cannot run encode_topk"):
        sae(torch.randn(3, 4))
