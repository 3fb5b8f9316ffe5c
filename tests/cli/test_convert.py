"""`fastsae convert`: from any format to any that can say the same; else one line and no files."""

import pytest
import torch
from typer.testing import CliRunner

import fastsae
from fastsae.cli import app

# A word to look for may stand at the edge of a terminal.
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


@pytest.fixture
def convert():
    def run(*arguments, exit_code=0):
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)], env=WIDE)
        assert result.exit_code == exit_code, result.output
        return result.output

    return run


def test_through_every_format_and_back(convert, tmp_path):
    sae = fastsae.JumpReLUSAE(8, 32, apply_b_dec_to_input=False, threshold_init=0.3)
    sae.save(tmp_path / "0")
    order = ["saelens", "dictionary_learning", "gemma_scope", "fastsae"]
    for place, format in enumerate(order):
        output = convert(tmp_path / str(place), tmp_path / str(place + 1), "--to", format)
        assert f"JumpReLUSAE 8 → 32 as {format}" in output
    again = fastsae.load(tmp_path / str(len(order)))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_metadata_and_the_source_format(convert, tmp_path):
    fastsae.ReLUSAE(8, 32).save(tmp_path / "a", "saelens")
    convert(tmp_path / "a", tmp_path / "b", "--from", "saelens", "--to", "saelens", "--metadata", "hook_name=h=1")
    assert '"hook_name": "h=1"' in (tmp_path / "b" / "cfg.json").read_text()


def test_what_cannot_be_is_one_line_and_leaves_nothing(convert, tmp_path):
    fastsae.GatedSAE(8, 32).save(tmp_path / "a")
    assert "Error: GatedSAE with architecture = 'gated'" in convert(
        tmp_path / "a", tmp_path / "b", "--to", "sparsify", exit_code=1
    )
    assert not (tmp_path / "b").exists()
    assert "nowhere does not exist" in convert(tmp_path / "nowhere", tmp_path / "b", exit_code=1)
    assert "format = 'onnx'" in convert(tmp_path / "a", tmp_path / "b", "--to", "onnx", exit_code=1)
    assert "expected KEY=VALUE" in convert(tmp_path / "a", tmp_path / "b", "--metadata", "x", exit_code=1)
    assert "exists: expected a new path" in convert(tmp_path / "a", tmp_path / "a", "--to", "saelens", exit_code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_help_is_shown():
    assert "--to" in CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
