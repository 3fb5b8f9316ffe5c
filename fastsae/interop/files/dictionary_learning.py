"""dictionary_learning's files: ae.pt and config.json, checkpoints/ae_STEP.pt, and what an interrupted run leaves."""

from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.files.build import build
from fastsae.interop.files.fields import Fields, read_json
from fastsae.interop.files.tensors import Tensors, exactly, read_pickle, tensors_of
from fastsae.interop.files.write import cannot, check, folder, threshold_of, write_json, write_pickle
from fastsae.saes import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from fastsae.saes.base import SAE

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "ae.pt"
NAMES = (CONFIG_NAME, WEIGHTS_NAME)
MAIN = WEIGHTS_NAME
KEEPS_METADATA = True


def recognizes(path: Path) -> bool:
    if path.is_dir():
        return (path / WEIGHTS_NAME).is_file()
    return path.suffix == ".pt" and (path.stem == "ae" or path.stem.startswith("ae_"))


def read(path: Path, device: torch.device | str) -> SAE:
    weights_path = path / WEIGHTS_NAME if path.is_dir() else path
    values = read_pickle(weights_path)
    where = str(weights_path)
    config_path = _config_of(weights_path)
    trainer = None if config_path is None else read_json(config_path).object("trainer")
    norm_factor = None
    # A run with backup_steps that was cut off leaves its own dict where the state dict would be.
    if {"step", "ae"} <= set(values):
        backup = Fields(values, where)
        values = backup.take("ae")
        trainer = trainer or backup.object("config")
        norm_factor = _norm_factor(backup)
    tensors = tensors_of(values, where)
    if trainer is None:
        raise FileNotFoundError(
            f"{weights_path.with_name(CONFIG_NAME)} does not exist: expected the config.json of the run beside "
            f"{weights_path.name}, since it names the dict_class"
        )
    dict_class = trainer.text("dict_class", of=tuple(_READERS))
    cls, weights, options = _READERS[dict_class](tensors)
    tensors.done()
    d_in, d_sae = weights["W_enc"].shape
    for name, expected in (("activation_dim", d_in), ("dict_size", d_sae)):
        if trainer.size(name, expected) != expected:
            raise ValueError(f"{trainer.where}: {name} is not {expected}, as it is in {where}")
    if "k" in options and trainer.size("k", options["k"]) != options["k"]:
        raise ValueError(f"{trainer.where}: k is not {options['k']}, as it is in {where}")
    if norm_factor is not None:
        _scale_biases(weights, norm_factor)
    if cls is JumpReLUSAE:
        weights["threshold"] = exactly(weights["threshold"], torch.float32, "threshold", where)
    return build(cls, where, weights, device, d_in=d_in, d_sae=d_sae, **options)


def _config_of(weights_path: Path) -> Path | None:
    """The run's config.json: beside ae.pt, one folder above checkpoints/ae_STEP.pt."""
    for folder_path in (weights_path.parent, weights_path.parent.parent):
        if (folder_path / CONFIG_NAME).is_file():
            return folder_path / CONFIG_NAME
    return None


def _norm_factor(backup: Fields) -> float | None:
    """What activations were divided by in training, if they were; only a finished run has it in its biases."""
    factor = backup.take("norm_factor", None)
    if factor is None:
        return None
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1e300:
        backup.fail("norm_factor", factor, "a finite number above 0")
    return float(factor)


# The class, the weights under fastsae's names, and the options of a dict_class.
_Read = tuple[type[SAE], dict[str, Tensor], dict[str, Any]]


def _linear(tensors: Tensors, *, bias: bool = True) -> dict[str, Tensor]:
    d_sae, d_in = tensors.shape("encoder.weight", 2)
    weights = {
        "W_enc": tensors.take("encoder.weight", d_sae, d_in).T,
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T,
    }
    if bias:
        weights["b_enc"] = tensors.take("encoder.bias", d_sae)
    return weights


def _direct(tensors: Tensors) -> dict[str, Tensor]:
    d_in, d_sae = tensors.shape("W_enc", 2)
    return {
        "W_enc": tensors.take("W_enc", d_in, d_sae),
        "b_enc": tensors.take("b_enc", d_sae),
        "W_dec": tensors.take("W_dec", d_sae, d_in),
        "b_dec": tensors.take("b_dec", d_in),
    }


def _autoencoder(tensors: Tensors) -> _Read:
    weights = _linear(tensors)
    weights["b_dec"] = tensors.take("bias", len(weights["W_enc"]))
    return ReLUSAE, weights, {"l1_weight": "none", "normalize_decoder": False}


def _autoencoder_new(tensors: Tensors) -> _Read:
    weights = _linear(tensors)
    weights["b_dec"] = tensors.take("decoder.bias", len(weights["W_enc"]))
    return ReLUSAE, weights, {"apply_b_dec_to_input": False, "normalize_decoder": False}


def _gated(tensors: Tensors) -> _Read:
    weights = _linear(tensors, bias=False)
    d_in, d_sae = weights["W_enc"].shape
    weights["b_dec"] = tensors.take("decoder_bias", d_in)
    weights |= {ours: tensors.take(theirs, d_sae) for theirs, ours in _GATED.items()}
    return GatedSAE, weights, {"normalize_decoder": False}


