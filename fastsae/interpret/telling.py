"""Which latents to show first."""

import torch
from torch import Tensor

from fastsae.interpret.firings import Firings

# A latent on more tokens than this says little of any one of them.
MAX_DENSITY = 0.01
# Fewer firings, or fewer windows of text, are too few to see what they have in common.
MIN_FIRINGS = 20
MIN_WINDOWS = 8

EXPLANATION = (
    f"Latents are ranked by largest activation times concentration. Concentration is the chance that two of the "
    f"latent's firings, drawn in proportion to their activation, are on the same token or are followed by the same "
    f"token, whichever is larger. Left out are latents that fire on more than {MAX_DENSITY:.0%} of the evaluation "
    f"tokens, fewer than {MIN_FIRINGS} times or in fewer than {MIN_WINDOWS} windows of text; of latents whose "
    f"activation falls mostly on the same token only the first is shown."
)


def most_telling(firings: Firings, n: int) -> Tensor:
    """Up to `n` latents worth a look, best first: int64. `EXPLANATION` says in words how they are ranked.

        score = max activation · max(Σ_t p_t², Σ_t q_t²)

    with p_t the share of a latent's activation that falls on token t, and q_t the share that is followed by token t.
    """
    tokens = firings.windows.reshape(-1)
    length = firings.windows.shape[1]
    vocabulary = int(tokens.max()) + 1
    latents, places = firings.latents, firings.places
    here, main_token = _concentration(latents, tokens[places], firings.values, firings.d_sae, vocabulary)
    followed = places % length != length - 1
    next_tokens = tokens[places[followed] + 1]
    after, _ = _concentration(latents[followed], next_tokens, firings.values[followed], firings.d_sae, vocabulary)
    score = firings.maxima() * torch.maximum(here, after)
    return _distinct(score.masked_fill(~_eligible(firings), 0), main_token, n)


def _eligible(firings: Firings) -> Tensor:
    """Latents that are neither too dense nor too rare to be read: bool [d_sae]."""
    n_windows, length = firings.windows.shape
    pairs = (firings.latents * n_windows + firings.places // length).unique()
    windows = torch.bincount(pairs // n_windows, minlength=firings.d_sae)
    return (firings.counts >= MIN_FIRINGS) & (windows >= MIN_WINDOWS) & (firings.density <= MAX_DENSITY)


def _concentration(
    latents: Tensor, tokens: Tensor, values: Tensor, d_sae: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Σ_t p_t² of each latent, float32 [d_sae], and the token with its largest share, int64 [d_sae]."""
    pairs, entry = (latents * vocabulary + tokens).unique(return_inverse=True)
    share = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, entry, values.double())
    latent, token = pairs // vocabulary, pairs % vocabulary
    total = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, latent, share)
    share /= total[latent]
    concentration = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, latent, share.square())
    # The last write of each latent stays: that of its largest share.
    order = share.argsort(stable=True)
    main_token = torch.full((d_sae,), -1)
    main_token[latent[order]] = token[order]
    return concentration.float(), main_token


def _distinct(score: Tensor, main_token: Tensor, n: int) -> Tensor:
    """The best `n` latents of positive score, no two with the same main token."""
    chosen: dict[int, int] = {}
    for latent in score.argsort(descending=True, stable=True).tolist():
        if len(chosen) == n or score[latent] <= 0:
            break
        chosen.setdefault(int(main_token[latent]), latent)
    return torch.tensor(list(chosen.values()), dtype=torch.int64)
