"""Damaged and hostile files: an error that names the file, nothing executed, nothing half-loaded."""

import io
import json
import os
import pickle
import zipfile

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from interop.files.cases import build
from interop.files.test_round_trip import HELD
from safetensors.torch import load_file, save_file

import fastsae

FIRST = [(format, *cases[0]) for format, cases in HELD.items()]
PICKLES = {"dictionary_learning": "ae.pt", "openai": "autoencoder.pt"}
JSON = {
    "fastsae": "config.json",
    "saelens": "cfg.json",
    "sparsify": "cfg.json",
    "dictionary_learning": "config.json",
    "openmoss": "config.json",
}
# The examples share a folder, written anew by each.
SHARED = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder, format):
    """The files of one SAE of a format, by name."""
    folder.mkdir(exist_ok=True)
    build(*HELD[format][0]).save(folder, format)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(path, format=None, kinds=(ValueError,)):
    """Loads; the error of one of these kinds that refused it, else None for an SAE that is whole."""
    try:
        sae = fastsae.load(path, format)
    except kinds as error:
        return str(error)
    assert all(parameter.device.type == "cpu" for parameter in sae.parameters())
    return None


@pytest.mark.parametrize("format", HELD)
@given(data=st.data())
@SHARED
def test_truncated_files_are_refused(tmp_path, format, data):
    files = written(tmp_path / "sae", format)
    name = data.draw(st.sampled_from(sorted(files)))
    kept = data.draw(st.integers(0, len(files[name]) - 2))
    (tmp_path / "sae" / name).write_bytes(files[name][:kept])
    assert str(tmp_path) in refused(tmp_path / "sae", format)


@pytest.mark.parametrize("format", HELD)
@given(data=st.data())
@SHARED
def test_flipped_bytes_are_read_or_refused(tmp_path, format, data):
    files = written(tmp_path / "sae", format)
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    # Most of a file is weights, where any byte is good; what is parsed stands at the ends.
    end = min(len(content), 700) - 1
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        content[at if data.draw(st.booleans()) else -at - 1] = data.draw(st.integers(0, 255))
    (tmp_path / "sae" / name).write_bytes(content)
    # A byte of a name makes a file that is missing something, which may be the file itself.
    assert str(tmp_path) in (refused(tmp_path / "sae", format, (ValueError, FileNotFoundError)) or str(tmp_path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, "float32", "topk"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.parametrize("format", JSON)
@given(data=st.data())
@SHARED
def test_wrong_values_of_a_config_are_refused_or_mean_the_same(tmp_path, format, data):
    files = written(tmp_path / "sae", format)
    config = json.loads(files[JSON[format]])
    part = config["trainer"] if format == "dictionary_learning" else config
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(VALUES)
    (tmp_path / "sae" / JSON[format]).write_text(json.dumps(config))
    assert str(tmp_path) in (refused(tmp_path / "sae", format) or str(tmp_path))


@pytest.mark.parametrize("format", JSON)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        "{",
        '{"d_in": NaN}',
        '{"d_in": Infinity}',
        '{"d_in": 1e999}',
        '{"d_in": ' + "9" * 5000 + "}",
        '{"d_in": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"d_in": "' + "a" * (1 << 24) + '"}',
        "\xff\xfe",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_json_is_refused(tmp_path, format, text):
    written(tmp_path, format)
    (tmp_path / JSON[format]).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{JSON[format]} is not a readable config"):
        fastsae.load(tmp_path, format)


@pytest.mark.parametrize("format", JSON)
@pytest.mark.parametrize("sizes", [(10**9, 10**9), (2**31, 4), (2**62, 2**62), (10**30, 1), (True, 4), (24.0, 96)])
def test_sizes_that_are_not_those_of_the_tensors_take_no_memory(tmp_path, format, sizes):
    config = json.loads(written(tmp_path, format)[JSON[format]])
    names = {"dictionary_learning": ("activation_dim", "dict_size"), "sparsify": ("d_in", "num_latents")}
    names |= {"openmoss": ("d_model", "expansion_factor")}
    part = config["trainer"] if format == "dictionary_learning" else config
    part.update(zip(names.get(format, ("d_in", "d_sae")), sizes, strict=True))
    (tmp_path / JSON[format]).write_text(json.dumps(config))
    assert str(tmp_path) in refused(tmp_path, format)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [0, 2, 4, "torch"])
@pytest.mark.parametrize(("format", "name"), PICKLES.items())
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, format, name, protocol):
    written(tmp_path, format)
    marker = tmp_path / "ran"
    state = torch.load(tmp_path / name, weights_only=True) | {"extra": Payload(marker)}
    if protocol == "torch":
        torch.save(state, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(state, protocol=protocol))
    with pytest.raises(ValueError, match=f"{name} is not a whole file of tensors and plain values.*nothing in it was"):
        fastsae.load(tmp_path, format)
    assert not marker.exists()
    # It would have run.
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.mark.parametrize(("format", "name"), PICKLES.items())
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(3, device="meta"),
        torch.zeros(3, 3).to_sparse(),
        {"nested": torch.zeros(3)},
        [torch.zeros(3)],
        None,
        "text",
    ],
    ids=["expanded", "meta", "sparse", "dict", "list", "none", "text"],
)
def test_what_is_no_plain_tensor_is_named(tmp_path, format, name, value):
    written(tmp_path, format)
    state = torch.load(tmp_path / name, weights_only=True)
    state["encoder.weight"] = value
    torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: encoder\.weight"):
        fastsae.load(tmp_path, format)


