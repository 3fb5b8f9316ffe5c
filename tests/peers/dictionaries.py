"""dictionary_learning as a peer (see comparison.py)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peers.comparison import D_IN, D_SAE, Results, gradients, load, widening_to
from torch import Tensor

# fastsae's names -> its names, of dictionaries made of nn.Linear.
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}


def build(trainer_class: type, weights: Results, names: Mapping[str, str] | None = None, **options: Any) -> Any:
    """A trainer of its, whose dictionary `trainer.ae` has these weights in their dtype."""
    needed = {"activation_dim": D_IN, "dict_size": D_SAE, "layer": 0, "lm_name": "none", "device": "cpu"}
    trainer = trainer_class(steps=10_000, **needed, **options)
    trainer.ae.to(weights["W_enc"].dtype)
    load(trainer.ae, weights, names)
    return trainer


def trained(
    trainer_class: type,
    terms: Mapping[str, str],
    names: Mapping[str, str] | None = None,
    *,
    coefficients: Mapping[str, float] | None = None,
    dead: Tensor | None = None,
    step: int = 0,
    **options: Any,
) -> Callable[[Results], Results]:
    """A peer with the results of comparison.training.

    `terms` maps its names of terms, which come without coefficients, to fastsae's.
    """

    def run(inputs: Results) -> Results:
        x, weights = inputs["x"], {name: weight for name, weight in inputs.items() if name != "x"}
        trainer = build(trainer_class, weights, names, **options)
        if dead is not None:
            trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
        with widening_to(x.dtype):
            log = trainer.loss(x, step=step, logging=True)
            total = trainer.loss(x, step=step)
            total.backward()
        found = {ours: torch.tensor(log.losses[its], dtype=x.dtype) for its, ours in terms.items()}
        # The second of its fields is the reconstruction, whatever its name.
        everything = {"activations": log.f, "output": log[1], "total": total, **found}
        return {name: value.detach() for name, value in everything.items()} | gradients(trainer.ae, weights, names)

    return run
