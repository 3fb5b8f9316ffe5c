"""Loss recovered on a small random transformer: against a model changed by hand, and its two ends."""

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

import fastsae
from fastsae.evaluation import loss_recovered

HOOK = "transformer.h.0.mlp.act"


@pytest.fixture
def model():
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, n_inner=24)
    config.activation_function = "relu"
    return GPT2LMHeadModel(config).eval()


class Identity(torch.nn.Module):
    """Stands in for an SAE that reconstructs perfectly, or not at all."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return fastsae.SAEOutput(self.factor * x, None)


def windows():
    return torch.randint(0, 50, (5, 12))


def test_a_perfect_sae_recovers_all_and_zeros_nothing(model):
    tokens = windows()
    perfect = loss_recovered(model, HOOK, Identity(1.0), tokens)
    assert perfect.ce_sae == pytest.approx(perfect.ce_original, rel=1e-6)
    assert perfect.fraction == pytest.approx(1.0, abs=1e-4)
    nothing = loss_recovered(model, HOOK, Identity(0.0), tokens)
    assert nothing.ce_sae == nothing.ce_zero
    assert nothing.fraction == 0.0


@torch.no_grad()
def test_original_loss_is_the_models_own(model):
    tokens = windows()
    found = loss_recovered(model, HOOK, Identity(1.0), tokens)
    logits = model(input_ids=tokens).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found.ce_original == pytest.approx(expected.item(), rel=1e-5)


def test_the_model_is_left_as_it_was(model):
    tokens = windows()
    before = model(input_ids=tokens).logits
    loss_recovered(model, HOOK, fastsae.TopKSAE(24, 48, 3), tokens)
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_an_unknown_module_is_named_with_near_ones(model):
    with pytest.raises(ValueError, match=r"hook = 'transformer.h.0.mlp.acts'.*transformer\.h\.0\.mlp\.act"):
        loss_recovered(model, "transformer.h.0.mlp.acts", fastsae.TopKSAE(24, 48, 3), windows())
