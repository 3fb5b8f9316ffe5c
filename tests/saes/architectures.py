"""Every architecture with every option, small, and its dense formula: what the tests of modules are held to."""

from collections.abc import Callable

import torch
from torch import Tensor

import fastsae
from fastsae.reference.losses import dense_loss

D_IN, D_SAE, N_TOKENS = 24, 96, 37

AUXK = {"dead_after_tokens": 1000}
JUMP = {"bandwidth": 0.5, "threshold_init": 0.3}
NOT_UNIT = {"normalize_decoder": False}

# Architecture -> its own options, each a way through its loss.
OWN: dict[str, list[dict]] = {
    "TopKSAE": [
        {"k": 5},
        {"k": 5, "relu": "before", "multi_topk": True},
        {"k": 30, "multi_topk": True},
        {"k": 4, "selection": "groupmax"},
        {"k": 5, "rescale_by_decoder_norm": True, **NOT_UNIT, **AUXK},
        {"k": 5, "auxk_form": "saelens", "auxk_coefficient": 1.0, "reconstruction": "mse", **AUXK},
        {"k": 5, "auxk": 50, "reconstruction": "mse_mean", **AUXK},
    ],
    "BatchTopKSAE": [
        {"k": 5},
        {"k": 3.7, **AUXK},
        {"k": 5, "rescale_by_decoder_norm": True, "auxk_form": "saelens", "reconstruction": "mse", **NOT_UNIT, **AUXK},
    ],
    "MatryoshkaSAE": [
        {"k": 5},
        {"k": 3.7, "widths": [7, 40, 96], "width_weights": [0.5, 0.0, 2.0], **AUXK},
        {"k": 5, "widths": [40], "reconstruction": "mse", "rescale_by_decoder_norm": True, **NOT_UNIT},
        {"k": 5, "widths": [96]},
    ],
    "ReLUSAE": [
        {},
        {"l1_weight": "none"},
        {"lp_norm": 0.5},
        {"lp_norm": 2.0, "l1_weight": "none", "reconstruction": "fvu"},
        {"penalty": "kl", "kl_target": 0.05, "kl_coefficient": 2.0},
        {"ghost_gradients": True, **AUXK},
    ],
    "JumpReLUSAE": [
        {**JUMP},
        {"log_threshold": True, "ste_to_input": True, **JUMP},
        {"penalty": "quadratic", "target_l0": 7, **JUMP},
        {"penalty": "target", "target_l0": 7, "ste_to_input": True, **JUMP},
        {"penalty": "tanh", "pre_act_coefficient": 0.3, "l0_coefficient": 0.1, **JUMP, **NOT_UNIT, **AUXK},
        {"penalty": "tanh", "pre_act_coefficient": 0.3, **JUMP, **AUXK},
    ],
    "GatedSAE": [{}, {"freeze_decoder": False, **NOT_UNIT}, {"aux_coefficient": 0.0, "l1_coefficient": 0.1}],
}

# Options that every architecture shares.
COMMON: list[dict] = [
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "scalar"},
    {"normalize_activations": "layer_norm"},
    {"d_out": 13},
    {"d_out": 13, "skip": True, "normalize_activations": "scalar"},
    {"sites": 3, "normalize_activations": "scalar"},
    {"sites": 2, "d_out": 13, "sites_out": 3, "skip": True},
]

SETTINGS = [(name, options) for name, cases in OWN.items() for options in cases] + [
    (name, cases[0] | options) for name, cases in OWN.items() for options in COMMON
]


def build(name: str, options: dict, dtype: torch.dtype = torch.float32) -> fastsae.SAE:
    """With parameters that matter everywhere (zeros would hide a term left out), and some latents dead."""
    sae = getattr(fastsae, name)(D_IN, D_SAE, **options, dtype=dtype)
    with torch.no_grad():
        for parameter, spread in (
            ("b_enc", 0.1), ("b_dec", 0.5), ("b_gate", 0.1), ("b_mag", 0.1), ("r_mag", 0.3), ("threshold", 0.1),
            ("log_threshold", 0.1), ("W_skip", 0.2),
        ):  # fmt: skip
            if getattr(sae, parameter, None) is not None:
                tensor = getattr(sae, parameter)
                draw = torch.rand_like if "threshold" in parameter else torch.randn_like
                tensor.add_(spread * draw(tensor))
        if not sae.normalize_decoder:
            sae.W_dec.mul_(0.5 + torch.rand(D_SAE, 1))
        if "dead_after_tokens" in options:
            dead = torch.arange(0, D_SAE, 7)
            sae.b_enc[dead] = -5.0
            sae.tokens_since_fired[dead] = sae.dead_after_tokens
        if sae.normalize_activations == "scalar":
            sae.set_activation_scale(0.7, 0.8 if sae.is_transcoder else None)
    return sae


def batch(sae: fastsae.SAE, n_tokens: int = N_TOKENS) -> tuple[Tensor, Tensor | None]:
    """x and, for a transcoder, its target."""
    x = torch.randn(n_tokens, *([sae.sites] if sae.sites else []), sae.d_in)
    if not sae.is_transcoder:
        return x, None
    return x, torch.randn(n_tokens, *([sae.sites_out] if sae.sites_out else []), sae.d_out)


def normalized(sae: fastsae.SAE, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the loss takes them, by the formulas, in the dtype of x."""
    if sae.normalize_activations == "scalar":
        x = x * sae.activation_scale.to(x.dtype)[..., None]
        target = target if target is None else target * sae.target_scale.to(x.dtype)[..., None]
    elif sae.normalize_activations == "layer_norm":
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    x = x.flatten(1)
    return x, x if target is None else target.flatten(1)


def dense(sae: fastsae.SAE) -> Callable[..., dict[str, Tensor]]:
    """The dense loss of (x, target, *parameters), in the order of `sae.parameters()`: its total and terms."""
    names = [name for name, _ in sae.named_parameters()]

    def run(x: Tensor, target: Tensor | None, *parameters: Tensor) -> dict[str, Tensor]:
        return dense_loss(sae, *normalized(sae, x, target), dict(zip(names, parameters, strict=True)))

    return run
