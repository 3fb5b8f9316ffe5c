"""sparsify's own Trainer before and after: the same script, with one line more, fastsae.accelerate(trainer).

    python benchmarks/interop_sparsify.py                                                         # some minutes
    python benchmarks/interop_sparsify.py --multi-topk --auxk-alpha 0.03125 --out NAME.json
    python benchmarks/interop_sparsify.py --d-in 64 --d-sae 2048 --tokens 256 --rounds 1          # does it run?

Activations come from a language model of one layer and the width of the SAE, built from a config, with random weights.
Its forward pass is timed alone and taken from the steps for the SAE's part. First a gate: losses of a few steps against
the library in float64 by the rule of the tests.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from interop_runs import Run, arguments, compare, losses_agree, mixture
from torch import Tensor, nn

# Else sparsify decodes by Triton, on a CPU too; and it asks for no file from a hub.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from transformers import GPT2Config, GPT2Model

import fastsae

SEQUENCE = 128
VOCABULARY = 1000


class Tokens(torch.utils.data.Dataset):
    """Random tokens; notes when the first of each batch is asked for: the time between two is a step of the loop."""

    def __init__(self, batches: int, batch_size: int):
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, VOCABULARY, (batches * batch_size, SEQUENCE), generator=generator)
        self._batch_size = batch_size
        self.asked: list[float] = []

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i % self._batch_size == 0:
            self.asked.append(time.perf_counter())
        return {"input_ids": self._ids[i]}

    def first(self, count: int) -> Tensor:
        return self._ids[:count]


def language_model(given: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    heads = max(1, given.d_in // 64)
    sizes = {"n_embd": given.d_in, "n_head": heads, "vocab_size": VOCABULARY, "n_positions": SEQUENCE}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2Model(GPT2Config(n_layer=1, **sizes)).eval()


def coder_config(given: argparse.Namespace) -> SaeConfig:
    return SaeConfig(num_latents=given.d_sae, k=given.k, multi_topk=given.multi_topk, activation=given.activation)


def run(given: argparse.Namespace, side: str) -> Run:
    """One Trainer.fit."""
    batch_size = max(1, given.tokens // SEQUENCE)
    # One batch more: its asking ends the last step that counts.
    tokens, model = Tokens(given.steps + 1, batch_size), language_model(given)
    # It prints what it does, and a progress bar.
    silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, silence[0], silence[1]:
        config = TrainConfig(
            coder_config(given),
            batch_size=batch_size,
            optimizer=given.optimizer,
            auxk_alpha=given.auxk_alpha,
            dead_feature_threshold=given.dead_after,
            hookpoints=["h.0"],
            log_to_wandb=False,
            save_dir=folder,
        )
        trainer = Trainer(config, tokens, model)
        if side == "after":
            fastsae.accelerate(trainer)
        losses: list[float] = []
        for coder in trainer.saes.values():
            coder.register_forward_hook(lambda _, __, out: losses.append(float(out.fvu.detach())))
        trainer.fit()
    seconds = [later - sooner for sooner, later in pairwise(tokens.asked)]
    return Run(seconds, losses[: given.steps], forward_seconds(model, tokens.first(batch_size)))


@torch.no_grad()
def forward_seconds(model: nn.Module, tokens: Tensor) -> float:
    """Of the language model alone, the median of five."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        model(tokens)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def gate(given: argparse.Namespace) -> dict[str, Any]:
    """Losses of a few steps as the Trainer makes them, with Adam: float64 and float32, and accelerated in float32."""
    x = mixture(given.gate_tokens, given.d_in, seed=1)
    losses = []
    for side, dtype in (("before", torch.float64), ("before", torch.float32), ("after", torch.float32)):
        torch.manual_seed(0)
        coder = SparseCoder(given.d_in, coder_config(given)).to(dtype)
        if side == "after":
            fastsae.accelerate(coder)
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(given.gate_steps):
            coder.set_decoder_norm_to_unit_norm()
            out = coder(x.to(dtype))
            (out.fvu + out.multi_topk_fvu / 8).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(out.fvu.detach()))
    return losses_agree(*losses)


def main() -> None:
    more = {
        "optimizer": {
            "choices": ["signum", "adam"],
            "default": "signum",
            "help": "the Trainer's; signum is its default",
        },
        "activation": {"choices": ["topk", "groupmax"], "default": "topk"},
        "multi-topk": {"action": "store_true"},
        "auxk-alpha": {"type": float, "default": 0.0},
        "dead-after": {"type": int, "default": 10_000_000, "help": "tokens after which a latent counts as dead"},
    }
    given = arguments(__doc__.splitlines()[0], "sparsify", **more)
    compare(given, ["eai-sparsify", "transformers"], lambda: gate(given), lambda side: run(given, side))


if __name__ == "__main__":
    main()
