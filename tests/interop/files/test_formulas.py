"""OpenAI's, OpenMOSS' and Gemma Scope's files, held to their libraries' formulas, written out here."""

import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from interop.files.cases import D_IN, D_SAE, both
from safetensors.torch import save_file

import fastsae
from fastsae.testing import assert_accurate

K = 5
X = 37


def drawn(**shapes):
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def hold(sae, formula, tensors, dtype=torch.float32):
    """The SAE's activations and reconstruction against formula(x, *tensors)."""
    x = torch.randn(X, D_IN).to(dtype)
    assert_accurate(both(sae, x), formula, x, *tensors.values())


# OpenAI: sparse_autoencoder/model.py.


def openai_tensors():
    return {
        "pre_bias": 0.3 * torch.randn(D_IN),
        "latent_bias": 0.3 * torch.randn(D_SAE),
        "encoder.weight": 0.3 * torch.randn(D_SAE, D_IN),
        "decoder.weight": 0.3 * torch.randn(D_IN, D_SAE),
    }


def openai_file(path, tensors, **values):
    statistics = {
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
    }
    # Module.state_dict is an OrderedDict with an attribute.
    state = OrderedDict(tensors | statistics | values)
    state._metadata = OrderedDict({"": {"version": 1}})
    torch.save(state, path)


def openai_relu(x, pre_bias, latent_bias, encoder, decoder):
    latents = ((x - pre_bias) @ encoder.T + latent_bias).relu()
    return latents, latents @ decoder.T + pre_bias


def openai_topk(x, pre_bias, latent_bias, encoder, decoder):
    mu = x.mean(dim=-1, keepdim=True)
    x = x - mu
    std = x.std(dim=-1, keepdim=True)
    x = x / (std + 1e-5)
    top = ((x - pre_bias) @ encoder.T + latent_bias).topk(K)
    latents = torch.zeros(X, D_SAE, dtype=x.dtype).scatter(-1, top.indices, top.values.relu())
    return latents, (latents @ decoder.T + pre_bias) * std + mu


@pytest.mark.parametrize("values", [{}, {"activation": "ReLU", "activation_state_dict": {}}])
def test_openai_relu(tmp_path, values):
    tensors = openai_tensors()
    openai_file(tmp_path / "v1.pt", tensors, **values)
    sae = fastsae.load(tmp_path / "v1.pt")
    assert type(sae) is fastsae.ReLUSAE
    hold(sae, openai_relu, tensors)


def test_openai_topk_normalises(tmp_path):
    tensors = openai_tensors()
    state = OrderedDict(k=K, postact_fn="ReLU")
    openai_file(tmp_path / "v5.pt", tensors, activation="TopK", activation_state_dict=state)
    sae = fastsae.load(tmp_path / "v5.pt")
    assert type(sae) is fastsae.TopKSAE
    hold(sae, openai_topk, tensors)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation": "Identity"}, "activation = 'Identity': expected one of 'ReLU', 'TopK'"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}},
            "postact_fn = 'Identity': expected one of 'ReLU'",
        ),
        ({"activation": "TopK", "activation_state_dict": {"postact_fn": "ReLU"}}, "k is missing"),
        ({"activation": "TopK", "activation_state_dict": {"k": D_SAE + 1, "postact_fn": "ReLU"}}, "k = 97"),
        ({"activation": 3}, "activation = 3"),
        ({"colour": torch.zeros(2)}, r"unknown tensors \['colour'\]"),
        ({"pre_bias": torch.zeros(3)}, r"pre_bias has shape \(3,\): expected \(24,\)"),
    ],
)
def test_openai_what_is_refused(tmp_path, values, message):
    openai_file(tmp_path / "8.pt", openai_tensors(), **values)
    with pytest.raises(ValueError, match=message) as error:
        fastsae.load(tmp_path / "8.pt")
    assert "8.pt" in str(error.value)


