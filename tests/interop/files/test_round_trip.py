"""What a format holds comes back to the bit; what it cannot say is refused before anything is written."""

import pytest
import torch
from interop.files.cases import D_IN, assert_same_sae, both, build

import fastsae
from fastsae.testing import assert_same_bits

NO_B_DEC = {"apply_b_dec_to_input": False}
LAYER_NORM = {"normalize_activations": "layer_norm"}
SAME_WIDTH = {"d_out": D_IN}
RESCALED = {"rescale_by_decoder_norm": True, "normalize_decoder": False}

HELD = {
    "fastsae": [
        ("TopKSAE", {"k": 5}),
        ("MatryoshkaSAE", {"k": 3.5, "widths": [7, 40]}),
        ("GatedSAE", {"normalize_activations": "scalar"}),
    ],
    "saelens": [
        ("ReLUSAE", {}),
        ("ReLUSAE", {**NO_B_DEC, **LAYER_NORM}),
        ("ReLUSAE", {"d_out": 13}),
        ("ReLUSAE", {"d_out": 13, "skip": True}),
        ("TopKSAE", {"k": 5}),
        ("TopKSAE", {"k": 5, **LAYER_NORM, **RESCALED}),
        ("JumpReLUSAE", {}),
        ("JumpReLUSAE", {"d_out": 13}),
        ("JumpReLUSAE", {"d_out": 13, "skip": True}),
        ("GatedSAE", {}),
    ],
    "sparsify": [
        ("TopKSAE", {"k": 5, "relu": "before"}),
        ("TopKSAE", {"k": 4, "relu": "before", "selection": "groupmax"}),
        ("TopKSAE", {"k": 5, "relu": "before", "multi_topk": True, "normalize_decoder": False}),
        ("TopKSAE", {"k": 5, "relu": "before", **SAME_WIDTH}),
        ("TopKSAE", {"k": 5, "relu": "before", **SAME_WIDTH, "skip": True}),
    ],
    "dictionary_learning": [
        ("ReLUSAE", {}),
        ("ReLUSAE", NO_B_DEC),
        ("GatedSAE", {}),
        ("JumpReLUSAE", NO_B_DEC),
        ("TopKSAE", {"k": 5, "relu": "before"}),
        ("BatchTopKSAE", {"k": 5}),
        ("MatryoshkaSAE", {"k": 5, "widths": [7, 40]}),
    ],
    "openai": [("ReLUSAE", {}), ("TopKSAE", {"k": 5, **LAYER_NORM})],
    "openmoss": [
        ("ReLUSAE", NO_B_DEC),
        ("ReLUSAE", SAME_WIDTH),
        ("TopKSAE", {"k": 5, **NO_B_DEC}),
        ("TopKSAE", {"k": 5, **NO_B_DEC, **RESCALED}),
        ("JumpReLUSAE", {"log_threshold": True, **NO_B_DEC}),
    ],
    "gemma_scope": [("JumpReLUSAE", NO_B_DEC), ("JumpReLUSAE", {"d_out": 13})],
}
HELD_CASES = [(format, name, options) for format, cases in HELD.items() for name, options in cases]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "name", "options"), HELD_CASES)
def test_round_trip_is_bit_exact(tmp_path, format, name, options, dtype):
    if format == "gemma_scope" and dtype == torch.bfloat16:
        dtype = torch.float64
    sae = build(name, options, dtype)
    sae.save(tmp_path / "sae", format)
    again = fastsae.load(tmp_path / "sae")
    assert_same_sae(again, sae)
    x = torch.randn(37, D_IN, dtype=dtype)
    for ours, theirs in zip(both(again, x), both(sae, x), strict=True):
        assert_same_bits(ours, theirs)
    assert_same_sae(fastsae.load(tmp_path / "sae", format), sae)


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaSAE"])
def test_saelens_keeps_batchtopk_as_the_jumprelu_it_is_in_inference(tmp_path, name):
    sae = build(name, {"k": 5})
    sae.save(tmp_path, "saelens")
    again = fastsae.load(tmp_path)
    assert type(again) is fastsae.JumpReLUSAE
    x = torch.randn(37, D_IN)
    for ours, theirs in zip(both(again, x), both(sae, x), strict=True):
        assert_same_bits(ours, theirs)