_GATED = {"r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}


def _jumprelu(tensors: Tensors) -> _Read:
    weights = _direct(tensors)
    weights["threshold"] = tensors.take("threshold", len(weights["W_dec"]))
    return JumpReLUSAE, weights, {"apply_b_dec_to_input": False, "bandwidth": 0.001}


def _k(tensors: Tensors) -> int:
    k = int(tensors.take("k", dtype=torch.int32))
    if k < 1:
        raise ValueError(f"{tensors.where}: k = {k}: expected at least 1")
    return k


def _topk(tensors: Tensors) -> _Read:
    weights = _linear(tensors)
    weights["b_dec"] = tensors.take("b_dec", len(weights["W_enc"]))
    # It is learned beside the selection, which does not use it.
    tensors.drop("threshold")
    return TopKSAE, weights, {"k": _k(tensors), "relu": "before"}


def _threshold(tensors: Tensors) -> Tensor:
    threshold = tensors.take("threshold")
    if not threshold >= 0:
        raise ValueError(
            f"{tensors.where}: threshold = {threshold.item():g}: expected one of at least 0; until training has found "
            "one, its library keeps every positive activation, which fastsae's BatchTopKSAE does not"
        )
    return threshold


def _batchtopk(tensors: Tensors) -> _Read:
    weights = _linear(tensors)
    weights["b_dec"] = tensors.take("b_dec", len(weights["W_enc"]))
    weights["threshold"] = _threshold(tensors)
    return BatchTopKSAE, weights, {"k": _k(tensors), "threshold_lr": 0.001}


def _matryoshka(tensors: Tensors) -> _Read:
    weights = _direct(tensors)
    weights["threshold"] = _threshold(tensors)
    (groups,) = tensors.shape("group_sizes", 1)
    sizes = tensors.take("group_sizes", groups, dtype=torch.int64).tolist()
    widths, d_sae = list(accumulate(sizes)), len(weights["W_dec"])
    if min(sizes) < 1 or widths[-1] != d_sae:
        raise ValueError(f"{tensors.where}: group_sizes = {sizes}: expected sizes above 0 with the sum {d_sae}")
    return MatryoshkaSAE, weights, {"k": _k(tensors), "widths": widths, "threshold_lr": 0.001}


_READERS: Mapping[str, Callable[[Tensors], _Read]] = {
    "AutoEncoder": _autoencoder,
    "AutoEncoderNew": _autoencoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}


def _scale_biases(weights: dict[str, Tensor], factor: float) -> None:
    """Its Dictionary.scale_biases: from activations divided by `factor` to activations as they are."""
    for name in ("b_enc", "b_dec", "b_gate", "b_mag", "threshold"):
        if name in weights:
            weights[name] = weights[name] * factor


def write(sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
    """`metadata` goes to the trainer's part of config.json: lm_name, layer, submodule_name and what else is known."""
    check(sae, "dictionary_learning")
    if getattr(sae, "rescale_by_decoder_norm", False):
        raise cannot(sae, "dictionary_learning", "rescale_by_decoder_norm = True", "it ranks activations as they are")
    own: dict[str, Any] = {}
    linear = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    direct = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    subtracts: bool | None = True
    if isinstance(sae, ReLUSAE):
        dict_class, trainer_class = "AutoEncoder", "StandardTrainer"
        subtracts = None
        tensors = linear | {"encoder.bias": sae.b_enc, "bias": sae.b_dec}
        if not sae.apply_b_dec_to_input:
            dict_class, trainer_class = "AutoEncoderNew", "StandardTrainerAprilUpdate"
            tensors = linear | {"encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec}
    elif isinstance(sae, GatedSAE):
        dict_class, trainer_class = "GatedAutoEncoder", "GatedSAETrainer"
        tensors = linear | {"decoder_bias": sae.b_dec}
        tensors |= {theirs: getattr(sae, ours) for theirs, ours in _GATED.items()}
    elif isinstance(sae, JumpReLUSAE):
        dict_class, trainer_class, subtracts = "JumpReluAutoEncoder", "JumpReluTrainer", False
        tensors = direct | {"threshold": sae.thresholds()}
    elif isinstance(sae, BatchTopKSAE):
        own["k"] = _int_k(sae)
        scalars = {
            "k": torch.tensor(own["k"], dtype=torch.int32),
            "threshold": threshold_of(sae, "dictionary_learning"),
        }
        if isinstance(sae, MatryoshkaSAE):
            dict_class, trainer_class = "MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"
            sizes = [wide - narrow for narrow, wide in zip([0, *sae.widths], sae.widths, strict=False)]
            own["group_sizes"] = sizes
            tensors = scalars | {"group_sizes": torch.tensor(sizes)} | direct
        else:
            dict_class, trainer_class = "BatchTopKSAE", "BatchTopKTrainer"
            tensors = scalars | linear | {"encoder.bias": sae.b_enc, "b_dec": sae.b_dec}
    elif isinstance(sae, TopKSAE):
        dict_class, trainer_class = "AutoEncoderTopK", "TopKTrainer"
        own["k"] = sae.k
        tensors = {"k": torch.tensor(sae.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        tensors |= linear | {"encoder.bias": sae.b_enc, "b_dec": sae.b_dec}
    else:
        raise cannot(sae, "dictionary_learning", f"architecture = {sae.architecture!r}", "use format='fastsae'")
    check(sae, "dictionary_learning", subtracts_b_dec=subtracts)
    trainer = {
        "layer": None,
        "lm_name": "",
        "submodule_name": None,
        **metadata,
        "dict_class": dict_class,
        "trainer_class": trainer_class,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        **own,
    }
    write_pickle(folder(path) / WEIGHTS_NAME, tensors)
    write_json(path / CONFIG_NAME, {"trainer": trainer, "buffer": {}})


def _int_k(sae: BatchTopKSAE) -> int:
    if sae.k != int(sae.k):
        raise cannot(sae, "dictionary_learning", f"k = {sae.k}", "its k is an int")
    return int(sae.k)
