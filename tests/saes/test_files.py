"""What is written is what is read, to the bit; what is broken is named; what was there before a crash stays."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae


def build(**options):
    sae = fastsae.TopKSAE(24, 100, 5, normalize_activations="scalar", **options)
    sae.set_activation_scale(0.25)
    sae.loss(torch.randn(37, 24)).total.backward()
    return sae


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bit_exact(tmp_path, dtype):
    sae = build(dtype=dtype, relu="before", auxk=7, auxk_coefficient=0.5, dead_after_tokens=99)
    sae.save_pretrained(tmp_path / "sae")
    again = fastsae.load(tmp_path / "sae")
    assert type(again) is fastsae.TopKSAE
    assert again.config() == sae.config()
    assert not again.training
    for (name, a), (_, b) in zip(sae.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert again.W_enc.T.is_contiguous()
    assert all(p.requires_grad for p in again.parameters())


def test_tensors_are_plain_and_contiguous_in_the_file(tmp_path):
    sae = build()
    sae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["W_enc"].shape == (24, 100)
    assert tensors["W_dec"].shape == (100, 24)
    assert torch.equal(tensors["W_enc"], sae.W_enc)


def test_hub_conventions(tmp_path):
    sae = build()
    sae.save_pretrained(tmp_path)
    again = fastsae.TopKSAE.from_pretrained(str(tmp_path))
    assert torch.equal(again.W_dec, sae.W_dec)
    again = fastsae.SAE.from_pretrained(tmp_path)
    assert type(again) is fastsae.TopKSAE


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        fastsae.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, kept):
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        fastsae.load(tmp_path)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    build().save_pretrained(tmp_path)
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return marker.touch, ()

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fastsae.load(tmp_path)
    assert not marker.exists()


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_enc"), r"missing tensors \['b_enc'\]"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unknown tensors \['extra'\]"),
        (lambda t: t.update(W_dec=torch.zeros(99, 24)), r"W_dec is torch.float32 \(99, 24\).*\(100, 24\)"),
        (lambda t: t.update(b_dec=torch.zeros(24).half()), r"b_dec is torch.float16"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        fastsae.load(tmp_path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "mystery"}, "architecture = 'mystery'"),
        ({"k": 0}, "k = 0"),
        ({"colour": "blue"}, "colour"),
        ({"dtype": "int8"}, "dtype is not one of"),
    ],
    ids=["architecture", "k", "unknown key", "dtype"],
)
def test_a_wrong_config_is_named(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        fastsae.load(tmp_path)
    assert "config.json" in str(error.value)


def test_a_config_that_is_not_json_is_named(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "to')
    with pytest.raises(ValueError, match=r"config\.json is not a readable config"):
        fastsae.load(tmp_path)


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    first = build()
    first.save_pretrained(tmp_path)

    def fail(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("fastsae.saes.files.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        build().save_pretrained(tmp_path)
    assert torch.equal(fastsae.load(tmp_path).W_dec, first.W_dec)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
