"""sparsify's files, held to eai-sparsify as installed: what it writes is read, and what is written it reads."""

import json

import pytest
import torch
from interop.files.cases import D_IN, D_SAE, assert_as_its_library, build
from sparsify import SparseCoder, SparseCoderConfig

import fastsae
from fastsae.testing import assert_same_bits

OPTIONS = [
    {"k": 5},
    {"k": 90},
    {"k": 4, "activation": "groupmax"},
    {"k": 5, "multi_topk": True, "normalize_decoder": False},
    {"k": 5, "transcode": True},
    {"k": 5, "transcode": True, "skip_connection": True},
]
DTYPES = [torch.float32, torch.bfloat16]


def theirs(options, dtype=torch.float32):
    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, **options), dtype=dtype)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return coder


def run(coder, x):
    found = coder.encode(x)
    dense = torch.zeros_like(found.pre_acts).scatter(-1, found.top_indices, found.top_acts)
    y = coder.decode(found.top_acts, found.top_indices)
    return dense, y if coder.W_skip is None else y + x @ coder.W_skip.mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_reads_what_sparsify_saves_and_writes_it_back(tmp_path, options, dtype):
    original = theirs(options, dtype)
    original.save_to_disk(tmp_path / "theirs")
    sae = fastsae.load(tmp_path / "theirs")
    assert type(sae) is fastsae.TopKSAE
    assert sae.dtype == dtype
    assert_as_its_library(sae, original, run, torch.randn(37, D_IN, dtype=dtype))
    sae.save(tmp_path / "ours", "sparsify")
    again = SparseCoder.load_from_disk(tmp_path / "ours")
    for option, value in options.items():
        assert getattr(again.cfg, option) == value
    assert again.cfg.num_latents == D_SAE
    for key, tensor in original.state_dict().items():
        assert_same_bits(again.state_dict()[key], tensor)


@pytest.mark.parametrize("change", [{"num_latents": 0}, {"num_latents": None}, {"signed": False}, {"signed": True}])
def test_older_and_default_configs(tmp_path, change):
    original = SparseCoder(D_IN, SparseCoderConfig(expansion_factor=4, k=5))
    original.save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["num_latents"] == 0
    config |= change
    if config["num_latents"] is None:
        del config["num_latents"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    if config.get("signed"):
        with pytest.raises(ValueError, match=r"cfg\.json: signed = True: expected false"):
            fastsae.load(tmp_path)
    else:
        assert fastsae.load(tmp_path).d_sae == 4 * D_IN


def test_skip_connections_of_autoencoders_are_refused(tmp_path):
    theirs({"k": 5, "skip_connection": True}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="skip_connection = True: expected false without transcode"):
        fastsae.load(tmp_path)


def test_a_coder_without_its_decoder_is_named(tmp_path):
    coder = theirs({"k": 5})
    coder.W_dec = None
    coder.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"sae\.safetensors: the tensor 'W_dec' is missing"):
        fastsae.load(tmp_path)


def test_selection_before_or_after_relu_is_one_function(tmp_path):
    sae = build("TopKSAE", {"k": 90, "relu": "after"})
    sae.save(tmp_path, "sparsify")
    assert_as_its_library(sae, SparseCoder.load_from_disk(tmp_path), run, torch.randn(37, D_IN))
