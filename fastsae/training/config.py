"""TrainConfig: the settings of a training run."""

import math
import os
from dataclasses import dataclass
from typing import Any

from fastsae.training.schedule import SHAPES


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run; they check themselves when they are made.

    steps: optimizer steps in all, those before a resumed checkpoint included.
    lr: peak learning rate; None is 2e-4 / √(d_sae / 2^14), the rule of sparsify (after Gao et al. 2024, who found that
        the best rate falls with 1/√d_sae). An optimizer given to the Trainer has its own, and this is not used.
    warmup_steps: steps over which the learning rate rises linearly to its peak.
    decay_steps: last steps, over which it falls to zero.
    decay: "linear" or "cosine".
    sparsity_warmup_steps: steps over which the SAE's sparsity coefficients (L1, L0, KL) rise linearly from zero.
    k_start, k_decay_steps: with k_start, an SAE that has a k starts with this one and comes linearly to its own in so
        many steps (k annealing, as sparsify and dictionary_learning have it).
    resample_every: steps between two resamplings of dead latents (`resample_dead_`); 0 for none.
    clip_grad_norm: gradients of a greater norm, taken over all parameters, are scaled down to it; None for no limit.
    log_every: steps between two records; the first and the last step are always recorded.
    log_path: the JSON-lines file of the records; None for no file.
    checkpoint_every: steps between two checkpoints in `checkpoint_dir`; 0 for one at the end of `fit` only.
    checkpoint_dir: folder of the checkpoints, `step_00001000` and so on; None for none.
    keep_checkpoints: how many of the newest stay in `checkpoint_dir`; 0 keeps all.
    progress: show a progress bar if standard error is a terminal.

    Raises ValueError that names the setting, its value and what was expected.
    """

    steps: int
    lr: float | None = None
    warmup_steps: int = 0
    decay_steps: int = 0
    decay: str = "linear"
    sparsity_warmup_steps: int = 0
    k_start: float | None = None
    k_decay_steps: int = 0
    resample_every: int = 0
    clip_grad_norm: float | None = 1.0
    log_every: int = 100
    log_path: str | os.PathLike | None = None
    checkpoint_every: int = 0
    checkpoint_dir: str | os.PathLike | None = None
    keep_checkpoints: int = 1
    progress: bool = True

    def __post_init__(self):
        for name, least in (
            ("steps", 1),
            ("warmup_steps", 0),
            ("decay_steps", 0),
            ("sparsity_warmup_steps", 0),
            ("k_decay_steps", 0),
            ("resample_every", 0),
            ("log_every", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}: expected an int of at least {least}")
        for name in ("lr", "clip_grad_norm", "k_start"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} = {value!r}: expected None or a finite number above 0")
        if self.decay not in SHAPES:
            raise ValueError(f"decay = {self.decay!r}: expected one of {', '.join(map(repr, SHAPES))}")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and decay_steps = {self.decay_steps}: expected at most "
                f"steps = {self.steps} together"
            )
        if (self.k_start is None) != (self.k_decay_steps == 0) or self.k_decay_steps > self.steps:
            raise ValueError(
                f"k_start = {self.k_start} and k_decay_steps = {self.k_decay_steps}: expected both or neither, and at "
                f"most steps = {self.steps} of decay"
            )
        if self.checkpoint_every and self.checkpoint_dir is None:
            raise ValueError(
                f"checkpoint_every = {self.checkpoint_every} without checkpoint_dir: give the folder to write them to"
            )
        for name in ("log_path", "checkpoint_dir"):
            value = getattr(self, name)
            # As text, so that a checkpoint can record it.
            object.__setattr__(self, name, None if value is None else os.fspath(value))

    def peak_lr(self, d_sae: int) -> float:
        """`lr`, or the rate that its None stands for."""
        return 2e-4 / math.sqrt(d_sae / 2**14) if self.lr is None else self.lr

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The config that `dataclasses.asdict` described. Raises ValueError for a setting unknown here."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"these are not the settings of a TrainConfig: {error}") from error
