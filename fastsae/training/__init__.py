"""Training: a plain loop with any torch optimizer, schedules, logs, and checkpoints that resume bit for bit."""

from fastsae.training.config import TrainConfig
from fastsae.training.resample import resample_dead_
from fastsae.training.schedule import warmup_and_decay
from fastsae.training.trainer import Trainer, TrainSummary
from fastsae.training.update import update

__all__ = ["TrainConfig", "TrainSummary", "Trainer", "resample_dead_", "update", "warmup_and_decay"]
