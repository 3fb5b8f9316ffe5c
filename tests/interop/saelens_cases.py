"""SAELens' SAEs before and after fastsae.accelerate: the classes, their options, and problems for them."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peers.comparison import D_IN, D_OUT, D_SAE, Results, draw, gradients

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    patch.setenv("HF_HUB_OFFLINE", "1")
    import sae_lens
    from peers import saelens

import fastsae
from fastsae.interop.record import record_of
from fastsae.interop.saelens.base import Fast

K = 9
WIDTHS = [16, 40, D_SAE]


@dataclass(frozen=True)
class Case:
    """An SAE with its options; a training class also has the coefficients of its losses."""

    name: str
    sae_class: type
    config_class: type
    options: dict[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ("b_enc",)
    coefficients: dict[str, float] = field(default_factory=dict)
    d_out: int = D_IN

    def __str__(self) -> str:
        return self.name

    def problem(self, seed: int, dead: torch.Tensor | None = None, silent: bool = True) -> Results:
        return draw(seed, *self.weights, dead=dead, d_out=self.d_out, silent=silent)

    def build(self, problem: Results) -> Any:
        """The library's SAE with the weights of a problem, in their dtype."""
        weights = {
            name: weight for name, weight in problem.items() if name in ("W_enc", "W_dec", "b_dec", *self.weights)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return saelens.build(self.sae_class, self.config_class, weights, **self.options)


def of(name: str) -> tuple[type, type]:
    return getattr(sae_lens, name), getattr(sae_lens, f"{name}Config")


def _training() -> list[Case]:
    topk, batch, matryoshka = (of(f"{name}TrainingSAE") for name in ("TopK", "BatchTopK", "MatryoshkaBatchTopK"))
    standard, gated, jumprelu = (of(f"{name}TrainingSAE") for name in ("Standard", "Gated", "JumpReLU"))
    plain = {"rescale_acts_by_decoder_norm": False}
    jump = {"jumprelu_bandwidth": 0.25, "target_l0": 7.0, "jumprelu_tanh_scale": 3.0}
    threshold, gate = ("b_enc", "threshold"), ("b_gate", "r_mag", "b_mag")
    l0, l1 = {"l0": 0.25}, {"l1": 0.25}
    nested = {"k": K + 0.5, "matryoshka_widths": WIDTHS}
    return [
        Case("topk", *topk, {"k": K, "aux_loss_coefficient": 0.25}),
        Case("topk-plain", *topk, {"k": K, **plain}),
        # Of some tokens fewer pre-activations are positive.
        Case("topk-many", *topk, {"k": 30}),
        Case("topk-apart", *topk, {"k": K, "apply_b_dec_to_input": False}),
        Case("batchtopk", *batch, {"k": K + 0.5}),
        Case("batchtopk-plain", *batch, {"k": K, "topk_threshold_lr": 0.2, **plain}),
        Case("batchtopk-many", *batch, {"k": 40}),
        Case("matryoshka", *matryoshka, nested),
        Case("matryoshka-plain", *matryoshka, {**nested, **plain}),
        Case("matryoshka-aux", *matryoshka, {**nested, "use_matryoshka_aux_loss": True}),
        Case("standard", *standard, coefficients=l1),
        Case("standard-lp", *standard, {"lp_norm": 2.0, "apply_b_dec_to_input": False}, coefficients=l1),
        Case("gated", *gated, weights=gate, coefficients=l1),
        Case("gated-apart", *gated, {"apply_b_dec_to_input": False}, gate, l1),
        Case("jumprelu", *jumprelu, jump, threshold, l0),
        Case("jumprelu-tanh", *jumprelu, {**jump, "jumprelu_sparsity_loss_mode": "tanh"}, threshold, l0),
        Case(
            "jumprelu-quadratic",
            *jumprelu,
            {**jump, "jumprelu_sparsity_loss_mode": "quadratic", "jumprelu_ste_to_input": True},
            threshold,
            l0,
        ),
        Case("jumprelu-pre-act", *jumprelu, {**jump, "pre_act_loss_coefficient": 0.25}, threshold, l0),
    ]


def _inference() -> list[Case]:
    transcoder = {"d_out": D_OUT, "apply_b_dec_to_input": False}
    return [
        Case("standard", *of("StandardSAE")),
        Case("topk", *of("TopKSAE"), {"k": K}),
        Case("topk-rescaled", *of("TopKSAE"), {"k": 30, "rescale_acts_by_decoder_norm": True}),
        Case("jumprelu", *of("JumpReLUSAE"), weights=("b_enc", "threshold")),
        Case("gated", *of("GatedSAE"), weights=("b_gate", "r_mag", "b_mag")),
        *(
            Case(name, *of(name), transcoder, weights, d_out=D_OUT)
            for name, weights in (
                ("Transcoder", ("b_enc",)),
                ("SkipTranscoder", ("b_enc", "W_skip")),
                ("JumpReLUTranscoder", ("b_enc", "threshold")),
                ("JumpReLUSkipTranscoder", ("b_enc", "threshold", "W_skip")),
            )
        ),
    ]


TRAINING, INFERENCE = _training(), _inference()


def named(cases: list[Case], *names: str) -> list[Case]:
    return [case for case in cases if case.name in names]


def accelerated(sae: Any) -> Any:
    fastsae.accelerate(sae)
    assert isinstance(sae, Fast), record_of(sae).why_not
    return sae


def train_step(sae: Any, case: Case, problem: Results, dead: torch.Tensor | None = None) -> Results:
    """Everything that a training step shows: outputs, losses, gradients, and what a trainer counts.

    All in the precision of x: counts are float32 and a threshold float64 whatever they were found with.
    """
    sae.train()
    out = sae.training_forward_pass(saelens.step_input(problem["x"], case.coefficients, dead))
    firing = out.feature_acts.bool().float()
    results = {
        "output": out.sae_out,
        "loss": out.loss,
        **out.losses,
        **{f"metric {name}": torch.as_tensor(value).to(sae.dtype) for name, value in out.metrics.items()},
        "fired": firing.sum(-2).to(sae.dtype),
        "L0": firing.sum(-1).to(sae.dtype),
    }
    out.loss.backward()
    weights = {name: weight for name, weight in problem.items() if name in dict(sae.named_parameters())}
    return {name: value.detach() for name, value in results.items()} | gradients(sae, weights)


def paths(sae: Any) -> set[tuple[str, str]]:
    """Each method that ran, and where."""
    return {(method, path) for method, path, _ in record_of(sae).calls}


def reasons(sae: Any, method: str) -> list[str]:
    """Why the library's own code ran."""
    return [reason for called, path, reason in record_of(sae).calls if called == method and path == "sae_lens"]


def weighted(*tensors: torch.Tensor) -> torch.Tensor:
    """One number that depends on every element."""
    return sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors)
