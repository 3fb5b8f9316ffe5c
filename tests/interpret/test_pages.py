"""What a latent's page holds, on a small random model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastsae
from fastsae.interpret import latent_pages, logit_effects, record_firings

HOOK = "transformer.h.0.mlp.act"


class Letters:
    """A tokenizer as far as pages need one: token n is `<n>`."""

    def decode(self, tokens, **_):
        return "".join(f"<{token}>" for token in tokens)


@pytest.fixture
def scene():
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=8, n_layer=1, n_head=2, n_inner=24)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    sae = fastsae.TopKSAE(24, 64, 4, normalize_activations="scalar").eval()
    sae.set_activation_scale(3.0)
    # Tokens from 40 on never occur.
    windows = torch.randint(0, 40, (30, 64))
    return model, sae, record_firings(model, HOOK, sae, windows)


@pytest.fixture
def pages(scene):
    model, sae, firings = scene
    return latent_pages(model, HOOK, sae, Letters(), firings, firings.counts.topk(3).indices, n_snippets=5)


def test_snippets_are_the_strongest_places_of_different_windows(scene, pages):
    _, _, firings = scene
    for page in pages:
        values, places = firings.of(page.latent)
        best = torch.zeros(30).scatter_reduce(0, places // 64, values, "amax").sort(descending=True).values
        peaks = [snippet.activations[snippet.peak] for snippet in page.snippets]
        assert peaks == pytest.approx(best[:5].tolist())
        assert page.max_activation == pytest.approx(peaks[0])
        assert page.density == firings.density[page.latent].item()


def test_a_snippet_shows_its_tokens_and_their_activations(scene, pages):
    _, _, firings = scene
    texts = ["".join(f"<{token}>" for token in window) for window in firings.windows.tolist()]
    for snippet in (snippet for page in pages for snippet in page.snippets):
        assert len(snippet.tokens) == len(snippet.activations)
        assert max(snippet.activations) >= snippet.activations[snippet.peak] > 0
        assert sum("".join(snippet.tokens) in text for text in texts) == 1


def test_raised_tokens_are_those_of_the_decoder_direction_at_its_largest(scene, pages):
    model, sae, firings = scene
    page = pages[0]
    direction = page.max_activation * sae.W_dec[page.latent].detach() / 3.0
    effect = logit_effects(model, HOOK, direction[None], firings.windows[:4])[0, :40]
    strongest = effect.topk(len(page.raised))
    assert [raised.token for raised in page.raised] == [f"<{token}>" for token in strongest.indices.tolist()]
    assert [raised.logit for raised in page.raised] == pytest.approx(strongest.values.tolist(), abs=1e-5)


def test_the_same_words_are_shown_once(scene):
    model, sae, firings = scene
    again = record_firings(model, HOOK, sae, firings.windows[:1].repeat(6, 1))
    page = latent_pages(model, HOOK, sae, Letters(), again, again.counts.topk(1).indices)[0]
    words = ["".join(snippet.tokens[max(0, snippet.peak - 4) : snippet.peak + 1]) for snippet in page.snippets]
    assert len(set(words)) == len(words) > 1


def test_no_latents_no_pages(scene):
    model, sae, firings = scene
    assert latent_pages(model, HOOK, sae, Letters(), firings, torch.empty(0, dtype=torch.int64)) == []
