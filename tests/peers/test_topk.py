"""TopKSAE against SAELens' TopKTrainingSAE and TopKSAE, dictionary_learning's TopKTrainer, sparsify's SparseCoder."""

import pytest
import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from peers import coders, dictionaries, saelens
from peers.comparison import D_IN, D_SAE, SEEDS, assert_agrees, dead_latents, draw, encoding, training
from sae_lens import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

import fastsae

# About as many pre-activations are positive: of some tokens more, of others fewer.
K = 30


# AuxK keeps d_in // 2 = 10 of the dead: as many are dead, fewer, or more.
@pytest.mark.parametrize("n_dead", [0, 6, 10, 15])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_training_as_saelens(precision, n_dead, rescale, apply_b_dec):
    dead = dead_latents(n_dead)
    sae = fastsae.TopKSAE(
        D_IN,
        D_SAE,
        K,
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
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
        k=K,
        rescale_acts_by_decoder_norm=rescale,
        aux_loss_coefficient=0.25,
        apply_b_dec_to_input=apply_b_dec,
        dead=dead,
    )
    problems = [draw(seed, "b_enc", dead=dead) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "auxk": 0.25}, dead), peer, problems)


@pytest.mark.parametrize("rescale", [False, True])
def test_encoding_as_saelens(precision, rescale):
    sae = fastsae.TopKSAE(D_IN, D_SAE, K, rescale_by_decoder_norm=rescale, dtype=precision).eval()
    peer = saelens.encoded(TopKSAE, TopKSAEConfig, k=K, rescale_acts_by_decoder_norm=rescale)
    problems = [draw(seed, "b_enc") for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: encoding(sae, inputs), peer, problems)


def test_training_as_dictionary_learning(precision):
    sae = fastsae.TopKSAE(D_IN, D_SAE, K, relu="before", reconstruction="mse", dtype=precision)
    peer = dictionaries.trained(TopKTrainer, {"l2_loss": "mse", "auxk_loss": "auxk"}, dictionaries.LINEAR, k=K)
    problems = [draw(seed, "b_enc") for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "auxk": 1}), peer, problems)


@pytest.mark.parametrize("n_dead", [6, 10, 15])
def test_auxk_as_dictionary_learning(precision, n_dead):
    """Dead latents near zero, some of them positive, and fewer latents kept than are positive: none of the dead fires.

    (dictionary_learning also takes one for alive that fills up a token's k with activation 0; fastsae does not.)
    """
    dead = dead_latents(n_dead)
    sae = fastsae.TopKSAE(D_IN, D_SAE, 3, relu="before", reconstruction="mse", dead_after_tokens=1000, dtype=precision)
    peer = dictionaries.trained(
        TopKTrainer, {"l2_loss": "mse", "auxk_loss": "auxk"}, dictionaries.LINEAR, dead=dead, k=3
    )
    problems = [draw(seed, "b_enc", dead=dead, dead_bias=0.0, silent=False) for seed in range(SEEDS)]
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"mse": 1, "auxk": 1}, dead), peer, problems)


def test_any_leading_dimensions_as_saelens():
    problem = draw(0, "b_enc")
    x, weights = problem.pop("x")[:36].view(3, 4, 3, D_IN), problem
    sae = fastsae.TopKSAE(D_IN, D_SAE, K)
    sae.load_state_dict(sae.state_dict() | weights)
    peer = saelens.build(TopKSAE, TopKSAEConfig, weights, k=K)
    torch.testing.assert_close(sae.encode(x).to_dense(), peer.encode(x))
    torch.testing.assert_close(sae(x).sae_out, peer(x))


def test_training_as_sparsify(precision):
    """Where every latent that is kept is positive, sparsify's own backward is right."""
    sae = fastsae.TopKSAE(D_IN, D_SAE, 3, relu="before", dtype=precision)
    problems = [draw(seed, "b_enc", silent=False) for seed in range(SEEDS)]
    peer = coders.trained(k=3)
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"fvu": 1}), peer, problems)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"k": K}, {"fvu": 1}),
        ({"k": 12, "multi_topk": True}, {"fvu": 1, "multi_topk": 1}),
        ({"k": 16, "selection": "groupmax"}, {"fvu": 1}),
    ],
    ids=["topk", "multi_topk", "groupmax"],
)
def test_training_as_sparsify_means_it(precision, options, terms):
    """See coders.by_autograd for what is wrong with its own backward; that the encoder's gradient differs from it
    shows that these problems would tell.
    """
    sae = fastsae.TopKSAE(D_IN, D_SAE, relu="before", dtype=precision, **options)
    peer = coders.trained(
        activation=options.get("selection", "topk"), k=options["k"], multi_topk=options.get("multi_topk", False)
    )
    problems = [draw(seed, "b_enc") for seed in range(SEEDS)]

    def ours(inputs):
        return training(sae, inputs, terms)

    with coders.by_autograd():
        assert_agrees(precision, ours, peer, problems)
    with pytest.raises(AssertionError, match="error"):
        assert_agrees(precision, ours, peer, problems)


@pytest.mark.parametrize("n_dead", [6, 10, 15])
def test_auxk_as_sparsify_means_it(precision, n_dead):
    dead = dead_latents(n_dead)
    sae = fastsae.TopKSAE(D_IN, D_SAE, 3, relu="before", auxk_coefficient=0.25, dead_after_tokens=1000, dtype=precision)
    problems = [draw(seed, "b_enc", dead=dead, dead_bias=0.0, silent=False) for seed in range(SEEDS)]
    peer = coders.trained(dead=dead, auxk_coefficient=0.25, k=3)
    with coders.by_autograd():
        assert_agrees(precision, lambda inputs: training(sae, inputs, {"fvu": 1, "auxk": 1}, dead), peer, problems)
