"""ReLUSAE against SAELens' StandardTrainingSAE and dictionary_learning's StandardTrainer and its April update."""

import pytest
from dictionary_learning import AutoEncoder
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from peers import dictionaries, saelens
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, dead_latents, draw, gradients, load, training
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

import fastsae

NAMES = dictionaries.LINEAR | {"b_dec": "bias"}


@pytest.mark.parametrize("lp_norm", [1.0, 2.0, 0.5, 3.0])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_training_as_saelens(precision, lp_norm, apply_b_dec):
    sae = fastsae.ReLUSAE(
        D_IN, D_SAE, l1_coefficient=0.5, lp_norm=lp_norm, apply_b_dec_to_input=apply_b_dec, dtype=precision
    )
    sae.sparsity_scale = 0.5
    # SAELens' trainer passes the coefficient as far as it is warmed up.
    peer = saelens.trained(
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        coefficients={"l1": 0.25},
        lp_norm=lp_norm,
        apply_b_dec_to_input=apply_b_dec,
    )
    problems = [draw(seed, "b_enc") for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l1": 0.25}), peer, problems)


@pytest.mark.parametrize(
    ("trainer", "l1_weight"), [(StandardTrainer, "none"), (StandardTrainerAprilUpdate, "decoder_norm")]
)
@pytest.mark.parametrize(("warmup", "step", "scale"), [(None, 0, 1.0), (8, 2, 0.25), (8, 0, 0.0)])
def test_training_as_dictionary_learning(precision, trainer, l1_weight, warmup, step, scale):
    sae = fastsae.ReLUSAE(D_IN, D_SAE, l1_coefficient=0.5, l1_weight=l1_weight, dtype=precision)
    sae.sparsity_scale = scale
    peer = dictionaries.trained(
        trainer,
        {"mse_loss": "mse", "sparsity_loss": "l1"},
        NAMES,
        l1_penalty=0.5,
        sparsity_warmup_steps=warmup,
        step=step,
    )
    problems = [draw(seed, "b_enc") for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l1": 1}), peer, problems)


def test_ghost_gradients_on_those_of_dictionary_learning(precision):
    """dictionary_learning has the ghosts' reconstruction, and no more a loss of it, nor has SAELens: the loss here is
    the one that both had (Jermyn and Templeton, January 2024).
    """
    dead = dead_latents(6)
    sae = fastsae.ReLUSAE(
        D_IN, D_SAE, l1_coefficient=0.0, l1_weight="none", ghost_gradients=True, dead_after_tokens=1000, dtype=precision
    )

    def peer(inputs):
        inputs = dict(inputs)
        x = inputs.pop("x")
        its = AutoEncoder(D_IN, D_SAE)
        load(its, inputs, NAMES)
        output, ghosts, activations = its(x, output_features=True, ghost_mask=dead)
        mse = (output - x).square().sum(dim=1).mean()
        left = (x - output).detach()
        halves = ghosts * (left.norm(dim=1) / (1e-6 + 2 * ghosts.norm(dim=1))).detach()[:, None]
        missed = (halves - left).square().sum(dim=1)
        ghost = (missed * (left.square().sum(dim=1) / (1e-6 + missed)).detach()).mean()
        total = mse + ghost
        total.backward()
        results = {"activations": activations, "output": output, "total": total, "mse": mse, "ghost": ghost}
        return {name: value.detach() for name, value in results.items()} | gradients(its, inputs, NAMES)

    problems = [draw(seed, "b_enc", dead=dead, silent=False) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "ghost": 1}, dead), peer, problems)
