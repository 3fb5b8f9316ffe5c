"""The model under study: one transformer layer with a ReLU MLP, trained on the text at hand."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# The MLP's activations, after its ReLU: what Bricken et al. 2023 take apart.
HOOK = "transformer.h.0.mlp.act"
# Its weights are no part of what `--seed` varies: one model serves every SAE.
_SEED = 0


@dataclass(frozen=True)
class LanguageModelConfig:
    """Size and training of the model. `d_mlp` is Bricken et al.'s 512; the rest is what a minute or two allow.

    Vocabulary, learning rate and starting weights are the best of a few, in bits per byte of held-out text.
    """

    vocab_size: int = 2048
    d_model: int = 128
    d_mlp: int = 512
    n_heads: int = 4
    context: int = 128
    steps: int = 1400
    batch_windows: int = 8
    lr: float = 2e-3
    initializer_range: float = 0.04


def new_language_model(config: LanguageModelConfig, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """The untrained model, the same on every call. PyTorch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=config.context,
                n_embd=config.d_model,
                n_layer=1,
                n_head=config.n_heads,
                n_inner=config.d_mlp,
                activation_function="relu",
                initializer_range=config.initializer_range,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )


def train_language_model(
    model: GPT2LMHeadModel, windows: Tensor, config: LanguageModelConfig, console: Console
) -> float:
    """Trains on token windows [n, context] in a fixed order; returns the mean loss of the last tenth, in nats."""
    generator = torch.Generator().manual_seed(_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    last_losses: list[float] = []
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("  training", total=config.steps, loss="")
        for step in range(config.steps):
            while len(order) < config.batch_windows:
                order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
            batch, order = windows[order[: config.batch_windows]], order[config.batch_windows :]
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _rate(step, config.steps)
            loss = next_token_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            last_losses = [*last_losses, loss.item()][-max(1, config.steps // 10) :]
            progress.update(task, advance=1, loss=f"loss {last_losses[-1]:.2f}")
    model.eval()
    return sum(last_losses) / len(last_losses)


def next_token_loss(model: GPT2LMHeadModel, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each token's successor, in nats."""
    logits = model(input_ids=windows).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _rate(step: int, steps: int) -> float:
    """The learning rate's share of its peak: up over the first twentieth, then down a straight line to a fiftieth."""
    return min((step + 1) / max(1, steps // 20), max(0.02, 1 - step / steps))
