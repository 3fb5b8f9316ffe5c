"""What benchmarks/recovery.py trains: two sources of data whose features are known, three settings an architecture."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsae.synthetic import KnownFeatures, SparseDictionary, ToySuperposition


@dataclass(frozen=True)
class Data:
    """A source, the features to be found in it, and the width of the SAEs that look for them.

    l0: mean number of these features that a token has.
    """

    name: str
    source: KnownFeatures
    features: Tensor
    l0: float
    d_sae: int


def sparse_dictionary(seed: int) -> Data:
    """512 features in 128 dimensions, ten of them in a token."""
    source = SparseDictionary(512, 128, probability=10 / 512, seed=seed)
    return Data("dictionary", source, source.features, source.mean_l0, d_sae=1024)


def toy_superposition(seed: int) -> Data:
    """The toy model of superposition, its features ever less important; to be found are those that it keeps."""
    toy = ToySuperposition(400, 30, sparsity=0.99, importance=0.99 ** torch.arange(400.0), seed=seed)
    toy.train()
    kept = toy.represented
    return Data("toy", toy, toy.features[kept], (1 - toy.sparsity) * kept.sum().item(), d_sae=512)


DATA: dict[str, Callable[[int], Data]] = {"dictionary": sparse_dictionary, "toy": toy_superposition}


@dataclass(frozen=True)
class Setting:
    """An architecture's class in fastsae by name, what it is built with, and how it is trained.

    options: for the constructor. per_data: more of them, by the name of the data.
    lr: peak of Adam's rate, after a warm-up over 5% of the steps; it falls linearly over the last half. Published runs
        have a hundred times as many steps, so their rates are raised.
    sparsity_warmup: share of the steps over which the sparsity coefficients rise from 0.
    source: whose way of training it is.
    """

    architecture: str
    name: str
    source: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)
    per_data: dict[str, dict[str, Any]] = field(default_factory=dict)
    sparsity_warmup: float = 0.0

    def arguments(self, data: str) -> dict[str, Any]:
        """The constructor's options for one kind of data."""
        return self.options | self.per_data.get(data, {})


# A latent silent for so many tokens is dead to the auxiliary loss: 200 steps.
_DEAD = {"dead_after_tokens": 200 * 1024}
# About the true L0: a token of the toy model has 2.1 features that it keeps.
_K = {"dictionary": {"k": 10}, "toy": {"k": 3}}
# Norms of the toy model's tokens differ tenfold. BatchTopK gives its latents to the large ones, which are sums of
# features, and recovers 70 to 80% of them; with every token at the same norm, as Gao et al. 2024 feed TopK, 95%.
_EVEN_TOKENS = {"normalize_activations": "layer_norm"}
_SAELENS = _DEAD | {
    "rescale_by_decoder_norm": True,
    "auxk_form": "saelens",
    "auxk_coefficient": 1.0,
    "reconstruction": "mse",
    "normalize_decoder": False,
}
# From a start at unit norm half of the latents die before their thresholds have settled, and about 80% of the
# dictionary is recovered; from a start at norm 0.1 all of it.
_SMALL_START = {"init": "anthropic", "normalize_decoder": False}
_STEP = _SMALL_START | {"bandwidth": 0.5, "threshold_init": 0.5}


def _per_data(name: str, dictionary: float, toy: float) -> dict[str, dict[str, Any]]:
    return {"dictionary": {name: dictionary}, "toy": {name: toy}}


def _widths(*shares: float) -> dict[str, dict[str, Any]]:
    """Nested prefixes as shares of d_sae, beside k."""
    sizes = {"dictionary": 1024, "toy": 512}
    return {name: _K[name] | {"widths": tuple(int(share * size) for share in shares)} for name, size in sizes.items()}


