"""BatchTopKSAE against SAELens' BatchTopKTrainingSAE and dictionary_learning's BatchTopKTrainer."""

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from peers import dictionaries, saelens
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, dead_latents, draw, encoding, training
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

import fastsae

CHUNK = 13


# 37 tokens keep 136 (of 136.9), 200 latents, or all that are positive.
@pytest.mark.parametrize(("k", "n_dead"), [(3.7, 0), (3.7, 6), (3.7, 15), (200 / 37, 0), (60, 0)])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_training_as_saelens(precision, k, n_dead, rescale, apply_b_dec):
    dead = dead_latents(n_dead)
    sae = fastsae.BatchTopKSAE(
        D_IN,
        D_SAE,
        k,
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
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        k=k,
        rescale_acts_by_decoder_norm=rescale,
        aux_loss_coefficient=0.25,
        apply_b_dec_to_input=apply_b_dec,
        dead=dead,
    )
    problems = [draw(seed, "b_enc", dead=dead) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "auxk": 0.25}, dead), peer, problems)


def thresholds(sae, inputs):
    """After each of some batches of one training."""
    x, weights = inputs["x"], {name: weight for name, weight in inputs.items() if name != "x"}
    sae.load_state_dict(sae.state_dict() | weights)
    moved = []
    for chunk in x.split(CHUNK):
        sae.loss(chunk)
        moved.append(sae.threshold.clone())
    # It is float64 whatever the activations are that it comes from.
    return {"threshold": torch.stack(moved).to(x.dtype)}


@pytest.mark.parametrize("rescale", [False, True])
def test_threshold_as_saelens(precision, rescale):
    """SAELens starts from 0, which fastsae takes for a threshold; -1 waits for the first batch."""
    sae = fastsae.BatchTopKSAE(
        D_IN, D_SAE, 3.7, rescale_by_decoder_norm=rescale, normalize_decoder=False, threshold_lr=0.25, dtype=precision
    )

    def ours(inputs):
        sae.threshold.zero_()
        return thresholds(sae, inputs)

    def peer(inputs):
        weights = {name: weight for name, weight in inputs.items() if name != "x"}
        its = saelens.build(
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            weights,
            k=3.7,
            topk_threshold_lr=0.25,
            rescale_acts_by_decoder_norm=rescale,
        )
        moved = []
        for chunk in inputs["x"].split(CHUNK):
            its.training_forward_pass(saelens.step_input(chunk))
            moved.append(its.topk_threshold)
        return {"threshold": torch.stack(moved).to(inputs["x"].dtype)}

    assert_agrees(precision, ours, peer, [draw(seed, "b_enc") for seed in range(SEEDS)])


def read_out(sae, inputs):
    results = encoding(sae, inputs)
    return {"activations": results["activations"], "output": results["output"]}


@pytest.mark.parametrize("rescale", [False, True])
def test_encoding_as_what_saelens_saves_for_inference(precision, rescale, tmp_path):
    """A JumpReLU SAE with one threshold for all latents, and the norms of the decoder in its encoder."""
    sae = fastsae.BatchTopKSAE(D_IN, D_SAE, 5, rescale_by_decoder_norm=rescale, dtype=precision).eval()
    sae.threshold.fill_(0.5)

    def ours(inputs):
        return read_out(sae, inputs)

    def peer(inputs):
        inputs = dict(inputs)
        x = inputs.pop("x")
        its = saelens.build(
            BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, inputs, k=5, rescale_acts_by_decoder_norm=rescale
        )
        its.topk_threshold.fill_(0.5)
        its.save_inference_model(tmp_path)
        saved = SAE.load_from_disk(tmp_path)
        activations = saved.encode(x)
        return {"activations": activations.detach(), "output": saved.decode(activations).detach()}

    assert_agrees(precision, ours, peer, [draw(seed, "b_enc") for seed in range(SEEDS)])


