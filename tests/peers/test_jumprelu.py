"""JumpReLUSAE against SAELens' JumpReLUTrainingSAE and JumpReLUSAE, and dictionary_learning's JumpReluTrainer."""

from unittest import mock

import pytest
import torch
from dictionary_learning.trainers import jumprelu
from peers import dictionaries, saelens
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, dead_latents, draw, encoding, training
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

import fastsae

OWN = "b_enc", "threshold"
# A power of two, since dictionary_learning keeps it in float32. Wide: many pre-activations are within.
BANDWIDTH = 0.25


@pytest.mark.parametrize("mode", ["step", "quadratic", "tanh"])
@pytest.mark.parametrize("ste_to_input", [False, True])
@pytest.mark.parametrize("n_dead", [None, 0, 6])
def test_training_as_saelens(precision, mode, ste_to_input, n_dead):
    """n_dead None is without the loss of pre-activations."""
    dead = dead_latents(n_dead or 0)
    target = 7.0 if mode == "quadratic" else None
    sae = fastsae.JumpReLUSAE(
        D_IN,
        D_SAE,
        penalty=mode,
        l0_coefficient=0.5,
        target_l0=target,
        tanh_scale=3.0,
        bandwidth=BANDWIDTH,
        ste_to_input=ste_to_input,
        pre_act_coefficient=0.0 if n_dead is None else 0.25,
        normalize_decoder=False,
        dead_after_tokens=1000,
        dtype=precision,
    )
    sae.sparsity_scale = 0.5
    peer = saelens.trained(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        coefficients={"l0": 0.25},
        dead=dead,
        jumprelu_sparsity_loss_mode=mode,
        target_l0=target,
        jumprelu_tanh_scale=3.0,
        jumprelu_bandwidth=BANDWIDTH,
        jumprelu_ste_to_input=ste_to_input,
        pre_act_loss_coefficient=None if n_dead is None else 0.25,
    )
    coefficients = {"mse": 1, "l0": 0.25} | ({} if n_dead is None else {"pre_act": 0.25})
    problems = [draw(seed, *OWN, dead=dead) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, coefficients, dead), peer, problems)


def test_without_b_dec_as_saelens(precision):
    sae = fastsae.JumpReLUSAE(
        D_IN, D_SAE, l0_coefficient=0.25, bandwidth=BANDWIDTH, apply_b_dec_to_input=False, dtype=precision
    )
    peer = saelens.trained(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        coefficients={"l0": 0.25},
        jumprelu_bandwidth=BANDWIDTH,
        apply_b_dec_to_input=False,
    )
    problems = [draw(seed, *OWN) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l0": 0.25}), peer, problems)


@pytest.mark.parametrize("mode", ["step", "tanh"])
def test_log_threshold(precision, mode):
    """SAELens learned log θ until version 6.18: its gradient is that of θ times θ."""
    sae = fastsae.JumpReLUSAE(
        D_IN,
        D_SAE,
        penalty=mode,
        l0_coefficient=0.25,
        bandwidth=BANDWIDTH,
        log_threshold=True,
        normalize_decoder=False,
        dtype=precision,
    )
    direct = saelens.trained(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        coefficients={"l0": 0.25},
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_bandwidth=BANDWIDTH,
    )

    def peer(inputs):
        inputs = dict(inputs)
        inputs["threshold"] = inputs.pop("log_threshold").exp()
        results = direct(inputs)
        results["gradient of log_threshold"] = results.pop("gradient of threshold") * inputs["threshold"]
        return results

    problems = [draw(seed, *OWN) for seed in range(SEEDS)]
    for problem in problems:
        problem["log_threshold"] = problem.pop("threshold").log()
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l0": 0.25}), peer, problems)


def with_negative_thresholds(problems):
    for problem in problems:
        problem["threshold"][::3] *= -1
    return problems


def test_negative_thresholds_as_saelens(precision):
    """In training both move them to 0 first."""
    sae = fastsae.JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.25, bandwidth=BANDWIDTH, dtype=precision)
    peer = saelens.trained(
        JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, coefficients={"l0": 0.25}, jumprelu_bandwidth=BANDWIDTH
    )
    problems = with_negative_thresholds([draw(seed, *OWN) for seed in range(SEEDS)])
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "l0": 0.25}), peer, problems)
    assert (sae.threshold.view(-1)[::3] == 0).all()


def test_encoding_as_saelens(precision):
    """Read out with a negative threshold, an activation is not negative."""
    sae = fastsae.JumpReLUSAE(D_IN, D_SAE, dtype=precision).eval()
    peer = saelens.encoded(JumpReLUSAE, JumpReLUSAEConfig)
    problems = with_negative_thresholds([draw(seed, *OWN) for seed in range(SEEDS)])
    assert_agrees(precision, lambda inputs: encoding(sae, inputs), peer, problems)


def ours_for_dictionary_learning(dtype):
    sae = fastsae.JumpReLUSAE(
        D_IN,
        D_SAE,
        penalty="target",
        target_l0=7,
        l0_coefficient=0.5,
        bandwidth=BANDWIDTH,
        apply_b_dec_to_input=False,
        dtype=dtype,
    )
    sae.sparsity_scale = 0.25
    return lambda inputs: training(sae, inputs, {"mse": 1})


def dictionary_learning():
    return dictionaries.trained(
        jumprelu.JumpReluTrainer,
        {"l2_loss": "mse"},
        bandwidth=BANDWIDTH,
        sparsity_penalty=0.5,
        target_l0=7,
        sparsity_warmup_steps=8,
        step=2,
    )


def without_gradient_of_threshold(run):
    def rest(inputs):
        results = run(inputs)
        del results["gradient of threshold"]
        return results

    return rest


def test_training_as_dictionary_learning(precision):
    """All but the threshold's gradient: see the next test."""
    ours, peer = map(without_gradient_of_threshold, (ours_for_dictionary_learning(precision), dictionary_learning()))
    assert_agrees(precision, ours, peer, [draw(seed, *OWN) for seed in range(SEEDS)])


def test_threshold_as_dictionary_learning_means_it(precision):
    """dictionary_learning 0.1.0 takes the step function of the activations, where the formula (Rajamanoharan et al.
    2024, equation 9) has the pre-activations: what a threshold cuts off is then 0 to its estimator, in the window of
    every threshold below half a bandwidth and of no other. fastsae's is the formula's, and dictionary_learning's with
    the pre-activations put in their place.
    """
    seen = []

    class Step:
        @staticmethod
        def apply(activations, threshold, bandwidth):
            return step(seen.pop(), threshold, bandwidth)

    class JumpReLU:
        @staticmethod
        def apply(pre, threshold, bandwidth):
            seen.append(pre.detach())
            return jump(pre, threshold, bandwidth)

    step, jump = jumprelu.StepFunction.apply, jumprelu.JumpReLUFunction.apply
    problems = [draw(seed, *OWN) for seed in range(SEEDS)]
    for problem in problems:
        problem["threshold"] *= torch.linspace(0.3, 1, D_SAE)
    with mock.patch.multiple(jumprelu, StepFunction=Step, JumpReLUFunction=JumpReLU):
        assert_agrees(precision, ours_for_dictionary_learning(precision), dictionary_learning(), problems)
    with pytest.raises(AssertionError, match="error"):
        assert_agrees(precision, ours_for_dictionary_learning(precision), dictionary_learning(), problems)
