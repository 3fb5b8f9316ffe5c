"""dictionary_learning's files, held to the library as installed: what it writes is read, and the other way round."""

import json

import pytest
import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from interop.files.cases import D_IN, D_SAE, assert_as_its_library, assert_same_sae

import fastsae
from fastsae.testing import assert_same_bits

GROUPS = [7, 33, 56]
# dict_class, how it is built, and fastsae's class.
CLASSES = {
    "AutoEncoder": (lambda: dictionary.AutoEncoder(D_IN, D_SAE), fastsae.ReLUSAE),
    "AutoEncoderNew": (lambda: dictionary.AutoEncoderNew(D_IN, D_SAE), fastsae.ReLUSAE),
    "GatedAutoEncoder": (lambda: dictionary.GatedAutoEncoder(D_IN, D_SAE), fastsae.GatedSAE),
    "JumpReluAutoEncoder": (lambda: dictionary.JumpReluAutoEncoder(D_IN, D_SAE), fastsae.JumpReLUSAE),
    "AutoEncoderTopK": (lambda: AutoEncoderTopK(D_IN, D_SAE, 5), fastsae.TopKSAE),
    "BatchTopKSAE": (lambda: BatchTopKSAE(D_IN, D_SAE, 5), fastsae.BatchTopKSAE),
    "MatryoshkaBatchTopKSAE": (lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, 5, GROUPS), fastsae.MatryoshkaSAE),
}
DTYPES = [torch.float32, torch.bfloat16]


def theirs(dict_class, dtype=torch.float32):
    ae = CLASSES[dict_class][0]()
    with torch.no_grad():
        for key, parameter in ae.named_parameters():
            if key == "threshold":
                parameter.copy_(torch.rand_like(parameter) - 0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if "threshold" in dict(ae.named_buffers()):
            ae.threshold.fill_(0.65)
    return ae.to(dtype)


def save(ae, folder, dict_class, file="ae.pt", **trainer):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: tensor.cpu() for key, tensor in ae.state_dict().items()}, folder / file)
    config = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "lr": 1e-3, **trainer}
    if hasattr(ae, "k"):
        config["k"] = int(ae.k)
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {}}))


def run(ae, x):
    f = ae.encode(x)
    return f, ae.decode(f)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dict_class", CLASSES)
def test_reads_what_the_library_saves(tmp_path, dict_class, dtype):
    original = theirs(dict_class, dtype)
    save(original, tmp_path, dict_class)
    sae = fastsae.load(tmp_path)
    assert type(sae) is CLASSES[dict_class][1]
    assert sae.dtype == dtype
    assert_as_its_library(sae, original, run, torch.randn(37, D_IN, dtype=dtype))