@pytest.mark.parametrize("k", [5, 60])
def test_training_as_dictionary_learning(precision, k):
    sae = fastsae.BatchTopKSAE(D_IN, D_SAE, k, reconstruction="mse", dtype=precision)
    peer = dictionaries.trained(BatchTopKTrainer, {"l2_loss": "mse", "auxk_loss": "auxk"}, dictionaries.LINEAR, k=k)
    problems = [draw(seed, "b_enc") for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "auxk": 1}), peer, problems)


@pytest.mark.parametrize("n_dead", [6, 15])
def test_auxk_as_dictionary_learning(precision, n_dead):
    """Dead latents near zero, some of them positive, but below the least that the batch keeps."""
    dead = dead_latents(n_dead)
    sae = fastsae.BatchTopKSAE(D_IN, D_SAE, 5, reconstruction="mse", dead_after_tokens=1000, dtype=precision)
    peer = dictionaries.trained(
        BatchTopKTrainer, {"l2_loss": "mse", "auxk_loss": "auxk"}, dictionaries.LINEAR, dead=dead, k=5
    )
    problems = [draw(seed, "b_enc", dead=dead, dead_bias=0.0) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "auxk": 1}, dead), peer, problems)


def test_auxk_is_without_latents_that_fire_again_as_dictionary_learning(precision):
    """(SAELens takes those that were dead before the batch.)"""
    revived = torch.zeros(D_SAE, dtype=torch.bool).index_fill(0, torch.tensor([1, 50, 79]), True)
    dead = dead_latents(6) | revived
    sae = fastsae.BatchTopKSAE(D_IN, D_SAE, 10, reconstruction="mse", dead_after_tokens=1000, dtype=precision)
    peer = dictionaries.trained(
        BatchTopKTrainer, {"l2_loss": "mse", "auxk_loss": "auxk"}, dictionaries.LINEAR, dead=dead, k=10
    )
    problems = [draw(seed, "b_enc", dead=dead & ~revived, dead_bias=0.0) for seed in range(SEEDS)]

    def ours(inputs):
        return training(sae, inputs, {"mse": 1, "auxk": 1}, dead, revived)

    assert_agrees(precision, ours, peer, problems)


def test_threshold_as_dictionary_learning():
    """In float32, which dictionary_learning rounds the least activation to whatever its dtype."""
    sae = fastsae.BatchTopKSAE(D_IN, D_SAE, 5, threshold_lr=0.25)

    def ours(inputs):
        sae.threshold.fill_(-1)
        return thresholds(sae, inputs)

    def peer(inputs):
        weights = {name: weight for name, weight in inputs.items() if name != "x"}
        options = {"k": 5, "threshold_beta": 0.75, "threshold_start_step": -1}
        trainer = dictionaries.build(BatchTopKTrainer, weights, dictionaries.LINEAR, **options)
        moved = []
        for chunk in inputs["x"].split(CHUNK):
            trainer.loss(chunk, step=0)
            moved.append(trainer.ae.threshold)
        return {"threshold": torch.stack(moved)}

    assert_agrees(torch.float32, ours, peer, [draw(seed, "b_enc") for seed in range(SEEDS)])


def test_encoding_as_dictionary_learning(precision):
    sae = fastsae.BatchTopKSAE(D_IN, D_SAE, 5, dtype=precision).eval()
    sae.threshold.fill_(0.5)

    def ours(inputs):
        return read_out(sae, inputs)

    def peer(inputs):
        inputs = dict(inputs)
        x = inputs.pop("x")
        its = dictionaries.build(BatchTopKTrainer, inputs, dictionaries.LINEAR, k=5).ae
        its.threshold.fill_(0.5)
        output, activations = its(x, output_features=True)
        return {"activations": activations.detach(), "output": output.detach()}

    assert_agrees(precision, ours, peer, [draw(seed, "b_enc") for seed in range(SEEDS)])