SETTINGS = [
    Setting("TopKSAE", "openai", "Gao et al. 2024", 3e-3, _DEAD, _K),
    Setting("TopKSAE", "saelens", "SAELens: ranked by what latents write, squared error", 3e-3, _SAELENS, _K),
    Setting(
        "TopKSAE",
        "multi-topk",
        "sparsify: ReLU before selection, multi-TopK",
        3e-3,
        _DEAD | {"relu": "before", "multi_topk": True},
        _K,
    ),
    Setting("BatchTopKSAE", "bussmann", "Bussmann, Leask and Nanda 2024", 6e-3, _DEAD, _K),
    Setting("BatchTopKSAE", "saelens", "SAELens: ranked by what latents write, squared error", 6e-3, _SAELENS, _K),
    Setting(
        "BatchTopKSAE",
        "even-tokens",
        "Bussmann, Leask and Nanda 2024, on tokens normalised as in Gao et al. 2024",
        6e-3,
        _DEAD | _EVEN_TOKENS,
        _K,
    ),
    Setting(
        "MatryoshkaSAE",
        "five-groups",
        "Bussmann et al. 2025: five groups, as dictionary_learning has them; normalised tokens",
        6e-3,
        _DEAD | _EVEN_TOKENS,
        _widths(1 / 32, 3 / 32, 7 / 32, 15 / 32, 1),
    ),
    Setting(
        "MatryoshkaSAE",
        "doubling",
        "Bussmann et al. 2025: prefixes that double from an eighth on; normalised tokens",
        6e-3,
        _DEAD | _EVEN_TOKENS,
        _widths(1 / 8, 1 / 4, 1 / 2, 1),
    ),
    Setting(
        "MatryoshkaSAE",
        "two",
        "Bussmann et al. 2025: half of the latents, and all; normalised tokens",
        6e-3,
        _DEAD | _EVEN_TOKENS,
        _widths(1 / 2, 1),
    ),
    Setting(
        "ReLUSAE",
        "april-2024",
        "Anthropic, April 2024 update: L1 weighted by decoder norms",
        3e-3,
        {"l1_weight": "decoder_norm", "init": "anthropic"},
        _per_data("l1_coefficient", 3.0, 4.0),
        sparsity_warmup=0.05,
    ),
    Setting(
        "ReLUSAE",
        "monosemanticity",
        "Bricken et al. 2023: unit decoder rows, plain L1",
        3e-3,
        {"l1_weight": "none"},
        _per_data("l1_coefficient", 2.5, 4.0),
    ),
    Setting(
        "ReLUSAE",
        "ghost",
        "Anthropic, January 2024 update: ghost gradients for dead latents",
        3e-3,
        _DEAD | {"l1_weight": "none", "ghost_gradients": True},
        _per_data("l1_coefficient", 2.5, 4.0),
    ),
    Setting(
        "JumpReLUSAE",
        "step",
        "Rajamanoharan et al. 2024, L0 by a straight-through estimator; a wider window for fewer steps",
        6e-3,
        _STEP | {"penalty": "step"},
        _per_data("l0_coefficient", 1.5, 1.5),
        sparsity_warmup=0.25,
    ),
    Setting(
        "JumpReLUSAE",
        "target",
        "dictionary_learning, squared distance of L0 to a target; a wider window for fewer steps",
        6e-3,
        _STEP | {"penalty": "target", "l0_coefficient": 10.0},
        _per_data("target_l0", 9.0, 2.2),
        sparsity_warmup=0.5,
    ),
    Setting(
        "JumpReLUSAE",
        "january-2025",
        "Anthropic, January 2025 update, tanh penalty through log thresholds; these start at 1 for fewer steps",
        3e-3,
        _SMALL_START
        | {
            "penalty": "tanh",
            "tanh_scale": 4.0,
            "bandwidth": 2.0,
            "threshold_init": 1.0,
            "log_threshold": True,
            "ste_to_input": True,
            "pre_act_coefficient": 3e-6,
        },
        _per_data("l0_coefficient", 1.5, 0.7),
        sparsity_warmup=1.0,
    ),
    Setting(
        "GatedSAE",
        "paper",
        "Rajamanoharan et al. 2024: a frozen decoder in the auxiliary loss",
        3e-3,
        {},
        _per_data("l1_coefficient", 5.0, 8.0),
        sparsity_warmup=0.05,
    ),
    Setting(
        "GatedSAE",
        "saelens",
        "SAELens: the auxiliary loss trains the decoder too",
        3e-3,
        {"freeze_decoder": False},
        _per_data("l1_coefficient", 4.0, 6.0),
        sparsity_warmup=0.05,
    ),
    Setting(
        "GatedSAE",
        "slow-penalty",
        "Rajamanoharan et al. 2024, with a penalty that rises over half of the steps",
        3e-3,
        {},
        _per_data("l1_coefficient", 5.0, 8.0),
        sparsity_warmup=0.5,
    ),
]