@pytest.mark.parametrize("dict_class", CLASSES)
def test_the_library_reads_what_is_written(tmp_path, dict_class, monkeypatch):
    original = theirs(dict_class)
    save(original, tmp_path / "theirs", dict_class)
    sae = fastsae.load(tmp_path / "theirs")
    sae.save(tmp_path / "ours", "dictionary_learning", metadata={"lm_name": "tiny", "layer": 3})
    # It would fold decoder norms into the encoder, unasked, which changes bits.
    monkeypatch.setattr(dictionary.AutoEncoder, "normalize_decoder", lambda self: None)
    again = type(original).from_pretrained(str(tmp_path / "ours" / "ae.pt"))
    trainer = json.loads((tmp_path / "ours" / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == dict_class
    assert (trainer["lm_name"], trainer["layer"]) == ("tiny", 3)
    if hasattr(original, "k"):
        assert trainer["k"] == 5
    for key, tensor in original.state_dict().items():
        if dict_class == "AutoEncoderTopK" and key == "threshold":
            continue
        assert_same_bits(again.state_dict()[key], tensor)
    x = torch.randn(37, D_IN)
    with torch.no_grad():
        for a, b in zip(run(again, x), run(original, x), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dict_class", CLASSES)
def test_checkpoints_of_a_run(tmp_path, dict_class):
    original = theirs(dict_class)
    save(original, tmp_path, dict_class, file="checkpoints/ae_1000.pt")
    sae = fastsae.load(tmp_path / "checkpoints" / "ae_1000.pt")
    assert_as_its_library(sae, original, run, torch.randn(37, D_IN))


def interrupted(ae, dict_class, norm_factor):
    """What trainSAE(backup_steps=...) leaves as ae.pt until the run ends."""
    optimizer = torch.optim.Adam(ae.parameters())
    run(ae, torch.randn(8, D_IN))[1].sum().backward()
    optimizer.step()
    config = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "submodule_name": None}
    state = {"step": 500, "ae": ae.state_dict(), "optimizer": optimizer.state_dict(), "config": config}
    return state | {"norm_factor": norm_factor}


@pytest.mark.parametrize("norm_factor", [None, 2.5])
@pytest.mark.parametrize("dict_class", [name for name in CLASSES if name != "AutoEncoderNew"])
def test_an_interrupted_run(tmp_path, dict_class, norm_factor):
    original = theirs(dict_class)
    torch.save(interrupted(original, dict_class, norm_factor), tmp_path / "ae.pt")
    sae = fastsae.load(tmp_path)
    if norm_factor is not None:
        # As trainSAE does once the run ends.
        original.scale_biases(norm_factor)
    finished = tmp_path / "finished"
    save(original, finished, dict_class)
    assert_same_sae(sae, fastsae.load(finished))
    assert_as_its_library(sae, original, run, torch.randn(37, D_IN))


def test_an_unset_threshold_is_refused(tmp_path):
    original = BatchTopKSAE(D_IN, D_SAE, 5)
    save(original, tmp_path, "BatchTopKSAE")
    x = torch.randn(5, D_IN)
    # relu(pre) > -1 holds everywhere.
    assert_same_bits(original.encode(x), original.encoder(x - original.b_dec).relu())
    with pytest.raises(ValueError, match=r"ae\.pt: threshold = -1: expected one of at least 0"):
        fastsae.load(tmp_path)


def test_the_library_folds_norms_of_autoencoder_when_it_loads(tmp_path):
    original = theirs("AutoEncoder")
    save(original, tmp_path, "AutoEncoder")
    loaded = dictionary.AutoEncoder.from_pretrained(str(tmp_path / "ae.pt"))
    norms = original.decoder.weight.norm(dim=0)
    sae, x = fastsae.load(tmp_path), torch.randn(37, D_IN)
    codes = sae.encode(x)
    torch.testing.assert_close(loaded.encode(x), codes.to_dense() * norms)
    torch.testing.assert_close(loaded(x), sae.decode(codes))


def rewrite(folder, change):
    path = folder / "ae.pt"
    values = torch.load(path, weights_only=True)
    change(values)
    torch.save(values, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("k"), r"ae\.pt: the tensor 'k' is missing"),
        (lambda values: values.update(k=torch.tensor(0, dtype=torch.int32)), "k = 0: expected at least 1"),
        (lambda values: values.update(k=torch.tensor(7, dtype=torch.int32)), r"config\.json.*k is not 7"),
        (lambda values: values.update(k=torch.tensor(5.0)), r"k is torch\.float32: expected torch\.int32"),
        (lambda values: values.update(extra=torch.zeros(2)), r"unknown tensors \['extra'\]"),
        (lambda values: values.update(group_sizes=torch.tensor([7, 90])), r"group_sizes = \[7, 90\]"),
        (lambda values: values.update(group_sizes=torch.tensor([-4, 100])), r"group_sizes = \[-4, 100\]"),
        (lambda values: values.update(b_enc=torch.zeros(3)), r"b_enc has shape \(3,\): expected \(96,\)"),
        (lambda values: values.update(b_enc=None), "b_enc is a NoneType: expected a tensor"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    save(theirs("MatryoshkaBatchTopKSAE"), tmp_path, "MatryoshkaBatchTopKSAE")
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        fastsae.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_missing_or_wrong_config_is_named(tmp_path):
    save(theirs("GatedAutoEncoder"), tmp_path, "IdentityDict")
    with pytest.raises(ValueError, match=r"config\.json: trainer: dict_class = 'IdentityDict': expected one of"):
        fastsae.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist.*dict_class"):
        fastsae.load(tmp_path)
