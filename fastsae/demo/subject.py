"""The language model to study, with its tokenizer and the module to read: trained here, kept from before, or given."""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastsae.activations import hook_module, token_windows
from fastsae.activations.capture import near_modules
from fastsae.demo.cache import fingerprint
from fastsae.demo.corpus import Corpus
from fastsae.demo.language_model import HOOK, LanguageModelConfig, new_language_model, train_language_model
from fastsae.demo.tokenizer import train_tokenizer
from fastsae.durable import replace_folder


@dataclass(frozen=True)
class Subject:
    """A causal language model in eval mode and float32.

    hook: name of the module whose output is studied. name: the model in words. length: tokens in a window.
    training, held_out: the corpus as token windows, int64 [n, length].
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hook: str
    name: str
    length: int
    training: Tensor
    held_out: Tensor


def own_subject(
    corpus: Corpus, config: LanguageModelConfig, hook: str | None, cache: Path, console: Console
) -> Subject:
    """The one-layer model, trained on the corpus unless an earlier run with the same text and settings left it.

    `hook` None is the MLP's activation. Raises ValueError for a hook that the model does not have.
    """
    hook = hook or HOOK
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    key = fingerprint(corpus.training, {"config": asdict(config), "versions": versions})
    folder = cache / f"language-model-{key}"
    if folder.is_dir():
        console.print(f"Language model: kept from an earlier run in {folder}")
        model, tokenizer = _load(folder, f"{folder} holds no whole model: delete that folder and run again")
        hook_module(model, hook)
        training = token_windows(corpus.training, tokenizer, config.context)
    else:
        console.print(f"Language model: one layer, trained once and kept in {folder}")
        tokenizer = train_tokenizer(corpus.training, config.vocab_size, config.context)
        training = token_windows(corpus.training, tokenizer, config.context)
        model = new_language_model(config, tokenizer)
        hook_module(model, hook)
        loss = train_language_model(model, training, config, console)
        console.print(f"  loss {loss:.2f} nats per token after {config.steps:,} steps")
        _keep(folder, model, tokenizer)
    held_out = token_windows(corpus.held_out, tokenizer, config.context)
    return Subject(model, tokenizer, hook, "a one-layer transformer", config.context, training, held_out)


def given_subject(corpus: Corpus, model_name: str, hook: str | None, length: int, console: Console) -> Subject:
    """Any causal language model that transformers can load, from this machine before the Hugging Face hub.

    Weights are read from safetensors alone. Raises ValueError for a model that cannot be loaded, or a hook that is
    missing or unknown.
    """
    try:
        model, tokenizer = _load(model_name, "", local_files_only=True)
    except ValueError as error:
        if Path(model_name).exists():
            raise
        console.print(f"{model_name} is not on this machine: asking the Hugging Face hub")
        advice = f"--model {model_name}: neither a folder nor a model the hub could give ({error})"
        model, tokenizer = _load(model_name, advice, local_files_only=False)
    if hook is None:
        examples = ", ".join(near_modules(model, "mlp.act")) or "a name of model.named_modules()"
        raise ValueError(
            f"--model {model_name} without --hook: name the module whose output to read, such as {examples}"
        )
    hook_module(model, hook)
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    training = token_windows(corpus.training, tokenizer, length)
    held_out = token_windows(corpus.held_out, tokenizer, length)
    return Subject(model, tokenizer, hook, model_name, length, training, held_out)


def _load(
    name: str | Path, advice: str, local_files_only: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=local_files_only, use_safetensors=True)
    except Exception as error:
        # Whatever transformers makes of a damaged or missing file: it raises a dozen kinds.
        raise ValueError(advice or f"--model {name}: {error}") from error
    return model.float().eval().requires_grad_(False), tokenizer


def _keep(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves model and tokenizer as `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".language-model-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
