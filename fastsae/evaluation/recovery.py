"""Whether an SAE has found the features that are there, where these are known (fastsae.synthetic)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastsae.codes import SparseCodes
from fastsae.evaluation.matching import maximum_weight_matching

# Cosines held at once: 64 MiB of float32.
_COSINES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Recovery:
    """What `feature_recovery` returns; tensors are on the CPU.

    threshold: the cosine from which a feature counts as found.
    best_cosine: the largest cosine of each feature with any latent, float [n_features].
    best_latent: the latent that has it (the lowest of several), int64 [n_features]; features may share one.
    matched_latent: the latent that each feature has for itself, int64 [n_features], -1 for none.
    """

    threshold: float
    best_cosine: Tensor
    best_latent: Tensor
    matched_latent: Tensor

    @property
    def mmcs(self) -> float:
        """Mean over features of the largest cosine with any latent: the mean max cosine similarity."""
        return self.best_cosine.double().mean().item()

    @property
    def recovered(self) -> Tensor:
        """Whether some latent comes as near to the feature as the threshold: bool [n_features]."""
        return self.best_cosine >= self.threshold

    @property
    def recovered_fraction(self) -> float:
        """Fraction of features recovered."""
        return self.recovered.double().mean().item()

    @property
    def matched_fraction(self) -> float:
        """Fraction of features with a latent of their own; below `recovered_fraction` where features share one."""
        return (self.matched_latent >= 0).double().mean().item()


@torch.no_grad()
def feature_recovery(features: Tensor, dictionary: Tensor, threshold: float = 0.9, *, signed: bool = True) -> Recovery:
    """How near the latents of a dictionary come to features that are known.

        cos_fj = ⟨features_f, dictionary_j⟩ / (‖features_f‖ ‖dictionary_j‖)
        best_f = max_j cos_fj,  mmcs = mean_f best_f,  recovered_f = best_f >= threshold

    The matching gives each feature at most one latent and each latent at most one feature, among pairs with cos_fj >=
    threshold, so that the sum of cosines is the greatest possible (exactly; fastsae.evaluation.matching). Lengths do
    not matter; a row of zeros has cosine 0 with everything. Cosines are float32 (float64 if an argument is), and few
    rows of them are held at a time.

    Args:
        features: [n_features, d], floating.
        dictionary: [d_sae, d], floating, on the same device; an SAE's W_dec.
        threshold: in (0, 1].
        signed: False takes |cos_fj|, for dictionaries whose codes may be negative.

    Raises:
        TypeError: an argument that is no floating tensor.
        ValueError: shapes that do not fit or are empty, values that are not finite, a threshold outside (0, 1].

    Source: Sharkey, Braun and Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """
    _check(features, dictionary, threshold)
    best_cosines, best_latents, rows, columns, weights = [], [], [], [], []
    for begin, cosines in _cosines(features, dictionary):
        cosines = cosines if signed else cosines.abs()
        best = cosines.max(dim=1)
        best_cosines.append(best.values)
        best_latents.append(best.indices)
        row, column = (cosines >= threshold).nonzero(as_tuple=True)
        rows.append(row + begin)
        columns.append(column)
        weights.append(cosines[row, column])
    edges = (torch.cat(part).cpu().numpy() for part in (rows, columns, weights))
    matched = maximum_weight_matching(*edges, len(features), len(dictionary))
    return Recovery(threshold, torch.cat(best_cosines).cpu(), torch.cat(best_latents).cpu(), torch.from_numpy(matched))


@dataclass(frozen=True)
class CodeRecovery:
    """What `code_recovery` returns: tokens counted for each feature, int64 [n_features], on the CPU.

    present: the feature is active in the truth. fired: its latent is active. both: both are, in the same token.
    """

    present: Tensor
    fired: Tensor
    both: Tensor

    @property
    def precision(self) -> Tensor:
        """both / fired, float64 [n_features]; NaN where the latent never fires or there is none."""
        return self.both.double() / self.fired

    @property
    def recall(self) -> Tensor:
        """both / present, float64 [n_features]; NaN where the feature never occurs."""
        return self.both.double() / self.present


@torch.no_grad()
def code_recovery(recovery: Recovery, true: SparseCodes, learned: SparseCodes) -> CodeRecovery:
    """Whether each feature's own latent (`recovery.matched_latent`) fires where the feature is active.

    Args:
        recovery: of the features that `true` is over and the dictionary that `learned` is over.
        true, learned: codes of the same tokens in the same order; an entry of value 0 is not active.

    Raises ValueError where the numbers of tokens, features or latents do not fit.
    """
    n_features, matched = len(recovery.matched_latent), recovery.matched_latent
    if true.n_tokens != learned.n_tokens:
        raise ValueError(f"true has {true.n_tokens} tokens and learned {learned.n_tokens}: expected the same tokens")
    if true.d_sae != n_features or int(matched.max()) >= learned.d_sae:
        raise ValueError(
            f"true is over {true.d_sae} features and learned over {learned.d_sae} latents, recovery of {n_features} "
            f"features names latent {int(matched.max())}: expected the codes of what recovery compared"
        )
    feature_of = torch.full((learned.d_sae,), -1)
    has_latent = matched >= 0
    feature_of[matched[has_latent]] = has_latent.nonzero()[:, 0]
    tokens, features = _active(true)
    fired_tokens, latents = _active(learned)
    fired_features = feature_of[latents]
    ours = fired_features >= 0
    fired_tokens, fired_features = fired_tokens[ours], fired_features[ours]
    hits = torch.isin(tokens * n_features + features, fired_tokens * n_features + fired_features)
    counted = (features, fired_features, features[hits])
    return CodeRecovery(*(torch.bincount(part, minlength=n_features) for part in counted))


def _active(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """Token and latent of each entry that is not zero."""
    active = codes.values != 0
    return codes.tokens()[active].cpu(), codes.indices[active].long().cpu()


def _cosines(features: Tensor, dictionary: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of the cosines [n_features, d_sae], each after the number of its first row."""
    wide = torch.float64 if torch.float64 in (features.dtype, dictionary.dtype) else torch.float32
    directions = functional.normalize(dictionary.to(wide), dim=1)
    n_rows = max(1, _COSINES_AT_ONCE // len(dictionary))
    for begin in range(0, len(features), n_rows):
        yield begin, functional.normalize(features[begin : begin + n_rows].to(wide), dim=1) @ directions.T


def _check(features: Tensor, dictionary: Tensor, threshold: float) -> None:
    for name, given in (("features", features), ("dictionary", dictionary)):
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError(f"{name} is {getattr(given, 'dtype', type(given).__name__)}: expected a floating tensor")
        if given.dim() != 2 or given.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(given.shape)}: expected [rows, d], neither of them 0")
        if not given.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: expected finite directions")
    if features.shape[1] != dictionary.shape[1]:
        raise ValueError(
            f"features are of width {features.shape[1]} and the dictionary of {dictionary.shape[1]}: expected the same"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold = {threshold!r}: expected a cosine in (0, 1]")
