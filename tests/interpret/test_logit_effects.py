"""Logit effects against another way to the same: a direction before a linear map is a shift of that map's bias."""

import importlib

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastsae.interpret import logit_effects

HOOK = "transformer.h.0.mlp.act"


@pytest.fixture
def model():
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=24)
    return GPT2LMHeadModel(config).eval().requires_grad_(False).double()


def expected(model, direction, windows):
    plain = model(input_ids=windows).logits
    projection = model.transformer.h[0].mlp.c_proj
    before = projection.bias.clone()
    projection.bias += direction @ projection.weight
    change = (model(input_ids=windows).logits - plain).mean(dim=(0, 1))
    projection.bias.copy_(before)
    return change - change.mean()


def test_effect_is_that_of_a_shifted_bias(model):
    windows, directions = torch.randint(0, 50, (3, 12)), 5 * torch.randn(4, 24, dtype=torch.float64)
    found = logit_effects(model, HOOK, directions, windows)
    for effect, direction in zip(found, directions, strict=True):
        # Logits are compared in float32; effects are of the order of 1.
        torch.testing.assert_close(effect, expected(model, direction, windows).float(), atol=1e-6, rtol=1e-5)


def test_how_many_directions_run_at_once_changes_nothing(model, monkeypatch):
    windows, directions = torch.randint(0, 50, (3, 12)), torch.randn(5, 24, dtype=torch.float64)
    together = logit_effects(model, HOOK, directions, windows)
    module = importlib.import_module("fastsae.interpret.logit_effects")
    monkeypatch.setattr(module, "_MAX_LOGITS", 2 * 3 * 12 * 50)
    torch.testing.assert_close(logit_effects(model, HOOK, directions, windows), together, atol=1e-6, rtol=1e-5)
