"""The numbers of a run, and the three forms they are shown in."""

import platform
from dataclasses import asdict, dataclass
from typing import Any

import tokenizers
import torch
import transformers
from rich.table import Table

import fastsae
from fastsae.backends.screen import screen_dtype
from fastsae.demo.corpus import Corpus
from fastsae.demo.dense_step import StepTimes
from fastsae.demo.options import DemoOptions
from fastsae.demo.subject import Subject
from fastsae.evaluation import LossRecovered, SAEMetrics
from fastsae.interpret import LatentPage, density_histogram, render_report
from fastsae.interpret.report import Fact
from fastsae.saes import TopKSAE


@dataclass(frozen=True)
class Results:
    """Everything that a run found; `seconds` of each of its parts by name."""

    options: DemoOptions
    subject: Subject
    corpus: Corpus
    sae: TopKSAE
    metrics: SAEMetrics
    loss: LossRecovered
    times: StepTimes
    tokens_per_second: float
    pages: list[LatentPage]
    seconds: dict[str, float]


def as_json(results: Results) -> dict[str, Any]:
    """The content of report.json: numbers at the top, then how they came about. Seconds, nats, fractions of 1."""
    metrics, loss, times = results.metrics, results.loss, results.times
    return {
        "loss_recovered": _number(loss.fraction),
        "explained_variance": _number(metrics.explained_variance),
        "l0": metrics.l0,
        "dead_fraction": metrics.dead_fraction,
        "step_seconds": times.step_seconds,
        "dense_step_seconds": times.dense_step_seconds,
        "seed": results.options.seed,
        "cross_entropy": {"original": loss.ce_original, "sae": loss.ce_sae, "zero": loss.ce_zero},
        "evaluation_tokens": metrics.n_tokens,
        "step_comparison": {
            "batch_size": results.options.batch_size,
            "timed_steps": times.n_steps,
            "relative_loss_difference": times.loss_difference,
            "precision": _precision(results.sae),
        },
        "training_tokens_per_second": results.tokens_per_second,
        "seconds": {**results.seconds, "total": sum(results.seconds.values())},
        "telling_latents": [page.latent for page in results.pages],
        "model": {"name": results.subject.name, "hook": results.subject.hook, "window": results.subject.length},
        "text": {"name": results.corpus.name, "characters": results.corpus.n_characters},
        "sae": {"architecture": results.sae.architecture, **results.sae.config()},
        "options": {name: _plain(value) for name, value in asdict(results.options).items()},
        "versions": _versions(results.sae),
    }


def as_table(results: Results) -> Table:
    """The table that the terminal shows."""
    table = Table("", "", "", title=_title(results), show_header=False, title_justify="left", title_style="bold")
    table.columns[1].justify = "right"
    for fact in (*_facts(results), *_timing(results)):
        table.add_row(fact.name, fact.value, fact.meaning)
    table.add_section()
    table.add_row("report", "", str(results.options.out / "report.html"))
    table.add_row("SAE", "", f"fastsae.load({str(results.options.out / 'sae')!r})")
    return table


def as_html(results: Results) -> str:
    """The content of report.html."""
    report = as_json(results)
    return render_report(
        title=_title(results),
        subtitle=(
            f"Activations of {results.subject.hook} in {results.subject.name}, on {results.corpus.name}. "
            f"{results.sae.k} latents stand for each token's {results.sae.d_in} numbers."
        ),
        facts=_facts(results),
        timing=_timing(results),
        details=_flat({name: report[name] for name in ("model", "text", "sae", "options", "seconds", "versions")}),
        histogram=density_histogram(results.metrics.density, results.metrics.n_tokens),
        pages=results.pages,
    )


def _title(results: Results) -> str:
    return f"Sparse autoencoder, {results.sae.d_in} activations to {results.sae.d_sae:,} latents"


def _facts(results: Results) -> list[Fact]:
    metrics, loss = results.metrics, results.loss
    return [
        Fact(
            "Loss recovered",
            f"{loss.fraction:.1%}",
            f"cross-entropy {loss.ce_original:.3f} as it is, {loss.ce_sae:.3f} with the SAE spliced in, "
            f"{loss.ce_zero:.3f} with zeros",
        ),
        Fact("Explained variance", f"{metrics.explained_variance:.1%}", "of the activations, on held-out text"),
        Fact("L0", f"{metrics.l0:.1f}", f"active latents of a token, of {results.sae.d_sae:,}"),
        Fact("Dead latents", f"{metrics.dead_fraction:.1%}", f"never active on {metrics.n_tokens:,} held-out tokens"),
    ]


def _timing(results: Results) -> list[Fact]:
    times = results.times
    return [
        Fact(
            "fastsae",
            f"{1e3 * times.step_seconds:,.0f} ms",
            f"a step of {results.options.batch_size:,} tokens, median of {times.n_steps}; {_precision(results.sae)}",
        ),
        Fact(
            "Dense PyTorch",
            f"{1e3 * times.dense_step_seconds:,.0f} ms",
            f"the same step with [tokens, latents] tensors and autograd, float32; from equal weights the two losses "
            f"{f'differ by {times.loss_difference:.0e}' if times.loss_difference else 'are equal'}",
        ),
        Fact("Ratio", f"{times.dense_step_seconds / times.step_seconds:.1f}×", "steps timed in turn, in the same run"),
    ]


def _precision(sae: TopKSAE) -> str:
    """What the fast step computes in, in words."""
    choice = fastsae.explain(sae).choices["encode_topk"]
    dtype = str(sae.dtype).removeprefix("torch.")
    if choice.backend != "cpu":
        return dtype
    return f"{dtype}, latents screened in {str(screen_dtype()).removeprefix('torch.')} with a proof that none is missed"


def _versions(sae: TopKSAE) -> dict[str, str]:
    return {
        "fastsae": fastsae.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "backend": fastsae.explain(sae).heading,
        "threads": str(torch.get_num_threads()),
    }


def _number(value: float) -> float | None:
    """None for what JSON cannot hold: a NaN, where a ratio has no denominator."""
    return value if abs(value) < float("inf") else None


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, str]:
    """One line for each setting: "model: hook" and so on."""
    return {
        f"{section}: {name.replace('_', ' ')}": f"{value:.4g}" if isinstance(value, float) else str(value)
        for section, values in sections.items()
        for name, value in values.items()
        if value is not None
    }
