"""A training run as SAELens' users write it, from a model and a data set to a file, before and after accelerate."""

import pytest
import torch
from datasets import Dataset
from interop.saelens_cases import Case, paths, sae_lens
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

import fastsae
from fastsae.interop.saelens import base

D_MODEL, CONTEXT, VOCABULARY = 16, 16, 29
CASES = [
    Case("topk", sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, {"k": 4}),
    Case("batchtopk", sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {"k": 4}),
    Case("jumprelu", sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig),
]


@pytest.fixture(autouse=True)
def _small_is_sparse(monkeypatch):
    """At these sizes a third of the latents is active."""
    monkeypatch.setattr(base, "MOST_DENSE", 1.0)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (100, CONTEXT), generator=generator)
    return Dataset.from_list([{"input_ids": text} for text in tokens.tolist()])


def run(case, texts, folder, accelerate, normalize):
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=D_MODEL, n_ctx=CONTEXT, d_head=8, d_mlp=32, d_vocab=VOCABULARY, act_fn="gelu", seed=0
        )
    )
    config = LanguageModelSAERunnerConfig(
        sae=case.config_class(d_in=D_MODEL, d_sae=64, normalize_activations=normalize, **case.options),
        model_name="small",
        hook_name="blocks.0.hook_resid_post",
        dataset_path="random",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=CONTEXT,
        prepend_bos=False,
        train_batch_size_tokens=32,
        training_tokens=320,
        n_batches_in_buffer=4,
        n_batches_for_norm_estimate=2,
        store_batch_size_prompts=2,
        lr=1e-3,
        device="cpu",
        seed=0,
        dead_feature_window=3,
        n_checkpoints=1,
        checkpoint_path=str(folder / "checkpoints"),
        output_path=str(folder / "output"),
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(0)
    runner = LanguageModelSAETrainingRunner(config, override_dataset=texts, override_model=model)
    if accelerate:
        fastsae.accelerate(runner)
    sae = runner.run()
    if accelerate:
        assert paths(sae) == {("training_forward_pass", "fastsae")}
    return sae_lens.SAE.load_from_disk(folder / "output")


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run(case, texts, tmp_path, normalize):
    before, after = (
        run(case, texts, tmp_path / str(accelerate), accelerate, normalize) for accelerate in (False, True)
    )
    assert type(after) is type(before)
    torch.testing.assert_close(after.state_dict(), before.state_dict())
    checkpoints = [sorted(path.name for path in (tmp_path / str(flag)).rglob("*")) for flag in (False, True)]
    assert len(checkpoints[0]) == len(checkpoints[1])
