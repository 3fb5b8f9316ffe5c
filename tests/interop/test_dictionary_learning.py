"""dictionary_learning's trainers and dictionaries before and after fastsae.accelerate, as installed.

"Before" is the library's own code, by which fastsae.testing measures what rounding may do.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from peers import dictionaries
from peers.comparison import SEEDS, assert_agrees, cast, dead_latents, draw, gradients, widening_to

import fastsae
from fastsae.interop.dictionary_learning import dictionaries as drop_ins
from fastsae.interop.record import record_of

RELU = dictionaries.LINEAR | {"b_dec": "bias"}
GATED = dictionaries.LINEAR | {"b_gate": "gate_bias", "b_mag": "mag_bias", "b_dec": "decoder_bias"}
GROUPS = [0.1, 0.2, 0.2, 0.5]
# Their sparsity is at half its weight in step 2.
WARM = {"sparsity_warmup_steps": 4, "warmup_steps": 2}


@dataclass(frozen=True)
class Case:
    """A trainer of the library's, its options, its names of fastsae's weights, and which it has beside three."""

    trainer: type
    options: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] | None = field(default_factory=lambda: dictionaries.LINEAR)
    own: tuple[str, ...] = ("b_enc",)
    is_topk: bool = False

    def build(self, inputs):
        weights = {name: weight for name, weight in inputs.items() if name != "x"}
        return dictionaries.build(self.trainer, weights, self.names, **self.options)

    def problems(self, **kwargs):
        return [draw(seed, *self.own, **kwargs) for seed in range(SEEDS)]


CASES = {
    "topk": Case(TopKTrainer, {"k": 5, "warmup_steps": 2}, is_topk=True),
    "batchtopk": Case(BatchTopKTrainer, {"k": 5, "warmup_steps": 2}, is_topk=True),
    "matryoshka": Case(
        MatryoshkaBatchTopKTrainer, {"k": 5, "group_fractions": GROUPS, "warmup_steps": 2}, None, is_topk=True
    ),
    "standard": Case(StandardTrainer, {"l1_penalty": 0.5, **WARM}, RELU),
    "april": Case(StandardTrainerAprilUpdate, {"l1_penalty": 0.5, **WARM}, RELU),
    "p_anneal": Case(PAnnealTrainer, {"initial_sparsity_penalty": 0.5, "p_end": 0.5, "anneal_start": 1, **WARM}, RELU),
    "gated": Case(GatedSAETrainer, {"l1_penalty": 0.5, **WARM}, GATED, ("b_gate", "r_mag", "b_mag")),
    "gated_anneal": Case(
        GatedAnnealTrainer,
        {"initial_sparsity_penalty": 0.5, "p_end": 0.5, "anneal_start": 1, **WARM},
        GATED,
        ("b_gate", "r_mag", "b_mag"),
    ),
    "jumprelu": Case(JumpReluTrainer, {"bandwidth": 0.3, "target_l0": 7, **WARM}, None, ("b_enc", "threshold")),
}


DTYPES = (torch.float32, torch.bfloat16)


def _id(case):
    return f"{case[0]}-{str(case[1])[6:]}"


@pytest.fixture(autouse=True)
def _codes_however_dense(monkeypatch):
    """These problems are small and dense; the rule that leaves such to the library has a test of its own."""
    monkeypatch.setattr(drop_ins, "MOST_DENSE", 1.0)


def served_by_fastsae(obj):
    """Every call of a dictionary, or of a trainer and its dictionary."""
    calls = record_of(obj).calls + (record_of(obj.ae).calls if hasattr(obj, "ae") else Counter())
    return calls and {path for _, path, _ in calls} == {"fastsae"}


def one_batch(case, accelerated, *, dead=None, step=2, threshold=None):
    """A loss, its log and every gradient, of fastsae.testing's form: a function of x and weights."""

    def run(inputs):
        x, weights = inputs["x"], {name: weight for name, weight in inputs.items() if name != "x"}
        trainer = case.build(inputs)
        if accelerated:
            fastsae.accelerate(trainer)
        if threshold is not None:
            trainer.threshold_start_step = -1
            trainer.ae.threshold.fill_(threshold)
        if dead is not None:
            trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
        with widening_to(x.dtype):
            log = trainer.loss(x, step=step, logging=True)
            total = trainer.loss(x, step=step)
            total.backward()
        found = {"output": log[1], "total": total}
        found |= {
            name: torch.tensor(value, dtype=x.dtype) for name, value in log[-1].items() if isinstance(value, float)
        }
        if threshold is not None:
            found["threshold"] = trainer.ae.threshold
        if accelerated:
            assert served_by_fastsae(trainer)
        # Reading activations makes them dense, which is noted.
        found["activations"] = log[2]
        # Some losses are float32 whatever they come from.
        found = {name: value.detach().to(x.dtype) for name, value in found.items()}
        return found | gradients(trainer.ae, weights, case.names)

    return run


