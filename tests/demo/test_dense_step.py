"""The dense step is the same step, and is timed only if it is."""

import pytest
import torch

import fastsae
from fastsae.demo.dense_step import DenseTopK, compare_steps
from fastsae.optim import FusedAdam


def trained_sae(dtype):
    sae = fastsae.TopKSAE(16, 256, 4, auxk=0, normalize_activations="scalar", dtype=dtype)
    sae.set_activation_scale(0.5)
    torch.nn.init.normal_(sae.b_enc, std=0.1)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    return sae


def test_dense_and_fused_steps_agree():
    sae = trained_sae(torch.float64)
    dense = DenseTopK(sae)
    ours, theirs = FusedAdam(sae, lr=1e-3), torch.optim.Adam(dense.parameters(), lr=1e-3)
    for _ in range(5):
        x = torch.randn(64, 16, dtype=torch.float64) + 1
        torch.testing.assert_close(ours.step(x).total, dense.step(x, theirs))
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name).data, parameter.data, msg=name)


def test_comparison_leaves_the_sae_alone():
    sae = trained_sae(torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    times = compare_steps(sae, [torch.randn(64, 16) for _ in range(2)], 1e-3, seconds=0)
    assert times.n_steps == 3
    assert min(times.step_seconds, times.dense_step_seconds) > 0
    assert times.loss_difference < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert not sae.training


def test_no_times_of_steps_that_differ(monkeypatch):
    sae = trained_sae(torch.float32)
    honest = DenseTopK.loss
    monkeypatch.setattr(DenseTopK, "loss", lambda self, x: 1.001 * honest(self, x))
    with pytest.raises(RuntimeError, match="from the same weights"):
        compare_steps(sae, [torch.randn(64, 16)], 1e-3)
