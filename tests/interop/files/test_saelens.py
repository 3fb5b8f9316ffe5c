"""SAELens' files, held to sae-lens as installed: what it writes is read, and what is written it reads."""

import json

import pytest
import sae_lens
import torch
from interop.files.cases import D_IN, D_SAE, assert_as_its_library, assert_same_sae, both, build
from safetensors.torch import load_file, save_file

import fastsae
from fastsae.testing import assert_same_bits

WIDE_OUT = {"d_out": 13, "apply_b_dec_to_input": False}
# Class, config and options, and fastsae's class.
INFERENCE = [
    ("StandardSAE", {}, fastsae.ReLUSAE),
    ("StandardSAE", {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}, fastsae.ReLUSAE),
    ("TopKSAE", {"k": 5}, fastsae.TopKSAE),
    ("TopKSAE", {"k": 5, "rescale_acts_by_decoder_norm": True}, fastsae.TopKSAE),
    ("TopKSAE", {"k": 90}, fastsae.TopKSAE),
    ("JumpReLUSAE", {}, fastsae.JumpReLUSAE),
    ("JumpReLUSAE", {"apply_b_dec_to_input": False}, fastsae.JumpReLUSAE),
    ("GatedSAE", {}, fastsae.GatedSAE),
    ("Transcoder", WIDE_OUT, fastsae.ReLUSAE),
    ("SkipTranscoder", WIDE_OUT, fastsae.ReLUSAE),
    ("JumpReLUTranscoder", WIDE_OUT, fastsae.JumpReLUSAE),
    ("JumpReLUSkipTranscoder", WIDE_OUT, fastsae.JumpReLUSAE),
]
DTYPES = [torch.float32, torch.bfloat16]


