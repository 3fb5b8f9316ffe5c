"""The training loop."""

import math
import os
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from fastsae.optim import FusedAdam
from fastsae.saes import SAE, SAELoss, load
from fastsae.training import checkpoint
from fastsae.training.config import TrainConfig
from fastsae.training.log import json_lines
from fastsae.training.optimizer_state import parameter_names
from fastsae.training.progress import ProgressBar, progress_bar
from fastsae.training.record import Record, measure
from fastsae.training.resample import resample_dead_
from fastsae.training.schedule import scheduled, warmup_and_decay
from fastsae.training.update import update

# The settings of OpenAI's sparse_autoencoder/train.py; its betas are torch's.
OPENAI_ADAM = {"betas": (0.9, 0.999), "eps": 6.25e-10}


@dataclass(frozen=True)
class TrainSummary:
    """Where a run stands after `fit`.

    steps, tokens, seconds: finished steps, tokens seen, wall-clock time; those before a resumed checkpoint included.
    seconds_per_step: median over this `fit`, from a batch in hand to the updated weights, on the host's clock.
    loss: the parts of the last step's loss by name: total, mse, fvu, auxk.
    l0: mean number of active latents of a token in the last step.
    dead_fraction: latents that have not fired for the SAE's `dead_after_tokens` tokens, of all.

    If there was no step left to do, loss is empty and the last three numbers are NaN.
    """

    steps: int
    tokens: int
    seconds: float
    seconds_per_step: float
    loss: dict[str, float]
    l0: float
    dead_fraction: float


