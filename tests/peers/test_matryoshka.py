"""MatryoshkaSAE against SAELens' MatryoshkaBatchTopKTrainingSAE and dictionary_learning's trainer."""

import pytest
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from peers import dictionaries, saelens
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, dead_latents, draw, training
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig

import fastsae


@pytest.mark.parametrize("n_dead", [0, 6, 15])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_training_as_saelens(precision, n_dead, rescale, apply_b_dec):
    dead = dead_latents(n_dead)
    sae = fastsae.MatryoshkaSAE(
        D_IN,
        D_SAE,
        3.7,
        widths=[7, 40, D_SAE],
        rescale_by_decoder_norm=rescale,
        auxk_form="saelens",
        auxk_coefficient=0.25,
        reconstruction="mse",
        normalize_decoder=False,
        apply_b_dec_to_input=apply_b_dec,
        dead_after_tokens=1000,
        dtype=precision,
    )
    peer = saelens.trained(
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        k=3.7,
        matryoshka_widths=[7, 40, D_SAE],
        rescale_acts_by_decoder_norm=rescale,
        aux_loss_coefficient=0.25,
        apply_b_dec_to_input=apply_b_dec,
        dead=dead,
    )
    coefficients = {"mse": 1, "mse_7": 1, "mse_40": 1, "auxk": 0.25}
    problems = [draw(seed, "b_enc", dead=dead) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, coefficients, dead), peer, problems)


@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 1.0, 2.0]])
@pytest.mark.parametrize("n_dead", [0, 15])
def test_training_as_dictionary_learning(precision, weights, n_dead):
    """Its groups are what each width adds to the last, its loss the mean of theirs, and its own weights 1 / groups."""
    dead = dead_latents(n_dead)
    sae = fastsae.MatryoshkaSAE(
        D_IN,
        D_SAE,
        5,
        widths=[8, 24, 40, 80],
        width_weights=[(0.25 if weights is None else weights[i]) / 4 for i in range(4)],
        reconstruction="mse",
        dead_after_tokens=1000,
        dtype=precision,
    )
    peer = dictionaries.trained(
        MatryoshkaBatchTopKTrainer,
        {"auxk_loss": "auxk"},
        dead=dead,
        k=5,
        group_fractions=[0.1, 0.2, 0.2, 0.5],
        group_weights=weights,
    )
    problems = [draw(seed, "b_enc", dead=dead, dead_bias=0.0) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"auxk": 1}, dead), peer, problems)
