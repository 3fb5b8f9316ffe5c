"""What fastsae relies on of dictionary_learning, as installed."""

import pytest
import torch
from dictionary_learning import dictionary as library
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from interop.test_dictionary_learning import CASES
from interop.test_dictionary_learning_dictionaries import CALLS, problems_of
from peers.comparison import D_IN, D_SAE

from fastsae.interop import dictionary_learning as drop_ins


def test_a_batch_topk_dictionary_reads_out_by_its_threshold_and_a_topk_one_by_k():
    x = torch.randn(7, D_IN)
    for kind, by_threshold in ((AutoEncoderTopK, False), (BatchTopKSAE, True)):
        sae = kind(D_IN, D_SAE, 5)
        sae.threshold.fill_(0.5)
        torch.testing.assert_close(sae.encode(x), sae.encode(x, use_threshold=by_threshold))
        assert not torch.equal(sae.encode(x), sae.encode(x, use_threshold=not by_threshold))


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_what_the_running_threshold_follows(name):
    """After step 1000: of TopK the mean over tokens of the least positive activation, of BatchTopK the least of all."""
    trainer = CASES[name].build(CASES[name].problems(silent=False)[0])
    x = torch.randn(7, D_IN)
    assert (trainer.threshold_beta, trainer.threshold_start_step) == (0.999, 1000)
    trainer.loss(x, step=1000)
    assert trainer.ae.threshold == -1
    f = trainer.ae.encode(x, use_threshold=False).detach()
    least = f.where(f > 0, torch.inf).min(dim=1).values
    wanted = least.mean() if name == "topk" else least.min()
    trainer.loss(x, step=1001)
    torch.testing.assert_close(trainer.ae.threshold, wanted)
    trainer.ae.threshold.fill_(1.0)
    trainer.loss(x, step=1001)
    torch.testing.assert_close(trainer.ae.threshold, 0.999 + 0.001 * wanted)


def test_auxk_is_without_bias_and_of_activations_above_zero():
    case = CASES["topk"]
    dead = torch.arange(D_SAE) % 8 == 0
    trainer = case.build(case.problems(dead=dead, dead_bias=0.0, silent=False)[0])
    trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
    x = torch.randn(7, D_IN)
    residual = x - trainer.ae(x)
    acts = torch.nn.functional.relu(trainer.ae.encoder(x - trainer.ae.b_dec)) * dead
    wanted = (residual - acts @ trainer.ae.decoder.weight.T).pow(2).sum(dim=1).mean()
    trainer.loss(x, step=0)
    assert trainer.dead_features == 10
    torch.testing.assert_close(trainer.pre_norm_auxk_loss, wanted)


def test_only_that_jumprelu_dictionary_subtracts_b_dec_which_is_told_to():
    sae, x = CALLS["jumprelu"].build(problems_of(CALLS["jumprelu"])[0]), torch.randn(7, D_IN)
    assert sae.apply_b_dec_to_input is False
    assert "apply_b_dec_to_input" not in sae.state_dict()
    _, pre = sae.encode(x, output_pre_jump=True)
    torch.testing.assert_close(pre, x @ sae.W_enc + sae.b_enc)


def test_autoencoder_from_pretrained_normalises_the_decoder(tmp_path):
    sae = library.AutoEncoder(D_IN, D_SAE)
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    for kind in (library.AutoEncoder, drop_ins.AutoEncoder):
        loaded = kind.from_pretrained(str(tmp_path / "ae.pt"))
        torch.testing.assert_close(loaded.decoder.weight.norm(dim=0), torch.ones(D_SAE))
        x = torch.randn(7, D_IN)
        torch.testing.assert_close(loaded(x), sae(x))