def test_a_batchtopk_without_threshold_is_openmoss(tmp_path):
    sae = build("BatchTopKSAE", {"k": 5, **NO_B_DEC})
    sae.threshold.fill_(-1)
    sae.save(tmp_path, "openmoss")
    assert_same_sae(fastsae.load(tmp_path), sae)


REFUSED = [
    *(
        (format, "TopKSAE", {"k": 5, "sites": 3}, "sites = 3")
        for format in HELD
        if format not in ("fastsae", "gemma_scope")
    ),
    *(
        (format, name, options | {"normalize_activations": "scalar"}, "normalize_activations = 'scalar'")
        for format, name, options in [(format, *cases[0]) for format, cases in HELD.items() if format != "fastsae"]
    ),
    ("saelens", "TopKSAE", {"k": 4, "selection": "groupmax"}, "selection = 'groupmax'"),
    ("saelens", "TopKSAE", {"k": 4, "d_out": 13}, "d_out = 13"),
    ("saelens", "GatedSAE", {"d_out": 13}, "d_out = 13"),
    ("sparsify", "GatedSAE", {}, "architecture = 'gated'"),
    ("sparsify", "BatchTopKSAE", {"k": 5}, "architecture = 'batchtopk'"),
    ("sparsify", "TopKSAE", {"k": 5, **LAYER_NORM}, "normalize_activations = 'layer_norm'"),
    ("sparsify", "TopKSAE", {"k": 5, **RESCALED}, "rescale_by_decoder_norm = True"),
    ("sparsify", "TopKSAE", {"k": 5, "d_out": 13}, "d_out = 13"),
    ("sparsify", "TopKSAE", {"k": 5, **NO_B_DEC}, "apply_b_dec_to_input = False"),
    ("dictionary_learning", "TopKSAE", {"k": 5, "d_out": D_IN}, "d_out = 24"),
    ("dictionary_learning", "TopKSAE", {"k": 5, **NO_B_DEC}, "apply_b_dec_to_input = False"),
    ("dictionary_learning", "TopKSAE", {"k": 5, **RESCALED}, "rescale_by_decoder_norm = True"),
    ("dictionary_learning", "JumpReLUSAE", {}, "apply_b_dec_to_input = True"),
    ("dictionary_learning", "BatchTopKSAE", {"k": 3.5}, "k = 3.5"),
    ("openai", "TopKSAE", {"k": 5}, "normalize_activations = 'none'"),
    ("openai", "ReLUSAE", LAYER_NORM, "normalize_activations = 'layer_norm'"),
    ("openai", "GatedSAE", {}, "architecture = 'gated'"),
    ("openmoss", "TopKSAE", {"k": 5}, "apply_b_dec_to_input = True"),
    ("openmoss", "JumpReLUSAE", NO_B_DEC, "log_threshold = False"),
    ("openmoss", "BatchTopKSAE", {"k": 5, **NO_B_DEC}, "threshold = 0.7"),
    ("openmoss", "GatedSAE", NO_B_DEC, "architecture = 'gated'"),
    ("gemma_scope", "ReLUSAE", NO_B_DEC, "architecture = 'relu'"),
    ("gemma_scope", "JumpReLUSAE", {}, "apply_b_dec_to_input = True"),
    ("gemma_scope", "JumpReLUSAE", {"d_out": 13, "skip": True}, "skip = True"),
]


@pytest.mark.parametrize(("format", "name", "options", "what"), REFUSED)
def test_what_a_format_cannot_say_is_refused(tmp_path, format, name, options, what):
    with pytest.raises(ValueError, match=f"{name} with .*{what}.* has no form in"):
        build(name, options).save(tmp_path / "sae", format)
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
def test_a_batchtopk_that_has_learned_no_threshold_is_refused(tmp_path, format):
    sae = build("BatchTopKSAE", {"k": 5})
    sae.threshold.fill_(-1)
    with pytest.raises(ValueError, match="no threshold yet"):
        sae.save(tmp_path, format)


