"""What SAELens' own loader makes of sparsify's files: why fastsae reads them itself."""

import json

import pytest
import torch
from interop.saelens_cases import sae_lens
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from safetensors.torch import save_file

D_IN, D_SAE = 8, 32


@pytest.fixture
def folder(tmp_path):
    """As sparsify 1.3 writes it, with the fields that it leaves at their defaults."""
    folder = tmp_path / "layers.3"
    folder.mkdir()
    config = {"d_in": D_IN, "expansion_factor": D_SAE // D_IN, "normalize_decoder": True, "num_latents": 0, "k": 4}
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {
        "encoder.weight": torch.randn(D_SAE, D_IN),
        "encoder.bias": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }
    save_file(tensors, folder / "sae.safetensors")
    return folder


def with_width(folder):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_latents": D_SAE}))
    return folder


def test_the_decoder_is_transposed(folder):
    """Though sparsify stores it as SAELens does; so nothing that sparsify writes can be loaded."""
    config, tensors = sparsify_disk_loader(with_width(folder))
    assert tensors["W_enc"].shape == tensors["W_dec"].shape == (D_IN, D_SAE)
    assert config["dtype"] == "bfloat16"
    with pytest.raises(RuntimeError, match="W_dec"):
        sae_lens.SAE.load_from_disk(folder, converter=sparsify_disk_loader)


def test_the_width_is_taken_at_its_word(folder):
    """0 stands for expansion_factor · d_in."""
    assert sparsify_disk_loader(folder)[0]["d_sae"] == 0


def test_the_bias_is_taken_for_another(folder):
    """sparsify subtracts b_dec whatever becomes of the decoder's norms."""
    assert sparsify_disk_loader(with_width(folder))[0]["apply_b_dec_to_input"] is False
