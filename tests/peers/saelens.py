"""SAELens as a peer (see comparison.py). It names and shapes its weights as fastsae does."""

from collections.abc import Callable
from typing import Any

from peers.comparison import D_IN, D_SAE, Results, forward, gradients, load
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

# Its names of terms, which come times their coefficients.
TERMS = {
    "mse_loss": "mse",
    "l1_loss": "l1",
    "l0_loss": "l0",
    "pre_act_loss": "pre_act",
}


def build(sae_class: type, config_class: type, weights: Results, **options: Any) -> Any:
    """An SAE of its with these weights, in their dtype."""
    dtype = str(weights["W_enc"].dtype).removeprefix("torch.")
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, dtype=dtype, device="cpu", **options))
    load(sae, weights)
    return sae


def step_input(x: Tensor, coefficients: dict[str, float] | None = None, dead: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients=coefficients or {},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


def trained(
    sae_class: type,
    config_class: type,
    *,
    coefficients: dict[str, float] | None = None,
    dead: Tensor | None = None,
    auxiliary: str = "auxk",
    **options: Any,
) -> Callable[[Results], Results]:
    """A peer with the results of comparison.training; `auxiliary` is fastsae's name of its auxiliary reconstruction."""

    def run(inputs: Results) -> Results:
        weights = {name: weight for name, weight in inputs.items() if name != "x"}
        sae = build(sae_class, config_class, weights, **options)
        out = sae.training_forward_pass(step_input(inputs["x"], coefficients, dead))
        out.loss.backward()
        names = TERMS | {"auxiliary_reconstruction_loss": auxiliary}
        terms = {
            names.get(name, name.removeprefix("inner_").replace("mse_loss", "mse")): t for name, t in out.losses.items()
        }
        everything = {"activations": out.feature_acts, "output": out.sae_out, "total": out.loss, **terms}
        return {name: value.detach() for name, value in everything.items()} | gradients(sae, weights)

    return run


def encoded(sae_class: type, config_class: type, **options: Any) -> Callable[[Results], Results]:
    """A peer with the results of comparison.forward."""

    def run(inputs: Results) -> Results:
        weights = {name: weight for name, weight in inputs.items() if name != "x"}
        sae = build(sae_class, config_class, weights, **options)

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            if hasattr(sae, "forward_with_activations"):
                output, activations = sae.forward_with_activations(x)
                return activations, output
            activations = sae.encode(x)
            return activations, sae.decode(activations)

        return forward(sae, both, inputs)

    return run