def test_gemma_scope_has_no_bfloat16(tmp_path):
    with pytest.raises(ValueError, match=r"dtype = torch\.bfloat16"):
        build("JumpReLUSAE", NO_B_DEC, torch.bfloat16).save(tmp_path, "gemma_scope")


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="format = 'onnx': expected one of 'fastsae', 'saelens'"):
        build("ReLUSAE", {}).save(tmp_path, "onnx")
    with pytest.raises(ValueError, match="format = 'onnx'"):
        fastsae.load(tmp_path, "onnx")


@pytest.mark.parametrize(("format", "file"), [("openai", "layer_8.pt"), ("gemma_scope", "average_l0_71.npz")])
def test_formats_of_one_file_take_its_name(tmp_path, format, file):
    sae = build(*HELD[format][0])
    sae.save(tmp_path / "deep" / file, format)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [file]
    assert_same_sae(fastsae.load(tmp_path / "deep" / file), sae)


@pytest.mark.parametrize("format", [format for format in HELD if format not in ("openai", "gemma_scope")])
def test_a_file_of_a_pair_stands_for_its_folder(tmp_path, format):
    sae = build(*HELD[format][0])
    sae.save(tmp_path, format)
    for file in tmp_path.iterdir():
        assert_same_sae(fastsae.load(file), sae)


def test_files_of_two_formats_ask_for_one(tmp_path):
    sae = build("ReLUSAE", {})
    sae.save(tmp_path, "saelens")
    sae.save(tmp_path, "fastsae")
    with pytest.raises(ValueError, match=r"several formats: pass format="):
        fastsae.load(tmp_path)
    assert_same_sae(fastsae.load(tmp_path, "saelens"), sae)


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"holds no SAE that fastsae knows: expected model\.safetensors \(fastsae\)"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize(("format", "name", "options"), [(format, *cases[0]) for format, cases in HELD.items()])
def test_a_failed_write_leaves_the_previous_files(tmp_path, monkeypatch, format, name, options):
    first = build(name, options)
    first.save(tmp_path, format)
    names = sorted(path.name for path in tmp_path.iterdir())

    def fail(path):
        raise OSError("No space left on device")

    monkeypatch.setattr("fastsae.durable.sync", fail)
    with pytest.raises(OSError, match="No space left"):
        build(name, options).save(tmp_path, format)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert_same_sae(fastsae.load(tmp_path), first)


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
def test_a_threshold_is_rounded_only_where_the_encoder_rounds_it_too(tmp_path, format):
    sae = build("BatchTopKSAE", {"k": 5})
    sae.threshold.fill_(0.7 + 1e-12)
    sae.save(tmp_path, format)
    again, x = fastsae.load(tmp_path), torch.randn(37, D_IN)
    for ours, theirs in zip(both(again, x), both(sae, x), strict=True):
        assert_same_bits(ours, theirs)
    with pytest.raises(ValueError, match="a threshold beyond float32"):
        sae.double().save(tmp_path, format)


@pytest.mark.parametrize("format", HELD)
def test_metadata_has_a_place_or_is_refused(tmp_path, format):
    sae = build(*HELD[format][0])
    if format in ("saelens", "dictionary_learning", "openmoss"):
        sae.save(tmp_path, format, metadata={"hook_point_in": "a name", "hook_point_out": "a name"})
        assert any("a name" in path.read_text() for path in tmp_path.glob("*.json"))
        for value in (object(), float("nan")):
            with pytest.raises(ValueError, match=r"metadata = .*expected what JSON can hold"):
                sae.save(tmp_path / "other", format, metadata={"hook_name": value})
    else:
        with pytest.raises(ValueError, match=f"format '{format}' has no place for it"):
            sae.save(tmp_path / "other", format, metadata={"hook_name": "a name"})
    assert not (tmp_path / "other").exists()