@pytest.mark.parametrize(("format", "name"), PICKLES.items())
@pytest.mark.parametrize(
    "value", [3, [1, 2], {1: torch.zeros(2)}, torch.zeros(2)], ids=["int", "list", "keys", "tensor"]
)
def test_a_pickle_of_something_else_is_named(tmp_path, format, name, value):
    written(tmp_path, format)
    torch.save(value, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} holds a .*expected a dict"):
        fastsae.load(tmp_path, format)


def test_an_npz_of_objects_is_refused_and_not_run(tmp_path):
    written(tmp_path, "gemma_scope")
    marker = tmp_path / "ran"
    arrays = dict(np.load(tmp_path / "params.npz"))
    np.savez(tmp_path / "params.npz", **arrays | {"threshold": np.array([Payload(marker)], dtype=object)})
    with pytest.raises(ValueError, match=r"params\.npz is not a whole \.npz file of numbers"):
        fastsae.load(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("shape", ["(10000000000, 10000000000)", "(2305843009213693952, 8)", "(-1, 4)", "(1e3,)", "()"])
def test_an_npz_that_claims_more_than_it_holds_takes_no_memory(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    array = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header.encode() + bytes(64)
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", array)
    with pytest.raises(ValueError, match=r"params\.npz"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize("descr", ["<i4", "<c8", "|S4", "<M8[s]", "[('a', '<f4')]"])
def test_an_npz_of_other_numbers_is_named(tmp_path, descr):
    arrays = dict(np.load(io.BytesIO(written(tmp_path, "gemma_scope")["params.npz"])))
    dtype = np.dtype([("a", "<f4")]) if descr.startswith("[") else np.dtype(descr)
    np.savez(tmp_path / "params.npz", **arrays | {"b_enc": np.zeros(96, dtype=dtype)})
    with pytest.raises(ValueError, match=r"params\.npz"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize("format", ["fastsae", "saelens", "sparsify", "openmoss"])
@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "integers"])
def test_every_wrong_tensor_is_named(tmp_path, format, change):
    names = [name for name in written(tmp_path, format) if name.endswith(".safetensors")]
    path = tmp_path / names[0]
    whole = load_file(path)
    for name in whole:
        tensors = dict(whole)
        if change == "missing":
            del tensors[name]
        elif change == "unknown":
            tensors[f"{name}_"] = tensors[name].clone()
        elif change == "shape":
            tensors[name] = torch.zeros(*tensors[name].shape, 1)
        else:
            tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int32)
        save_file(tensors, path)
        with pytest.raises(ValueError, match=name) as error:
            fastsae.load(tmp_path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("format", ["sparsify", "dictionary_learning", "openai", "openmoss"])
def test_mixed_dtypes_are_refused(tmp_path, format):
    sae = build(*HELD[format][0])
    sae.b_enc.data = sae.b_enc.data.half()
    sae.save(tmp_path, format)
    with pytest.raises(ValueError, match=r"b_enc is torch\.float16 and W_dec torch\.float32: expected one dtype"):
        fastsae.load(tmp_path)


@pytest.mark.parametrize(("format", "name", "options"), FIRST)
def test_a_missing_file_is_named(tmp_path, format, name, options):
    for file in written(tmp_path, format):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).unlink()
        with pytest.raises(FileNotFoundError, match=file.replace(".", r"\.")):
            fastsae.load(tmp_path, format)
        (tmp_path / file).write_bytes(content)
