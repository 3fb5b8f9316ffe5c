"""What is shown of one latent: where it is strongest, and which tokens it makes likelier."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastsae.interpret.firings import Firings
from fastsae.interpret.logit_effects import logit_effects
from fastsae.saes import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Context around a snippet's strongest token: enough of the past to see the cause, a little of what follows.
_BEFORE, _AFTER = 16, 8
# Two snippets that agree in these many tokens up to the strongest are the same text again.
_SAME_BEFORE = 4
_EFFECT_WINDOWS = 4


@dataclass(frozen=True)
class Snippet:
    """Consecutive tokens and the latent's activation on each; `peak` is the place of the strongest."""

    tokens: list[str]
    activations: list[float]
    peak: int


@dataclass(frozen=True)
class TokenEffect:
    """A token and by how much the latent at its largest activation raises its logit, less the mean over tokens."""

    token: str
    logit: float


@dataclass(frozen=True)
class LatentPage:
    """One latent: its number, fraction of tokens it fires on, largest activation, snippets and raised tokens."""

    latent: int
    density: float
    max_activation: float
    snippets: list[Snippet]
    raised: list[TokenEffect]


def latent_pages(
    model: nn.Module,
    hook: str,
    sae: SAE,
    tokenizer: "PreTrainedTokenizerBase",
    firings: Firings,
    latents: Tensor,
    *,
    n_snippets: int = 8,
    n_tokens: int = 8,
) -> list[LatentPage]:
    """Pages of some latents [n], in their order, with up to `n_snippets` snippets and `n_tokens` raised tokens each.

    Snippets come from different windows and differ in wording. Logit effects are measured on the first windows, and
    only tokens that occur in some window are named: a model knows nothing of one it has never met.
    """
    if len(latents) == 0:
        return []
    largest = firings.maxima()[latents]
    directions = sae.W_dec[latents].detach().float().cpu() * (largest[:, None] / sae.activation_scale.item())
    effects = logit_effects(model, hook, directions, firings.windows[:_EFFECT_WINDOWS])
    occurring = firings.windows.unique()
    pages = []
    for latent, effect, strongest in zip(latents.tolist(), effects, largest.tolist(), strict=True):
        raised = effect[occurring].topk(min(n_tokens, len(occurring)))
        pages.append(
            LatentPage(
                latent=latent,
                density=firings.density[latent].item(),
                max_activation=strongest,
                snippets=_snippets(firings, latent, tokenizer, n_snippets),
                raised=[
                    TokenEffect(_text(tokenizer, token), logit)
                    for token, logit in zip(occurring[raised.indices].tolist(), raised.values.tolist(), strict=True)
                ],
            )
        )
    return pages


def _snippets(firings: Firings, latent: int, tokenizer: "PreTrainedTokenizerBase", n: int) -> list[Snippet]:
    values, places = firings.of(latent)
    length = firings.windows.shape[1]
    activation = dict(zip(places.tolist(), values.tolist(), strict=True))
    seen_windows, seen_words = set(), set()
    snippets: list[Snippet] = []
    for place in places[values.argsort(descending=True, stable=True)].tolist():
        if len(snippets) == n:
            break
        window, position = divmod(place, length)
        tokens = firings.windows[window].tolist()
        words = tuple(tokens[max(0, position - _SAME_BEFORE) : position + 1])
        if window in seen_windows or words in seen_words:
            continue
        seen_windows.add(window)
        seen_words.add(words)
        first, last = max(0, position - _BEFORE), min(length, position + _AFTER + 1)
        snippets.append(
            Snippet(
                tokens=[_text(tokenizer, token) for token in tokens[first:last]],
                activations=[activation.get(window * length + at, 0.0) for at in range(first, last)],
                peak=position - first,
            )
        )
    return snippets


def _text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)
