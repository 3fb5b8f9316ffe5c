"""GatedSAE against SAELens' GatedTrainingSAE and GatedSAE, and dictionary_learning's GatedSAETrainer."""

import pytest
from dictionary_learning.trainers.gdm import GatedSAETrainer
from peers import dictionaries, saelens
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, draw, encoding, training
from sae_lens import GatedSAE, GatedSAEConfig, GatedTrainingSAE, GatedTrainingSAEConfig

import fastsae

OWN = "b_gate", "r_mag", "b_mag"
NAMES = dictionaries.LINEAR | {"b_gate": "gate_bias", "b_mag": "mag_bias", "b_dec": "decoder_bias"}


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_training_as_saelens(precision, apply_b_dec):
    """SAELens weighs by the norms of decoder rows and lets the auxiliary loss train the decoder too."""
    sae = fastsae.GatedSAE(
        D_IN,
        D_SAE,
        l1_coefficient=0.5,
        freeze_decoder=False,
        normalize_decoder=False,
        apply_b_dec_to_input=apply_b_dec,
        dtype=precision,
    )
    sae.sparsity_scale = 0.5
    peer = saelens.trained(
        GatedTrainingSAE,
        GatedTrainingSAEConfig,
        coefficients={"l1": 0.25},
        apply_b_dec_to_input=apply_b_dec,
        auxiliary="aux",
    )
    problems = [draw(seed, *OWN) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l1": 0.25, "aux": 1}), peer, problems)


def test_encoding_as_saelens(precision):
    sae = fastsae.GatedSAE(D_IN, D_SAE, dtype=precision).eval()
    peer = saelens.encoded(GatedSAE, GatedSAEConfig)
    problems = [draw(seed, *OWN) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: encoding(sae, inputs), peer, problems)


def test_training_as_dictionary_learning(precision):
    sae = fastsae.GatedSAE(D_IN, D_SAE, l1_coefficient=0.5, dtype=precision)
    sae.sparsity_scale = 0.25
    peer = dictionaries.trained(
        GatedSAETrainer,
        {"mse_loss": "mse", "sparsity_loss": "l1", "aux_loss": "aux"},
        NAMES,
        l1_penalty=0.5,
        sparsity_warmup_steps=8,
        step=2,
    )
    problems = [draw(seed, *OWN) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l1": 1, "aux": 1}), peer, problems)
