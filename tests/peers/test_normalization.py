"""normalize_activations and normalize_decoder against SAELens, dictionary_learning and sparsify."""

import pytest
import torch
from dictionary_learning.trainers.trainer import set_decoder_norm_to_unit_norm
from peers import coders, saelens
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, draw, encoding, training
from sae_lens import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler

import fastsae

SCALE = 0.75


def test_layer_norm_as_saelens(precision):
    """The output alone: SAELens counts the loss of what it has denormalised, fastsae that of what it encodes."""
    problems = [draw(seed, "b_enc", silent=False) for seed in range(SEEDS)]
    sae = fastsae.ReLUSAE(D_IN, D_SAE, normalize_activations="layer_norm", dtype=precision)
    peer = saelens.encoded(StandardSAE, StandardSAEConfig, normalize_activations="layer_norm")
    assert_agrees(precision, lambda inputs: encoding(sae, inputs), peer, problems)
    sae = fastsae.TopKSAE(D_IN, D_SAE, 12, normalize_activations="layer_norm", dtype=precision)
    peer = saelens.encoded(TopKSAE, TopKSAEConfig, k=12, normalize_activations="layer_norm")
    assert_agrees(precision, lambda inputs: encoding(sae, inputs), peer, problems)


def test_scalar_as_saelens_trains(precision):
    """SAELens scales what its trainer feeds it."""
    sae = fastsae.ReLUSAE(D_IN, D_SAE, l1_coefficient=0.25, normalize_activations="scalar", dtype=precision)
    sae.set_activation_scale(SCALE)
    scaled = saelens.trained(StandardTrainingSAE, StandardTrainingSAEConfig, coefficients={"l1": 0.25})

    def peer(inputs):
        scaler = ActivationScaler(scaling_factor=SCALE)
        results = scaled(inputs | {"x": scaler.scale(inputs["x"])})
        results["output"] = scaler.unscale(results["output"])
        return results

    problems = [draw(seed, "b_enc") for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l1": 0.25}), peer, problems)


def test_scalar_as_saelens_folds(precision):
    sae = fastsae.ReLUSAE(D_IN, D_SAE, normalize_activations="scalar", dtype=precision)
    sae.set_activation_scale(SCALE)

    def ours(inputs):
        results = encoding(sae, inputs)
        return {"activations": results["activations"], "output": results["output"]}

    def peer(inputs):
        inputs = dict(inputs)
        x = inputs.pop("x")
        its = saelens.build(StandardSAE, StandardSAEConfig, inputs)
        its.fold_activation_norm_scaling_factor(SCALE)
        activations = its.encode(x)
        return {"activations": activations.detach(), "output": its.decode(activations).detach()}

    assert_agrees(precision, ours, peer, [draw(seed, "b_enc") for seed in range(SEEDS)])


def test_estimate_as_saelens():
    batches = torch.randn(5, 37, D_IN)
    scaler = ActivationScaler()
    scaler.estimate_scaling_factor(D_IN, iter(batches), n_batches_for_norm_estimate=5)
    sae = fastsae.ReLUSAE(D_IN, D_SAE, normalize_activations="scalar")
    assert sae.estimate_activation_scale(batches) == pytest.approx(scaler.scaling_factor)


def test_decoder_as_dictionary_learning_and_sparsify(precision):
    """Rows are of unit norm, and gradients lose what would change that.

    (dictionary_learning's projection adds 10⁻⁶ to each norm; sparsify's is exact where rows have norm 1 already.)
    """
    sae = fastsae.ReLUSAE(D_IN, D_SAE, normalize_decoder=True, dtype=precision)

    def ours(inputs):
        training(sae, inputs, {})
        grad = sae.W_dec.grad
        sae.normalize_decoder_()
        sae.project_decoder_grad_()
        return {"rows": sae.W_dec.detach().clone(), "gradient": grad}

    def peer(inputs):
        inputs = dict(inputs)
        x = inputs.pop("x")
        its = saelens.build(StandardTrainingSAE, StandardTrainingSAEConfig, inputs)
        its.training_forward_pass(saelens.step_input(x, {"l1": sae.l1_coefficient})).loss.backward()
        coder = coders.build(inputs, k=1)
        coder.set_decoder_norm_to_unit_norm()
        coder.W_dec.grad = its.W_dec.grad
        coder.remove_gradient_parallel_to_decoder_directions()
        rows = set_decoder_norm_to_unit_norm(its.W_dec.detach().T, D_IN, D_SAE).T
        return {"rows": rows, "gradient": coder.W_dec.grad}

    assert_agrees(precision, ours, peer, [draw(seed, "b_enc") for seed in range(SEEDS)])