def test_openai_statistics_are_written_as_the_library_needs_them(tmp_path):
    fastsae.ReLUSAE(D_IN, D_SAE).save(tmp_path / "0.pt", "openai")
    values = torch.load(tmp_path / "0.pt", weights_only=True)
    assert values["activation"] == "ReLU"
    assert values["activation_state_dict"] == {}
    assert {name: (tuple(value.shape), value.dtype) for name, value in values.items() if torch.is_tensor(value)} == {
        "pre_bias": ((D_IN,), torch.float32),
        "latent_bias": ((D_SAE,), torch.float32),
        "encoder.weight": ((D_SAE, D_IN), torch.float32),
        "decoder.weight": ((D_IN, D_SAE), torch.float32),
        "stats_last_nonzero": ((D_SAE,), torch.int64),
        "latents_activation_frequency": ((D_SAE,), torch.float32),
        "latents_mean_square": ((D_SAE,), torch.float32),
    }


# Gemma Scope: the tutorial's JumpReLUSAE.


def gemma_scope(x, W_enc, b_enc, W_dec, b_dec, threshold):
    pre = x @ W_enc + b_enc
    activations = pre.relu() * (pre > threshold)
    return activations, activations @ W_dec + b_dec


@pytest.mark.parametrize("d_out", [D_IN, 13])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_gemma_scope(tmp_path, d_out, lower, savez):
    tensors = drawn(W_enc=(D_IN, D_SAE), b_enc=D_SAE, W_dec=(D_SAE, d_out), b_dec=d_out, threshold=D_SAE)
    arrays = {name.replace("W", "w") if lower else name: tensor.numpy() for name, tensor in tensors.items()}
    # numpy writes such an array as it lies, in Fortran's order.
    arrays["W_enc" if not lower else "w_enc"] = np.asfortranarray(tensors["W_enc"].numpy())
    savez(tmp_path / "params.npz", **arrays)
    sae = fastsae.load(tmp_path)
    assert type(sae) is fastsae.JumpReLUSAE
    assert sae.is_transcoder == (d_out != D_IN)
    hold(sae, gemma_scope, tensors)


# OpenMOSS: lm_saes/models/sae.py and activation_functions.py.

OPENMOSS = {
    "sae_type": "sae", "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
    "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "use_decoder_bias": True, "use_glu_encoder": False,
    "act_fn": "relu", "norm_activation": "inference", "sparsity_include_decoder_norm": True, "top_k": K,
    "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996, "jumprelu_threshold_window": 2.0,
}  # fmt: skip
AVERAGE = "dataset_average_activation_norm.blocks.3.hook_resid_post"
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"


def openmoss_folder(path, tensors, **changes):
    (path / "config.json").write_text(json.dumps(OPENMOSS | changes))
    # Written without being set where nothing is normalised by it.
    save_file({AVERAGE: torch.tensor(float("nan"))} | tensors, path / "sae_weights.safetensors")


def openmoss(act_fn, *, by_norm=True, scale=1.0, target_scale=1.0):
    def formula(x, W_E, b_E, W_D, b_D, log_threshold=None):
        pre = (x * scale) @ W_E + b_E
        norms = W_D.norm(dim=1)
        if by_norm:
            pre = pre * norms
        if act_fn == "relu":
            acts = pre.relu()
        elif act_fn == "jumprelu":
            acts = pre * (pre > log_threshold.exp())
        elif act_fn == "topk":
            top = pre.relu().topk(K)
            acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        else:
            top = pre.relu().flatten().topk(K * len(pre))
            acts = torch.zeros_like(pre).flatten().scatter(-1, top.indices, top.values).reshape(pre.shape)
        decoded = acts / norms if by_norm else acts
        # fastsae's TopK and BatchTopK keep what was selected by, times the norms; their decoder divides.
        return acts if act_fn.endswith("topk") else decoded, (decoded @ W_D + b_D) / target_scale

    return formula


