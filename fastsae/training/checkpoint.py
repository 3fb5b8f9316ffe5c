"""A checkpoint: one folder from which a run goes on bit for bit. Nothing in it is pickled.

config.json, model.safetensors   the SAE as `save_pretrained` writes it, so fastsae.load(folder) reads it alone
optimizer.safetensors            the tensors of the optimizer's state, "<parameter>.<key>", in plain shapes
trainer.json                     the TrainConfig, what is done, and the rest of the optimizer's state
random_state.json                the states of the random generators
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from fastsae.durable import recover_folder, replace_folder
from fastsae.saes import SAE, load
from fastsae.training import optimizer_state, random_state
from fastsae.training.config import TrainConfig

TRAINER_NAME = "trainer.json"
OPTIMIZER_NAME = "optimizer.safetensors"
RANDOM_STATE_NAME = "random_state.json"
FORMAT = 1
_PREFIX = "step_"


@dataclass(frozen=True)
class Done:
    """How far a run is: finished steps, tokens seen, seconds spent."""

    step: int
    tokens: int
    seconds: float


def save(path: str | os.PathLike, sae: SAE, optimizer: Optimizer, config: dict[str, Any], done: Done) -> None:
    """Writes the checkpoint folder `path` whole or not at all; an older checkpoint there is replaced.

    Raises ValueError if something that is no checkpoint stands at `path`, TypeError for an optimizer whose state holds
    other things than tensors, numbers and strings.
    """
    folder = Path(path)
    recover_folder(folder)
    if folder.exists() and not (folder / TRAINER_NAME).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"path = '{folder}' holds something other than a checkpoint: expected a new or empty folder")
    tensors, description = optimizer_state.describe(optimizer, sae)
    run = {"format": FORMAT, **asdict(done), "config": config, "optimizer": description}
    temporary = _partial(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        sae.save_pretrained(temporary)
        save_file(tensors, temporary / OPTIMIZER_NAME)
        (temporary / TRAINER_NAME).write_text(json.dumps(run, indent=2) + "\n")
        (temporary / RANDOM_STATE_NAME).write_text(json.dumps(random_state.capture(sae.device)) + "\n")
        # safetensors makes files for their owner alone.
        shutil.copymode(temporary / TRAINER_NAME, temporary / OPTIMIZER_NAME)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and checked against an SAE and an optimizer; `apply` can hardly fail any more."""

    done: Done
    config: TrainConfig
    sae_state: dict[str, torch.Tensor]
    optimizer_state: dict[str, Any]
    restore_random_state: Callable[[], None]

    def apply(self, sae: SAE, optimizer: Optimizer) -> None:
        """Copies everything into place."""
        optimizer.load_state_dict(self.optimizer_state)
        sae.load_state_dict(self.sae_state)
        self.restore_random_state()


def read(path: str | os.PathLike, sae: SAE, optimizer: Optimizer) -> Checkpoint:
    """Reads the checkpoint at `path` for this SAE and this optimizer, neither of which is changed.

    Raises FileNotFoundError for a missing file; ValueError, naming the file and where there is one the tensor, for a
    file that is truncated or foreign, or for contents that fit another SAE or optimizer.
    """
    folder = locate(path)
    run = read_run(folder)
    saved = load(folder)
    _check_same_sae(folder, saved, sae)
    return Checkpoint(
        done=Done(run["step"], run["tokens"], run["seconds"]),
        config=run["config"],
        sae_state=saved.state_dict(),
        optimizer_state=_read_optimizer(folder / OPTIMIZER_NAME, run["optimizer"], sae, optimizer),
        restore_random_state=_read_random_state(folder / RANDOM_STATE_NAME, sae.device),
    )


def locate(path: str | os.PathLike) -> Path:
    """The checkpoint at `path`, or the newest of the `step_...` folders in it. Raises FileNotFoundError for neither."""
    folder = Path(path)
    recover_folder(folder)
    if (folder / TRAINER_NAME).is_file():
        return folder
    found = in_folder(folder)
    if not found:
        raise FileNotFoundError(
            f"'{folder}' holds no {TRAINER_NAME} and no {_PREFIX}... folder: expected a checkpoint of a Trainer, or "
            "its checkpoint_dir (fastsae.load reads an SAE alone)"
        )
    return found[-1]


def read_run(folder: Path) -> dict[str, Any]:
    """trainer.json, with its "config" as a TrainConfig. Raises ValueError that names the file."""
    path = folder / TRAINER_NAME
    run = _read_json(path)
    if run.get("format") != FORMAT:
        raise ValueError(f"{path}: format = {run.get('format')!r}: expected {FORMAT}, what this fastsae writes")
    missing = [key for key in ("step", "tokens", "seconds", "config", "optimizer") if key not in run]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: not what a Trainer wrote")
    try:
        return {**run, "config": TrainConfig.from_dict(run["config"])}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_none_beyond(checkpoint_dir: str, step: int) -> None:
    """Raises ValueError if a run's checkpoint_dir holds checkpoints of later steps: another run's, and "newer"."""
    later = [path.name for path in in_folder(checkpoint_dir) if _step_of(path) > step]
    if later:
        raise ValueError(
            f"checkpoint_dir = '{checkpoint_dir}' holds {', '.join(later)}, beyond this run's step {step}: go on from "
            "there with Trainer.resume, give another folder, or remove them"
        )


def step_folder(checkpoint_dir: str, step: int) -> Path:
    """Where the checkpoint after `step` steps stands in a run's checkpoint_dir."""
    return Path(checkpoint_dir) / f"{_PREFIX}{step:08d}"


def in_folder(checkpoint_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run's checkpoint_dir, by rising step."""
    found = [path for path in Path(checkpoint_dir).glob(f"{_PREFIX}*") if (path / TRAINER_NAME).is_file()]
    return sorted((path for path in found if path.name[len(_PREFIX) :].isdigit()), key=_step_of)


def remove_old(checkpoint_dir: str, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints (none if keep is 0), and what a crash left half-written."""
    for partial in Path(checkpoint_dir).glob(_partial(Path(f"{_PREFIX}*")).name):
        shutil.rmtree(partial, ignore_errors=True)
    for folder in in_folder(checkpoint_dir)[:-keep] if keep else []:
        shutil.rmtree(folder)


def _step_of(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _check_same_sae(folder: Path, saved: SAE, sae: SAE) -> None:
    if type(saved) is not type(sae):
        raise ValueError(f"'{folder}' holds a {type(saved).__name__}: expected a {type(sae).__name__}, this Trainer's")
    expected = sae.state_dict()
    for name, tensor in saved.state_dict().items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"{folder / 'model.safetensors'}: {name} is {tensor.dtype} {tuple(tensor.shape)}: expected "
                f"{expected[name].dtype} {tuple(expected[name].shape)}, this Trainer's SAE"
            )
    for name, value in saved.config().items():
        if value != sae.config()[name]:
            raise ValueError(
                f"{folder / 'config.json'}: {name} = {value!r}: expected {sae.config()[name]!r}, this Trainer's SAE; "
                "Trainer.resume(path) builds the SAE that was saved"
            )


def _read_optimizer(path: Path, description: dict[str, Any], sae: SAE, optimizer: Optimizer) -> dict[str, Any]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: expected it beside {TRAINER_NAME}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    try:
        return optimizer_state.restore(optimizer, sae, tensors, description)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.with_name(TRAINER_NAME)}: optimizer is not what a Trainer wrote: {error!r}") from error


def _read_random_state(path: Path, device: torch.device) -> Callable[[], None]:
    try:
        return random_state.restorer(_read_json(path), device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: expected a folder that a Trainer wrote") from None
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content
