"""Transcoders against SAELens', which are for inference alone, and sparsify's."""

import pytest
import torch
from peers import coders, saelens
from peers.comparison import D_IN, D_OUT, D_SAE, N_TOKENS, SEEDS, assert_agrees, draw, encoding, training
from sae_lens import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)

import fastsae


@pytest.mark.parametrize(
    ("ours", "own", "peer", "config"),
    [
        (fastsae.ReLUSAE, ["b_enc"], Transcoder, TranscoderConfig),
        (fastsae.ReLUSAE, ["b_enc", "W_skip"], SkipTranscoder, SkipTranscoderConfig),
        (fastsae.JumpReLUSAE, ["b_enc", "threshold"], JumpReLUTranscoder, JumpReLUTranscoderConfig),
        (
            fastsae.JumpReLUSAE,
            ["b_enc", "threshold", "W_skip"],
            JumpReLUSkipTranscoder,
            JumpReLUSkipTranscoderConfig,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_encoding_as_saelens(precision, ours, own, peer, config):
    sae = ours(D_IN, D_SAE, d_out=D_OUT, skip="W_skip" in own, dtype=precision).eval()
    problems = [draw(seed, *own, d_out=D_OUT) for seed in range(SEEDS)]
    peer = saelens.encoded(peer, config, d_out=D_OUT, apply_b_dec_to_input=False)
    assert_agrees(precision, lambda inputs: encoding(sae, inputs), peer, problems)


@pytest.mark.parametrize("skip", [False, True])
def test_training_as_sparsify(precision, skip):
    sae = fastsae.TopKSAE(D_IN, D_SAE, 3, relu="before", d_out=D_IN, skip=skip, dtype=precision)
    peer = coders.trained(k=3, transcode=True, skip_connection=skip)
    own = ["b_enc", "W_skip"] if skip else ["b_enc"]
    problems = [draw(seed, *own, silent=False) for seed in range(SEEDS)]
    for seed, problem in enumerate(problems):
        problem["target"] = torch.randn(N_TOKENS, D_IN, generator=torch.Generator().manual_seed(seed + SEEDS))
    assert_agrees(precision, lambda inputs: training(sae, inputs, {"fvu": 1}), peer, problems)