class Trainer:
    """Trains an SAE with any torch optimizer.

    A step is: loss, backward, projection of the decoder's gradient, clipping, optimizer, unit decoder rows, learning
    rate (see `fastsae.training.update`). `sae.register_optimizer_hooks` is not needed. Schedules of the config change
    the SAE's k and sparsity coefficients for the length of a step.

    Args:
        sae: the SAE to train, on its device.
        config: TrainConfig.
        optimizer: built from sae.parameters(), with its own learning rate. None is Adam with OpenAI's settings: betas
            (0.9, 0.999), eps 6.25e-10, fused. A fastsae.optim.FusedAdam has no gradients to clip: it needs
            `clip_grad_norm=None`, and clips by its own `clip_norm`.

    Attributes:
        step, tokens, seconds: finished steps, tokens seen and wall-clock time so far.

    Raises ValueError for an optimizer of other parameters, or FusedAdam with clipping.

        trainer = Trainer(sae, TrainConfig(steps=10_000, warmup_steps=500, decay_steps=2_000))
        summary = trainer.fit(batches)
    """

    def __init__(self, sae: SAE, config: TrainConfig, optimizer: Optimizer | None = None):
        self.sae = sae
        self.config = config
        self.optimizer = _adam(sae, config) if optimizer is None else optimizer
        parameter_names(self.optimizer, sae)
        if isinstance(self.optimizer, FusedAdam) and config.clip_grad_norm is not None:
            raise ValueError(
                f"clip_grad_norm = {config.clip_grad_norm} with FusedAdam, which has no gradients to clip: expected "
                f"clip_grad_norm=None and FusedAdam(sae, clip_norm={config.clip_grad_norm})"
            )
        if config.k_start is not None and not hasattr(sae, "k"):
            raise ValueError(f"k_start = {config.k_start} for a {type(sae).__name__}: expected None, as it has no k")
        self.scheduler = warmup_and_decay(self.optimizer, config)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0

    def fit(self, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> TrainSummary:
        """Trains on batches of raw activations [..., d_in], of any sizes, until `config.steps` steps are done.

        For a transcoder each batch is a pair, activations and targets.

        It takes no more batches than it uses. A resumed trainer goes on with the first batch given: pass what follows
        the first `trainer.step` batches. If batches end early, a RuntimeWarning says so; call `fit` again with more to
        go on. Batches are moved to the SAE's device. The SAE is left in training mode.

        Raises:
            TypeError: a batch is no tensor.
            ValueError: there is no batch at all; a batch is of another width, or has fewer than two tokens;
                `checkpoint_dir` holds a later step, so another run's; `log_path` holds something other than a log.
            FloatingPointError: the loss or the gradient norm is not finite. They are looked at on recorded steps alone
                (elsewhere it would cost a synchronisation), so the cause may lie up to `log_every` steps back. A step
                is recorded before its checkpoint is written, so that no checkpoint holds it.
        """
        config, steps = self.config, range(self.step, self.config.steps)
        began, durations = time.perf_counter() - self.seconds, array("d")
        last: Record | None = None
        if config.checkpoint_dir is not None:
            checkpoint.check_none_beyond(config.checkpoint_dir, self.step)
        self.sae.train()
        with (
            json_lines(config.log_path, self.step) as write,
            progress_bar(config.progress, config.steps, self.step) as bar,
        ):
            # The range stands first, so that zip takes no batch beyond the last step.
            for _, batch in zip(steps, batches, strict=False):
                pair = batch if self.sae.is_transcoder else (batch,)
                _check_batch(pair, self.sae.is_transcoder, self.step + 1)
                step_began = time.perf_counter()
                done = self._train_step(*(part.to(self.sae.device, non_blocking=True) for part in pair))
                now = time.perf_counter()
                durations.append(now - step_began)
                self.seconds = now - began
                bar.advance()
                if self.step == 1 or self._due(config.log_every) or self._due(config.checkpoint_every):
                    last = self._record(done, write, bar)
                if self._due(config.checkpoint_every):
                    self._save_in_checkpoint_dir()
            if steps and not durations:
                raise ValueError(f"batches held none: expected {len(steps)} for the steps up to {config.steps}")
            if durations and (last is None or last.step != self.step):
                last = self._record(done, write, bar)
        if durations and config.checkpoint_dir is not None and not self._due(config.checkpoint_every):
            self._save_in_checkpoint_dir()
        if self.step < config.steps:
            warnings.warn(
                f"batches ended after {len(durations)}, at step {self.step} of {config.steps}: call fit with more of "
                "them to go on",
                RuntimeWarning,
                stacklevel=2,
            )
        return TrainSummary(
            steps=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            seconds_per_step=median(durations) if durations else math.nan,
            loss=last.loss if last else {},
            l0=last.l0 if last else math.nan,
            dead_fraction=last.dead_fraction if last else math.nan,
        )

    def save_checkpoint(self, path: str | os.PathLike) -> None:
        """Writes all of the run into a folder, whole or not at all: weights, dead-latent counters, optimizer, step,
        tokens, random generators. `fastsae.load(path)` reads the SAE alone. An older checkpoint at `path` is replaced.

        Raises ValueError if something else stands there, TypeError for an optimizer whose state is no plain data.
        """
        done = checkpoint.Done(self.step, self.tokens, self.seconds)
        checkpoint.save(path, self.sae, self.optimizer, asdict(self.config), done)

    def load_checkpoint(self, path: str | os.PathLike) -> None:
        """Goes back to a checkpoint, or to the newest one in a `checkpoint_dir`: from here on a run with the same
        config and the same further batches takes the same steps to the bit. Global random generators are set too.

        The peak learning rate comes with the checkpoint; the schedule is this trainer's.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated or foreign, or fits another SAE, optimizer or `lr`; it names the file and,
                where there is one, the tensor. Nothing is changed then.
        """
        found = checkpoint.read(path, self.sae, self.optimizer)
        if found.config.lr != self.config.lr:
            raise ValueError(
                f"lr = {self.config.lr} and '{path}' was trained with {found.config.lr}: expected the same; to go on "
                "with another, load the SAE alone (fastsae.load) and start a new Trainer"
            )
        found.apply(self.sae, self.optimizer)
        self.step, self.tokens, self.seconds = found.done.step, found.done.tokens, found.done.seconds
        self.scheduler = warmup_and_decay(self.optimizer, self.config, self.step)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        sae: SAE | None = None,
        config: TrainConfig | None = None,
        optimizer: Optimizer | None = None,
        device: torch.device | str = "cpu",
    ) -> "Trainer":
        """A trainer that goes on from a checkpoint, or from the newest one in a `checkpoint_dir`.

        What is left out is made as it was: the SAE (on `device`), the config, and the default optimizer. Another
        optimizer must be given, built from the parameters of a given `sae`. Raises as `load_checkpoint` does.
        """
        folder = checkpoint.locate(path)
        if config is None:
            config = checkpoint.read_run(folder)["config"]
        if sae is None:
            sae = load(folder, device=device)
        trainer = cls(sae, config, optimizer)
        trainer.load_checkpoint(folder)
        return trainer

    def _train_step(self, x: Tensor, target: Tensor | None = None) -> "_Step":
        lr, grad_norm = float(self.optimizer.param_groups[0]["lr"]), None
        with scheduled(self.sae, self.step, self.config):
            if isinstance(self.optimizer, FusedAdam):
                loss = self.optimizer.step(x, target)
                grad_norm = self.optimizer.grad_norm
            else:
                self.optimizer.zero_grad()
                loss = self.sae.loss(x, target)
                loss.total.backward()
                grad_norm = update(self.sae, self.optimizer, self.config.clip_grad_norm)
        self.scheduler.step()
        self.step += 1
        if self._due(self.config.resample_every) and self.step < self.config.steps:
            resample_dead_(self.sae, x, target, self.optimizer)
        self.tokens += loss.codes.n_tokens
        return _Step(loss, grad_norm, lr)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _record(self, done: "_Step", write: Callable[[dict[str, Any]], None], bar: ProgressBar) -> Record:
        grad_norm = done.grad_norm
        # Gradients that were not clipped are still there, unless the optimizer made none.
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        if grad_norm is None and gradients:
            grad_norm = get_total_norm(gradients)
        record = measure(
            self.sae,
            done.loss,
            grad_norm,
            step=self.step,
            tokens=self.tokens,
            lr=done.lr,
            seconds=self.seconds,
        )
        write(record.as_json())
        bar.show({"fvu": record.loss["fvu"], "l0": record.l0})
        return record

    def _save_in_checkpoint_dir(self) -> None:
        folder = self.config.checkpoint_dir
        self.save_checkpoint(checkpoint.step_folder(folder, self.step))
        checkpoint.remove_old(folder, self.config.keep_checkpoints)


class _Step(NamedTuple):
    """What a step leaves behind, its numbers still on their device; grad_norm if it was clipped to."""

    loss: SAELoss
    grad_norm: Tensor | None
    lr: float


def _adam(sae: SAE, config: TrainConfig) -> Optimizer:
    return torch.optim.Adam(sae.parameters(), lr=config.peak_lr(sae.d_sae), **OPENAI_ADAM, fused=True)


def _check_batch(pair: Sequence[Tensor], of_transcoder: bool, step: int) -> None:
    if of_transcoder and (isinstance(pair, Tensor) or len(pair) != 2):
        raise TypeError(f"the batch of step {step} is a {type(pair).__name__}: expected a pair (activations, targets)")
    x = pair[0]
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the batch of step {step} is a {type(x).__name__}: expected a tensor [..., d_in]; a DataLoader over a "
            "TensorDataset gives lists, so take their first element"
        )
    if x.dim() == 0 or math.prod(x.shape[:-1]) < 2:
        raise ValueError(
            f"the batch of step {step} has shape {tuple(x.shape)}: expected at least two tokens, since FVU divides by "
            "their variance; leave such a remainder out (drop_last=True)"
        )