def openmoss_tensors(act_fn="relu"):
    tensors = drawn(W_E=(D_IN, D_SAE), b_E=D_SAE, W_D=(D_SAE, D_IN), b_D=D_IN)
    return tensors | ({LOG_THRESHOLD: 0.5 * torch.randn(D_SAE) - 1} if act_fn == "jumprelu" else {})


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize(
    ("act_fn", "expected"),
    [
        ("relu", fastsae.ReLUSAE),
        ("jumprelu", fastsae.JumpReLUSAE),
        ("topk", fastsae.TopKSAE),
        ("batchtopk", fastsae.BatchTopKSAE),
    ],
)
def test_openmoss(tmp_path, act_fn, expected, by_norm):
    tensors = openmoss_tensors(act_fn)
    openmoss_folder(tmp_path, tensors, act_fn=act_fn, sparsity_include_decoder_norm=by_norm)
    sae = fastsae.load(tmp_path)
    assert type(sae) is expected
    hold(sae, openmoss(act_fn, by_norm=by_norm), tensors)


def test_openmoss_dataset_wise_normalisation(tmp_path):
    tensors = openmoss_tensors()
    openmoss_folder(tmp_path, tensors | {AVERAGE: torch.tensor(16.0)}, norm_activation="dataset-wise")
    scale = math.sqrt(D_IN) / 16
    hold(fastsae.load(tmp_path), openmoss("relu", scale=scale, target_scale=scale), tensors)


def test_openmoss_transcoder(tmp_path):
    tensors, out = openmoss_tensors("topk"), "blocks.3.hook_mlp_out"
    norms = {AVERAGE: torch.tensor(16.0), f"dataset_average_activation_norm.{out}": torch.tensor(4.0)}
    openmoss_folder(tmp_path, tensors | norms, act_fn="topk", norm_activation="dataset-wise", hook_point_out=out)
    sae = fastsae.load(tmp_path)
    assert sae.is_transcoder
    root = math.sqrt(D_IN)
    hold(sae, openmoss("topk", scale=root / 16, target_scale=root / 4), tensors)


def test_openmoss_without_decoder_bias(tmp_path):
    tensors = openmoss_tensors()
    del tensors["b_D"]
    openmoss_folder(tmp_path, tensors, use_decoder_bias=False)
    assert not fastsae.load(tmp_path).b_dec.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae_type": "crosscoder"}, "sae_type = 'crosscoder'"),
        ({"use_glu_encoder": True}, "use_glu_encoder = True"),
        ({"norm_activation": "token-wise"}, "norm_activation = 'token-wise'"),
        ({"norm_activation": "batch-wise"}, "norm_activation = 'batch-wise'"),
        ({"norm_activation": "dataset-wise"}, "dataset_average_activation_norm.* = nan"),
        ({"act_fn": "layertopk"}, "act_fn = 'layertopk'"),
        ({"expansion_factor": 5}, r"W_E has shape \(24, 96\): expected \(24, 120\)"),
        ({"act_fn": "jumprelu"}, "log_jumprelu_threshold' is missing"),
        ({"top_k": "many", "act_fn": "topk"}, "top_k = 'many'"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder = True"),
        ({"colour": "blue"}, "unknown fields 'colour'"),
    ],
)
def test_openmoss_what_is_refused(tmp_path, changes, message):
    openmoss_folder(tmp_path, openmoss_tensors(), **changes)
    with pytest.raises(ValueError, match=message) as error:
        fastsae.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("d_sae", range(1, 60))
def test_openmoss_finds_d_sae_in_its_expansion_factor(tmp_path, d_sae):
    fastsae.ReLUSAE(7, d_sae, apply_b_dec_to_input=False).save(tmp_path, "openmoss")
    config = json.loads((tmp_path / "config.json").read_text())
    assert int(config["d_model"] * config["expansion_factor"]) == d_sae
