"""SAEs attached to a HookedSAETransformer, before and after fastsae.accelerate."""

import pytest
import torch
from interop.saelens_cases import accelerated, of, paths, reasons
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

import fastsae
from fastsae.interop.record import record_of
from fastsae.interop.saelens import base

D_MODEL, D_SAE = 16, 64
RESID, MLP_IN, MLP_OUT = "blocks.0.hook_resid_post", "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
HEADS = "blocks.1.attn.hook_z"
FORWARD = ("forward in a model", "fastsae")


@pytest.fixture(autouse=True)
def _small_is_sparse(monkeypatch):
    """At these sizes a third of the latents is active."""
    monkeypatch.setattr(base, "MOST_DENSE", 1.0)


@pytest.fixture
def model():
    config = HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, n_ctx=8, d_head=8, n_heads=2, d_mlp=32, d_vocab=29, act_fn="gelu", seed=0
    )
    return HookedSAETransformer(config).eval()


@pytest.fixture
def tokens():
    return torch.arange(16).reshape(2, 8) % 29


def sae_at(hook, name="TopKSAE", **options):
    sae_class, config_class = of(name)
    metadata = SAEMetadata(hook_name=hook, hook_name_out=options.pop("hook_name_out", None))
    sae = sae_class(config_class(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata, **options))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sae


def saes():
    return [
        sae_at(RESID, k=5),
        sae_at(HEADS, "JumpReLUSAE", reshape_activations="hook_z"),
        sae_at(MLP_IN, "Transcoder", hook_name_out=MLP_OUT, d_out=D_MODEL, apply_b_dec_to_input=False),
    ]


@pytest.mark.parametrize("use_error_term", [False, True])
def test_run_with_saes(model, tokens, use_error_term):
    """SAEs that were accelerated alone, and are attached for one call."""
    chosen = saes()
    with torch.no_grad():
        expected = model.run_with_saes(tokens, saes=chosen, use_error_term=use_error_term)
        for sae in chosen:
            accelerated(sae)
        logits = model.run_with_saes(tokens, saes=chosen, use_error_term=use_error_term)
    torch.testing.assert_close(logits, expected)
    assert all(paths(sae) == {FORWARD} for sae in chosen)
    if use_error_term:
        torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-5)


def test_attached(model, tokens):
    """A whole model: what it holds is accelerated, and restored."""
    chosen = saes()
    for sae in chosen:
        model.add_sae(sae)
    with torch.no_grad():
        expected = model(tokens)
        assert fastsae.accelerate(model) is model
        logits = model(tokens)
    torch.testing.assert_close(logits, expected)
    assert all(paths(sae) == {FORWARD} for sae in chosen)
    assert str(fastsae.explain(model)).count("accelerated") == 3
    fastsae.restore(model)
    assert all(record_of(sae) is None for sae in chosen)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)


def test_gradients(model, tokens):
    sae, grads = saes()[0], []
    for accelerate in (False, True):
        if accelerate:
            accelerated(sae)
        sae.zero_grad()
        model.run_with_saes(tokens, saes=[sae]).square().sum().backward()
        grads.append([parameter.grad for parameter in sae.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_run_with_cache(model, tokens):
    """What is cached exists, by the library's code; without activations among it, fastsae runs."""
    sae = saes()[0]
    names = [f"{RESID}.hook_sae_acts_post", f"{RESID}.hook_sae_recons"]
    with torch.no_grad():
        expected, expected_cache = model.run_with_cache_with_saes(tokens, saes=[sae], names_filter=names)
        accelerated(sae)
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], names_filter=names)
        torch.testing.assert_close(logits, expected)
        for name in names:
            assert type(cache[name]) is torch.Tensor
            torch.testing.assert_close(cache[name], expected_cache[name])
        assert reasons(sae, "forward in a model")
        model.run_with_cache_with_saes(tokens, saes=[sae], names_filter=names[1:])
    assert FORWARD in paths(sae)


def test_interventions_and_excluded_tokens(model, tokens):
    sae = saes()[0]

    def run():
        def silence(acts, hook):
            acts[..., ::2] = 0
            return acts

        with torch.no_grad():
            intervened = model.run_with_hooks_with_saes(
                tokens, saes=[sae], fwd_hooks=[(f"{RESID}.hook_sae_acts_post", silence)]
            )
            return intervened, model.run_with_saes(tokens, saes=[sae], exclude_special_tokens=[3, 4])

    expected = run()
    accelerated(sae)
    torch.testing.assert_close(run(), expected)


def test_saes_that_are_not_accelerated(model, tokens):
    """In a process where others are."""
    first, second = saes()[:2]
    with torch.no_grad():
        expected = model.run_with_saes(tokens, saes=[second])
        accelerated(first)
        torch.testing.assert_close(model.run_with_saes(tokens, saes=[second]), expected, rtol=0, atol=0)
    assert record_of(second) is None