# dictionary_learning's own JumpReluTrainer multiplies float32 by bfloat16, which torch refuses.
EVERY = [(name, dtype) for name in CASES for dtype in DTYPES if (name, dtype) != ("jumprelu", torch.bfloat16)]
every = pytest.mark.parametrize(("case", "dtype"), [(CASES[name], dtype) for name, dtype in EVERY], ids=map(_id, EVERY))
TOPK = [(name, dtype) for name, dtype in EVERY if CASES[name].is_topk]
every_topk = pytest.mark.parametrize(
    ("case", "dtype"), [(CASES[name], dtype) for name, dtype in TOPK], ids=map(_id, TOPK)
)


@every
def test_a_batch(case, dtype):
    assert_agrees(dtype, one_batch(case, True), one_batch(case, False), case.problems())


def test_jumprelu_in_bfloat16_is_the_error_that_it_was():
    problem = cast(CASES["jumprelu"].problems()[0], torch.bfloat16)
    for accelerated in (False, True):
        with pytest.raises(RuntimeError, match="dtype"):
            one_batch(CASES["jumprelu"], accelerated)(problem)


@every_topk
@pytest.mark.parametrize("n_dead", [6, 15])
def test_auxk(case, dtype, n_dead):
    """Dead latents near zero, some of them positive, below what a batch keeps; d_in // 2 = 10 of them are wanted."""
    dead = dead_latents(n_dead)
    problems = case.problems(dead=dead, dead_bias=0.0, silent=False)
    assert_agrees(dtype, one_batch(case, True, dead=dead), one_batch(case, False, dead=dead), problems)


@every_topk
@pytest.mark.parametrize("threshold", [-1.0, 0.5])
def test_running_threshold(case, dtype, threshold):
    runs = (one_batch(case, accelerated, threshold=threshold) for accelerated in (True, False))
    assert_agrees(dtype, *runs, case.problems(silent=False))


def ten_steps(case, accelerated):
    """Losses and weights of a run."""

    def run(inputs):
        weights = {name: weight for name, weight in inputs.items() if name != "x"}
        trainer = case.build(inputs)
        if accelerated:
            fastsae.accelerate(trainer)
        losses = []
        with widening_to(inputs["x"].dtype):
            for step in range(10):
                losses.append(trainer.update(step, inputs["x"].roll(step, 0)[:29]))
        if accelerated:
            assert served_by_fastsae(trainer)
        parameters = trainer.ae.named_parameters()
        found = {name: parameter.detach() for name, parameter in parameters}
        if losses[0] is not None:
            found["losses"] = torch.tensor(losses, dtype=inputs["x"].dtype)
        assert len(found) >= len(weights)
        return found

    return run


@every
def test_ten_steps(case, dtype):
    assert_agrees(dtype, ten_steps(case, True), ten_steps(case, False), case.problems(silent=False))
