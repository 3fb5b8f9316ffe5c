"""The experiment from text to report."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastsae.activations import activation_batches, capture
from fastsae.demo.cache import cache_folder
from fastsae.demo.corpus import Corpus, read_corpus
from fastsae.demo.dense_step import StepTimes, compare_steps
from fastsae.demo.language_model import LanguageModelConfig
from fastsae.demo.options import DemoOptions
from fastsae.demo.results import Results, as_html, as_json, as_table
from fastsae.demo.subject import Subject, given_subject, own_subject
from fastsae.durable import replace_file
from fastsae.evaluation import evaluate, loss_recovered
from fastsae.interpret import latent_pages, most_telling, record_firings
from fastsae.optim import FusedAdam
from fastsae.saes import TopKSAE
from fastsae.training import TrainConfig, Trainer

# Rows held to be mixed: 32 batches, so that a batch has few tokens of the same text.
_BUFFER_BATCHES = 32
# A latent silent for so many batches gets AuxK's help while there is still time to use it.
_DEAD_AFTER_BATCHES = 100
# Activations that the scale and the start of b_dec are taken from.
_SAMPLE_TOKENS = 8192
_COMPARED_BATCHES = 4
_WINDOWS_AT_ONCE = 32


class Stopwatch:
    """Seconds of each part of the experiment, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Runs the experiment, writes `report.html`, `report.json` and `sae/` into options.out, and returns the report.

    Files are written at the end, each whole or not at all. With the same options, on the same machine and number of
    threads, the SAE is the same bit for bit. Raises ValueError or OSError for options that do not fit together with
    the text or the model.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    watch = Stopwatch()
    with watch.part("text"):
        corpus = read_corpus(options.text)
        console.print(f"Text: {corpus.n_characters / 1e6:,.1f} million characters of {corpus.name}")
    with watch.part("language_model"):
        subject = _subject(options, corpus, console)
    with watch.part("sae"):
        sae, tokens_per_second = _train(options, subject, console)
    console.print("Evaluation on held-out text")
    with watch.part("evaluation"):
        windows = _evenly(subject.held_out, -(-options.eval_tokens // subject.length))
        metrics = evaluate(sae, _activations(subject, windows))
        loss = loss_recovered(subject.model, subject.hook, sae, windows)
    console.print("A step against dense PyTorch")
    with watch.part("step_comparison"):
        times = _compare(options, subject, sae)
    console.print("Telling latents")
    with watch.part("interpretation"):
        firings = record_firings(subject.model, subject.hook, sae, windows)
        latents = most_telling(firings, options.n_latents)
        pages = latent_pages(subject.model, subject.hook, sae, subject.tokenizer, firings, latents)
    results = Results(options, subject, corpus, sae, metrics, loss, times, tokens_per_second, pages, watch.seconds)
    report = _write(options, results)
    console.print(as_table(results))
    return report


def _subject(options: DemoOptions, corpus: Corpus, console: Console) -> Subject:
    config = LanguageModelConfig(steps=options.lm_steps)
    if options.model is not None:
        return given_subject(corpus, options.model, options.hook, config.context, console)
    return own_subject(corpus, config, options.hook, cache_folder(options.cache), console)


def _train(options: DemoOptions, subject: Subject, console: Console) -> tuple[TopKSAE, float]:
    batches = activation_batches(
        subject.model,
        subject.hook,
        subject.training,
        batch_size=options.batch_size,
        capacity=_BUFFER_BATCHES * options.batch_size,
        seed=options.seed,
    )
    sample = torch.cat(list(islice(batches, -(-_SAMPLE_TOKENS // options.batch_size))))
    d_in, steps = sample.shape[1], options.n_steps
    torch.manual_seed(options.seed)
    sae = TopKSAE(
        d_in,
        options.width(d_in),
        options.k,
        normalize_activations="scalar",
        dead_after_tokens=_DEAD_AFTER_BATCHES * options.batch_size,
    )
    sae.estimate_activation_scale(sample)
    sae.initialize_b_dec(sample)
    console.print(f"SAE: {d_in} activations to {sae.d_sae:,} latents, {sae.k} for each token, {steps:,} steps")
    config = TrainConfig(
        steps=steps,
        warmup_steps=steps // 20,
        decay_steps=steps // 2,
        clip_grad_norm=None,
        log_every=20,
        progress=console.is_terminal,
    )
    summary = Trainer(sae, config, FusedAdam(sae, lr=options.lr)).fit(batches)
    return sae.eval(), summary.tokens / summary.seconds


def _activations(subject: Subject, windows: Tensor) -> Iterator[Tensor]:
    """Activations [n, d_in] of windows in order, without each window's first position."""
    for some in windows.split(_WINDOWS_AT_ONCE):
        yield capture(subject.model, subject.hook, some)[:, 1:].flatten(0, 1)


def _evenly(windows: Tensor, n: int) -> Tensor:
    """Up to `n` windows, spread evenly over all of them."""
    return windows[torch.linspace(0, len(windows) - 1, min(n, len(windows))).long()]


def _compare(options: DemoOptions, subject: Subject, sae: TopKSAE) -> StepTimes:
    batches = activation_batches(
        subject.model,
        subject.hook,
        subject.training,
        batch_size=options.batch_size,
        capacity=_COMPARED_BATCHES * options.batch_size,
        seed=options.seed + 1,
    )
    return compare_steps(sae, list(islice(batches, _COMPARED_BATCHES)), options.lr)


def _write(options: DemoOptions, results: Results) -> dict[str, Any]:
    report = as_json(results)
    page = as_html(results)
    options.out.mkdir(parents=True, exist_ok=True)
    results.sae.save_pretrained(options.out / "sae")
    replace_file(options.out / "report.html", page.encode())
    replace_file(options.out / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    return report
