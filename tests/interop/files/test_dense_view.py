"""DenseView under SAELens' evaluator, beside SAELens' own SAE, and under what SAEBench asks of a custom SAE."""

import pytest
import sae_lens
import torch
from datasets import Dataset
from interop.files.cases import build
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer, HookedTransformerConfig

import fastsae
from fastsae.interop.dense_view import DenseView
from fastsae.testing import assert_same_bits

HOOK = "blocks.0.hook_resid_post"
EVERY = [
    ("ReLUSAE", {}),
    ("TopKSAE", {"k": 5}),
    ("TopKSAE", {"k": 5, "normalize_activations": "layer_norm", "rescale_by_decoder_norm": True}),
    ("BatchTopKSAE", {"k": 5}),
    ("MatryoshkaSAE", {"k": 5}),
    ("JumpReLUSAE", {"normalize_activations": "scalar"}),
    ("GatedSAE", {}),
    ("JumpReLUSAE", {"d_out": 13}),
]


@pytest.fixture(scope="module")
def model():
    config = HookedTransformerConfig(
        n_layers=1, d_model=24, n_ctx=16, d_head=8, n_heads=3, d_vocab=50, act_fn="gelu", device="cpu", seed=0,
        dtype=torch.float64,
    )  # fmt: skip
    return HookedTransformer(config)


def evaluated(sae, model):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (64, 16), generator=generator)
    store = sae_lens.ActivationsStore.from_sae(
        model,
        sae,
        Dataset.from_dict({"tokens": tokens.tolist()}),
        context_size=16,
        streaming=False,
        store_batch_size_prompts=4,
        sequence_separator_token=None,
    )
    return run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        get_eval_everything_config(
            batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=3
        ),
        exclude_special_tokens=False,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ReLUSAE", {}),
        ("TopKSAE", {"k": 5, "normalize_activations": "layer_norm"}),
        ("JumpReLUSAE", {}),
        ("GatedSAE", {}),
    ],
)
def test_saelens_evaluator_finds_what_it_finds_of_its_own_sae(tmp_path, model, name, options):
    # In float64 hardly anything is left to rounding.
    sae = build(name, options, torch.float64)
    about = {"model_name": "tiny", "hook_name": HOOK, "context_size": 16, "prepend_bos": False}
    sae.save(tmp_path, "saelens", metadata=about)
    metrics, features = evaluated(DenseView(sae, **about), model)
    expected_metrics, expected_features = evaluated(sae_lens.SAE.load_from_disk(tmp_path), model)
    assert metrics.keys() == expected_metrics.keys()
    for group, values in expected_metrics.items():
        for metric, value in values.items():
            # A share of a latent that never fired is 0/0.
            torch.testing.assert_close(metrics[group][metric], value, equal_nan=True)
    assert features.keys() == expected_features.keys()
    for metric, values in expected_features.items():
        torch.testing.assert_close(torch.tensor(features[metric]), torch.tensor(values), equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), EVERY[:-1])
def test_saelens_evaluator_takes_every_sae(model, name, options):
    view = DenseView(build(name, options), hook_name=HOOK, context_size=16, prepend_bos=False)
    metrics, _ = evaluated(view, model)
    assert metrics["sparsity"]["l0"] > 0


@pytest.mark.parametrize(("name", "options"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_dense_and_the_rest_is_the_sae(name, options, dtype):
    sae = build(name, options, dtype)
    view = DenseView(sae)
    x = torch.randn(3, 7, sae.d_in, dtype=dtype)
    dense = view.encode(x)
    assert dense.shape == (3, 7, sae.d_sae)
    assert dense.layout == torch.strided
    assert_same_bits(dense, sae.encode(x).to_dense())
    assert view(x).shape == (3, 7, sae.d_out)
    assert_same_bits(view(x), sae(x).sae_out)
    # Another order of the same sum of a row's entries.
    torch.testing.assert_close(view.decode(dense), view(x))
    assert view.decode(torch.zeros_like(dense)).shape == (3, 7, sae.d_out)
    assert view.W_enc is sae.W_enc
    assert view.W_dec is sae.W_dec
    assert view.b_enc is sae.b_enc
    assert view.b_dec is sae.b_dec
    assert (view.cfg.d_in, view.cfg.d_sae, view.cfg.normalize_activations) == (sae.d_in, sae.d_sae, "none")
    assert hasattr(view, "threshold") == hasattr(sae, "threshold")
    assert list(view.parameters()) == list(sae.parameters())


def test_gradients_reach_the_weights_through_dense_codes():
    sae = build("TopKSAE", {"k": 5})
    view, x = DenseView(sae), torch.randn(7, sae.d_in)
    view.decode(view.encode(x)).square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    view(x).square().sum().backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


def test_to_moves_the_config_too():
    view = DenseView(fastsae.TopKSAE(24, 96, 5), model_name="tiny", hook_layer=3)
    assert view.to(dtype=torch.bfloat16) is view
    assert view.dtype == torch.bfloat16
    assert (view.cfg.dtype, view.cfg.device, view.cfg.model_name, view.cfg.hook_layer) == ("bfloat16", "cpu", "tiny", 3)
    assert view.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoder_norms_are_checked_by_the_rule_of_saebench(dtype):
    sae = fastsae.TopKSAE(24, 96, 5, dtype=dtype)
    assert DenseView(sae).check_decoder_norms()
    sae.W_dec.data[7] *= 1.05
    assert not DenseView(sae).check_decoder_norms()


def test_what_it_cannot_view_is_refused():
    with pytest.raises(ValueError, match="sites = 3"):
        DenseView(fastsae.TopKSAE(24, 96, 5, sites=3))
    with pytest.raises(TypeError, match="colour"):
        DenseView(fastsae.TopKSAE(24, 96, 5), colour="blue")
    view = DenseView(fastsae.TopKSAE(24, 96, 5, normalize_activations="layer_norm"))
    view.encode(torch.randn(4, 24))
    with pytest.raises(ValueError, match=r"tokens \(5,\) and what was encoded last \(4,\)"):
        view.decode(torch.zeros(5, 96))