def theirs(name, options, dtype=torch.float32):
    """One of SAELens' SAEs with every tensor away from its start."""
    config = getattr(sae_lens, f"{name}Config", None) or getattr(sae_lens.saes.transcoder, f"{name}Config")
    cls = getattr(sae_lens, name, None) or getattr(sae_lens.saes.transcoder, name)
    sae = cls(config(d_in=D_IN, d_sae=D_SAE, dtype=str(dtype).removeprefix("torch."), device="cpu", **options))
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if "threshold" in key:
                parameter.copy_(torch.rand_like(parameter) - 0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return sae


def run(sae, x):
    activations = sae.encode(x)
    # A skip connection is a transcoder's forward's own.
    return activations, sae(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options", "expected"), INFERENCE)
def test_reads_what_saelens_saves(tmp_path, name, options, expected, dtype):
    original = theirs(name, options, dtype)
    original.save_model(tmp_path)
    sae = fastsae.load(tmp_path)
    assert type(sae) is expected
    assert sae.dtype == dtype
    assert_as_its_library(sae, original, run, torch.randn(37, D_IN, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options", "expected"), INFERENCE)
def test_saelens_reads_what_is_written(tmp_path, name, options, expected, dtype):
    original = theirs(name, options, dtype)
    original.save_model(tmp_path / "theirs")
    sae = fastsae.load(tmp_path / "theirs")
    sae.save(tmp_path / "ours", "saelens", metadata={"model_name": "tiny", "hook_name": "blocks.0.hook_resid_post"})
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert type(again) is type(original)
    assert again.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    for key, tensor in original.state_dict().items():
        assert_same_bits(again.state_dict()[key], tensor)
    x = torch.randn(37, D_IN, dtype=dtype)
    with torch.no_grad():
        for a, b in zip(run(again, x), run(original, x), strict=True):
            assert_same_bits(a, b)


TRAINING = [
    ("StandardTrainingSAE", {"l1_coefficient": 3.0, "lp_norm": 0.5}),
    ("TopKTrainingSAE", {"k": 5}),
    ("JumpReLUTrainingSAE", {"l0_coefficient": 2.0, "jumprelu_bandwidth": 0.2}),
    ("GatedTrainingSAE", {"l1_coefficient": 3.0}),
]


@pytest.mark.parametrize(("name", "options"), TRAINING)
def test_reads_training_checkpoints(tmp_path, name, options):
    original = theirs(name, options)
    original.save_model(tmp_path)
    sae = fastsae.load(tmp_path)
    for option, value in options.items():
        assert getattr(sae, {"jumprelu_bandwidth": "bandwidth"}.get(option, option)) == value
    if name == "JumpReLUTrainingSAE":
        # It clamps in training; fastsae in encoding.
        original.threshold.data.clamp_(min=0)
    assert_as_its_library(sae, original, run, torch.randn(37, D_IN))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("BatchTopKTrainingSAE", {}), ("MatryoshkaBatchTopKTrainingSAE", {"matryoshka_widths": [7, 40, D_SAE]})],
)
def test_batchtopk_is_the_same_from_checkpoint_and_inference_files(tmp_path, name, options, rescale):
    original = theirs(name, {"k": 3.5, "rescale_acts_by_decoder_norm": rescale, **options})
    original.topk_threshold.fill_(0.65)
    original.save_model(tmp_path / "checkpoint")
    original.save_inference_model(tmp_path / "inference")
    jumprelu = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    from_inference = fastsae.load(tmp_path / "inference")
    assert type(from_inference) is fastsae.JumpReLUSAE
    x = torch.randn(37, D_IN)
    assert_as_its_library(from_inference, jumprelu, run, x)
    from_checkpoint = fastsae.load(tmp_path / "checkpoint")
    assert isinstance(from_checkpoint, fastsae.BatchTopKSAE)
    assert float(from_checkpoint.threshold) == 0.65
    assert from_checkpoint.k == 3.5
    # In training it selects over the batch; what it is for in inference is the JumpReLU.
    assert_as_its_library(from_checkpoint, jumprelu, run, x)
    from_checkpoint.save(tmp_path / "ours", "saelens")
    assert_as_its_library(from_checkpoint, sae_lens.SAE.load_from_disk(tmp_path / "ours"), run, x)


def test_a_fresh_batchtopk_of_saelens_selects_over_its_batch_in_training(tmp_path):
    original = theirs("BatchTopKTrainingSAE", {"k": 3.5, "rescale_acts_by_decoder_norm": True})
    original.save_model(tmp_path)
    sae = fastsae.load(tmp_path).train()
    assert_as_its_library(
        sae, original, lambda sae, x: (sae.encode(x), sae.decode(sae.encode(x))), torch.randn(37, D_IN)
    )


def test_log_threshold_of_earlier_training_checkpoints(tmp_path):
    original = theirs("JumpReLUTrainingSAE", {})
    original.threshold.data = torch.rand(D_SAE) + 0.1
    original.save_model(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    sae = fastsae.load(tmp_path)
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path)
    assert_same_bits(sae.thresholds().detach(), again.threshold.detach())


BEFORE_6 = {
    "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu",
    "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8, "hook_head_index": None,
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "prepend_bos": True,
    "finetuning_scaling_factor": False, "sae_lens_training_version": None, "dataset_path": "openwebtext",
    "dataset_trust_remote_code": True, "context_size": 128, "normalize_activations": "none",
    "neuronpedia_id": "gpt2-small/8-res-jb", "model_from_pretrained_kwargs": {}, "seqpos_slice": [None],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("StandardSAE", {}),
        ("StandardSAE", {"normalize_activations": False}),
        ("StandardSAE", {"normalize_activations": None, "architecture": "standard"}),
        ("StandardSAE", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
        ("StandardSAE", {"sae_lens_version": "5.9.1"}),
        ("TopKSAE", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}),
        ("TopKSAE", {"activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}),
        ("TopKSAE", {"architecture": "topk", "k": 5, "activation_fn_kwargs": ...}),
        ("JumpReLUSAE", {"architecture": "jumprelu"}),
        ("GatedSAE", {"architecture": "gated"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_configs_before_version_6(tmp_path, name, change):
    save_file(dict(theirs(name, {}).state_dict()), tmp_path / "sae_weights.safetensors")
    config = {name: value for name, value in (BEFORE_6 | change).items() if value is not ...}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    original = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(original).__name__ == name
    assert_as_its_library(fastsae.load(tmp_path), original, run, torch.randn(37, D_IN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn = 'tanh-relu'"),
        ({"activation_fn_str": "topk"}, "k is missing"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5, "signed": True}}, "signed = True"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": [5]}, r"activation_fn_kwargs = \[5\]"),
        ({"activation_fn_str": "topk", "architecture": "gated"}, "activation_fn = 'topk'"),
        ({"normalize_activations": True}, "expected_average_only_in"),
        ({"architecture": "transcoder"}, "architecture = 'transcoder'"),
    ],
)
def test_configs_before_version_6_that_are_refused(tmp_path, change, message):
    save_file(dict(theirs("StandardSAE", {}).state_dict()), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(BEFORE_6 | change))
    with pytest.raises(ValueError, match=message) as error:
        fastsae.load(tmp_path)
    assert "cfg.json" in str(error.value)


def test_a_scaling_factor_of_ones_is_none_and_any_other_is_refused(tmp_path):
    tensors = dict(theirs("StandardSAE", {}).state_dict())
    save_file(tensors | {"scaling_factor": torch.ones(D_SAE)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(BEFORE_6))
    assert_same_bits(fastsae.load(tmp_path).W_dec.detach(), tensors["W_dec"])
    save_file(tensors | {"scaling_factor": torch.full((D_SAE,), 2.0)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="scaling_factor is not 1 everywhere"):
        fastsae.load(tmp_path)


def test_the_factor_of_activations_comes_from_activation_scaler(tmp_path):
    original = theirs("StandardTrainingSAE", {"normalize_activations": "expected_average_only_in"})
    original.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"expected_average_only_in.*activation_scaler\.json"):
        fastsae.load(tmp_path)
    for value in ("null", "0", "-1", "1e39", '"0.25"', "true"):
        (tmp_path / "activation_scaler.json").write_text(f'{{"scaling_factor": {value}}}')
        with pytest.raises(ValueError, match=r"activation_scaler\.json: scaling_factor = "):
            fastsae.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    sae = fastsae.load(tmp_path)
    assert sae.normalize_activations == "scalar"
    folded = sae_lens.StandardSAE.from_dict(original.cfg.get_inference_sae_cfg_dict())
    folded.load_state_dict(original.state_dict())
    folded.fold_activation_norm_scaling_factor(0.25)
    assert_as_its_library(sae, folded, run, torch.randn(37, D_IN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations = 'constant_norm_rescale'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations = 'covariance_whitening'"),
        ({"architecture": "temporal"}, "architecture = 'temporal'"),
        ({"architecture": "matching_pursuit"}, "architecture = 'matching_pursuit'"),
        ({"architecture": "abstopk"}, "architecture = 'abstopk'"),
        ({"reshape_activations": "hook_q"}, "reshape_activations = 'hook_q'"),
        ({"colour": "blue"}, "unknown fields 'colour'"),
        ({"d_sae": D_SAE + 1}, r"W_enc has shape \(24, 96\): expected \(24, 97\)"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"metadata": {"sae_lens_version": "new"}}, "sae_lens_version = 'new'"),
    ],
)
def test_what_fastsae_does_not_do_is_refused(tmp_path, change, message):
    build("ReLUSAE", {}).save(tmp_path, "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as error:
        fastsae.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_threshold_of_a_half_precision_sae_keeps_its_digits(tmp_path):
    sae = build("JumpReLUSAE", {}, torch.bfloat16)
    sae.threshold.data += 1e-4
    sae.save(tmp_path, "saelens")
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].dtype == torch.float32
    assert_same_sae(fastsae.load(tmp_path), sae)


# What SAELens' own loaders make of other libraries' files: where they fail, fastsae.load does not.


def test_saelens_loader_of_sparsify_transposes_a_decoder_that_needs_none(tmp_path):
    """Of sae-lens 6.54: W_dec comes as [d_in, d_sae], num_latents = 0 is taken at its word, the dtype is bfloat16."""
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
    from sparsify import SparseCoder, SparseCoderConfig

    folder = tmp_path / "layers.0"
    SparseCoder(D_IN, SparseCoderConfig(expansion_factor=4, k=5)).save_to_disk(folder)
    config, tensors = sparsify_disk_loader(folder)
    assert tensors["W_dec"].shape == (D_IN, D_SAE)
    assert config["d_sae"] == 0
    assert config["dtype"] == "bfloat16"
    assert config["apply_b_dec_to_input"] is False
    with pytest.raises((RuntimeError, ValueError)):
        sae_lens.SAE.load_from_disk(folder, converter=sparsify_disk_loader)
    sae = fastsae.load(folder)
    assert sae.W_dec.shape == (D_SAE, D_IN)
    assert sae.apply_b_dec_to_input
    assert both(sae, torch.randn(5, D_IN))[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "architecture"),
    [
        ("BatchTopKSAE", {"k": 5}, "jumprelu"),
        ("MatryoshkaSAE", {"k": 5}, "jumprelu"),
        ("JumpReLUSAE", {"apply_b_dec_to_input": False}, "jumprelu"),
        ("GatedSAE", {}, "gated"),
    ],
)
def test_saelens_loader_of_dictionary_learning_keeps_thresholds_since_it_was_mended(
    tmp_path, monkeypatch, name, options, architecture
):
    """Of sae-lens 6.54; 6.18 read these as plain ReLU."""
    from sae_lens.loading import pretrained_sae_loaders

    sae = build(name, options)
    sae.save(tmp_path / "sae", "dictionary_learning", metadata={"lm_name": "tiny", "layer": 0})
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    (tmp_path / "sae" / "config.json").write_text(json.dumps(config | {"buffer": {"ctx_len": 128}}))
    monkeypatch.setattr(
        pretrained_sae_loaders, "hf_hub_download", lambda repo_id, filename, **options: str(tmp_path / filename)
    )
    config, tensors, _ = pretrained_sae_loaders.dictionary_learning_sae_huggingface_loader_1("repo", "sae")
    assert config["architecture"] == architecture
    loaded = sae_lens.SAE.from_dict(pretrained_sae_loaders.handle_config_defaulting(config))
    loaded.load_state_dict(tensors)
    assert_as_its_library(sae, loaded, run, torch.randn(37, D_IN))


def test_saelens_loader_of_dictionary_learning_loses_the_bias_of_autoencodernew(tmp_path, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders

    sae = build("ReLUSAE", {"apply_b_dec_to_input": False})
    sae.save(tmp_path / "sae", "dictionary_learning", metadata={"lm_name": "tiny", "layer": 0})
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    (tmp_path / "sae" / "config.json").write_text(json.dumps(config | {"buffer": {"ctx_len": 128}}))
    monkeypatch.setattr(
        pretrained_sae_loaders, "hf_hub_download", lambda repo_id, filename, **options: str(tmp_path / filename)
    )
    config, tensors, _ = pretrained_sae_loaders.dictionary_learning_sae_huggingface_loader_1("repo", "sae")
    assert config["apply_b_dec_to_input"] is True
    assert tensors["b_dec"] is None
    assert_same_sae(fastsae.load(tmp_path / "sae"), sae)
