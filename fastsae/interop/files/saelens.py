"""SAELens' folders: cfg.json and sae_weights.safetensors; configs of version 6 and of those before."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.files.build import build
from fastsae.interop.files.fields import Fields, read_json
from fastsae.interop.files.tensors import Tensors, exactly, read_safetensors
from fastsae.interop.files.write import (
    cannot,
    check,
    folder,
    narrowest,
    threshold_of,
    write_json,
    write_safetensors,
)
from fastsae.saes import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from fastsae.saes.base import SAE
from fastsae.saes.decoder_norms import decoder_norms

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
# What a training checkpoint keeps its factor of activations in, which is not in cfg.json.
SCALER_NAME = "activation_scaler.json"
NAMES = (CONFIG_NAME, WEIGHTS_NAME, SCALER_NAME)
MAIN = WEIGHTS_NAME
KEEPS_METADATA = True

# The version of the layout that is written; SAELens reads a config without one as older than 6.
_LAYOUT = "6.0.0"
_DTYPES = {str(dtype).removeprefix(prefix): dtype for prefix in ("", "torch.")
           for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}  # fmt: skip
# Fields of version 6 that say nothing about what is computed from activations that come flat, [..., d_in].
_BESIDE_THE_POINT = (
    "device", "metadata", "decoder_init_norm", "l1_warm_up_steps", "l0_warm_up_steps", "use_sparse_activations",
    "jumprelu_init_threshold", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "jumprelu_ste_to_input",
    "pre_act_loss_coefficient", "target_l0", "use_matryoshka_aux_loss", "finetuning_scaling_factor",
)  # fmt: skip


def recognizes(path: Path) -> bool:
    return (path / WEIGHTS_NAME).is_file() and (path / CONFIG_NAME).is_file()


def read(path: Path, device: torch.device | str) -> SAE:
    config = read_json(path / CONFIG_NAME)
    tensors = read_safetensors(path / WEIGHTS_NAME)
    fields = _fields(config)
    architecture = fields.text("architecture", of=tuple(_READERS))
    dtype = _DTYPES[fields.text("dtype", of=tuple(_DTYPES))]
    d_in, d_sae = fields.size("d_in"), fields.size("d_sae")
    d_out = fields.size("d_out") if "transcoder" in architecture else d_in
    options: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "normalize_decoder": False, "reconstruction": "mse"}
    subtracts = fields.flag("apply_b_dec_to_input", True)
    if "transcoder" in architecture:
        if subtracts:
            fields.fail("apply_b_dec_to_input", True, "false, as b_dec of a transcoder is a bias of its target")
        options |= {"d_out": d_out, "skip": "skip" in architecture}
    else:
        options["apply_b_dec_to_input"] = subtracts
    normalization = fields.text("normalize_activations", "none", of=("none", "layer_norm", "expected_average_only_in"))
    weights: dict[str, Tensor] = {}
    if normalization == "expected_average_only_in":
        normalization, weights["activation_scale"] = "scalar", _scale(path, fields)
    options["normalize_activations"] = normalization
    fields.text("reshape_activations", "none", of=("none", "hook_z"))
    _without_finetuning(tensors)

    def weight(name: str, *shape: int) -> None:
        # As SAELens does: the config's dtype is the SAE's, whatever the file holds.
        weights[name] = tensors.take(name, *shape).to(dtype)

    weight("W_enc", d_in, d_sae)
    weight("W_dec", d_sae, d_out)
    weight("b_dec", d_out)
    if options.get("skip"):
        weight("W_skip", d_out, d_in)
    if architecture != "gated":
        weight("b_enc", d_sae)
    cls, own = _READERS[architecture](fields, tensors, weights, d_sae)
    tensors.done()
    fields.drop(*_BESIDE_THE_POINT)
    fields.done()
    return build(cls, fields.where, weights, device, **options, **own)


def _fields(config: Fields) -> Fields:
    """The config as version 6 writes it."""
    version = config.take("sae_lens_version", None)
    if version is None and "metadata" in config:
        metadata = config.object("metadata")
        version = metadata.take("sae_lens_version", None)
    if version is None:
        return _before_6(config)
    numbers = version.split(".")[0] if isinstance(version, str) else ""
    if not (numbers.isascii() and numbers.isdigit() and len(numbers) < 6):
        config.fail("sae_lens_version", version, "a version such as '6.0.0'")
    return config if int(numbers) >= 6 else _before_6(config)


def _before_6(config: Fields) -> Fields:
    """A config of an earlier version, as SAELens' handle_pre_6_0_config takes it; what it ignores is ignored."""
    fields: dict[str, Any] = {name: config.take(name) for name in ("d_in", "d_sae")}
    fields["dtype"] = config.take("dtype", "float32")
    fields["architecture"] = config.text("architecture", "standard", of=("standard", "gated", "jumprelu", "topk"))
    fields["apply_b_dec_to_input"] = config.flag("apply_b_dec_to_input", True)
    normalization = config.take("normalize_activations", "none")
    if isinstance(normalization, bool) or normalization is None:
        normalization = "expected_average_only_in" if normalization else "none"
    fields["normalize_activations"] = normalization
    # Both spellings occur; None stands for relu.
    activation = config.take("activation_fn", None) or config.take("activation_fn_str", None) or "relu"
    if activation not in ("relu", "topk"):
        config.fail("activation_fn", activation, "'relu' or 'topk'")
    arguments = config.take("activation_fn_kwargs", None) or {}
    if not isinstance(arguments, dict):
        config.fail("activation_fn_kwargs", arguments, "an object")
    own = Fields(arguments, f"{config.where}: activation_fn_kwargs")
    own.refuse("signed", False, why="a selection by absolute value is not one of relu(pre)")
    if activation == "topk" or fields["architecture"] == "topk":
        if fields["architecture"] not in ("standard", "topk"):
            config.fail("activation_fn", "topk", f"'relu' with architecture {fields['architecture']!r}")
        fields |= {"architecture": "topk", "k": own.take("k") if "k" in own else config.take("k")}
    return Fields(fields, config.where)


def _scale(path: Path, fields: Fields) -> Tensor:
    if not (path / SCALER_NAME).is_file():
        fields.fail(
            "normalize_activations",
            "expected_average_only_in",
            f"'none', or the factor in {SCALER_NAME}: it is not in these files. SAELens' "
            "fold_activation_norm_scaling_factor makes an SAE that needs none",
        )
    scaler = read_json(path / SCALER_NAME)
    value = scaler.number("scaling_factor")
    if not 0 < value <= torch.finfo(torch.float32).max:
        scaler.fail("scaling_factor", value, "a number above 0 that float32 holds")
    return torch.tensor(value, dtype=torch.float32)


def _without_finetuning(tensors: Tensors) -> None:
    if "scaling_factor" in tensors:
        (d_sae,) = tensors.shape("scaling_factor", 1)
        if not bool((tensors.take("scaling_factor", d_sae) == 1).all()):
            raise ValueError(
                f"{tensors.where}: scaling_factor is not 1 everywhere: expected no finetuning_scaling_factor"
            )


# What an architecture is: its class and options, from its fields; its own tensors go to `weights`.
_Reader = Callable[[Fields, Tensors, dict[str, Tensor], int], tuple[type[SAE], dict[str, Any]]]


def _standard(fields: Fields, tensors: Tensors, weights: dict[str, Tensor], d_sae: int) -> tuple[type[SAE], dict]:
    own = {name: fields.number(name) for name in ("l1_coefficient", "lp_norm") if name in fields}
    return ReLUSAE, own


def _topk(fields: Fields, tensors: Tensors, weights: dict[str, Tensor], d_sae: int) -> tuple[type[SAE], dict]:
    return TopKSAE, {"k": fields.size("k"), **_of_topk(fields, rescale=False)}


def _of_topk(fields: Fields, *, rescale: bool) -> dict[str, Any]:
    return {
        "rescale_by_decoder_norm": fields.flag("rescale_acts_by_decoder_norm", rescale),
        "auxk_form": "saelens",
        "auxk_coefficient": fields.number("aux_loss_coefficient", 1.0),
    }


def _batchtopk(fields: Fields, tensors: Tensors, weights: dict[str, Tensor], d_sae: int) -> tuple[type[SAE], dict]:
    weights["threshold"] = tensors.take("topk_threshold").double()
    k, rate = fields.number("k"), fields.number("topk_threshold_lr", 0.01)
    return BatchTopKSAE, {"k": k, "threshold_lr": rate, **_of_topk(fields, rescale=True)}


def _matryoshka(fields: Fields, tensors: Tensors, weights: dict[str, Tensor], d_sae: int) -> tuple[type[SAE], dict]:
    widths = fields.take("matryoshka_widths")
    if not isinstance(widths, list) or not all(type(width) is int for width in widths):
        fields.fail("matryoshka_widths", widths, "a list of ints")
    _, own = _batchtopk(fields, tensors, weights, d_sae)
    return MatryoshkaSAE, {"widths": widths, **own}


def _jumprelu(fields: Fields, tensors: Tensors, weights: dict[str, Tensor], d_sae: int) -> tuple[type[SAE], dict]:
    own = {
        ours: fields.number(theirs)
        for theirs, ours in (("l0_coefficient", "l0_coefficient"), ("jumprelu_bandwidth", "bandwidth"))
        if theirs in fields
    }
    # Training checkpoints of earlier versions.
    learns_log = "log_threshold" in tensors
    name = "log_threshold" if learns_log else "threshold"
    weights[name] = exactly(tensors.take(name, d_sae), torch.float32, name, tensors.where)
    return JumpReLUSAE, {"log_threshold": learns_log, **own}


def _gated(fields: Fields, tensors: Tensors, weights: dict[str, Tensor], d_sae: int) -> tuple[type[SAE], dict]:
    dtype = weights["W_dec"].dtype
    weights |= {name: tensors.take(name, d_sae).to(dtype) for name in ("b_gate", "r_mag", "b_mag")}
    own = {"l1_coefficient": fields.number("l1_coefficient")} if "l1_coefficient" in fields else {}
    return GatedSAE, {"freeze_decoder": False, **own}


_READERS: Mapping[str, _Reader] = {
    "standard": _standard,
    "topk": _topk,
    "batchtopk": _batchtopk,
    "matryoshka_batchtopk": _matryoshka,
    "jumprelu": _jumprelu,
    "gated": _gated,
    "transcoder": _standard,
    "skip_transcoder": _standard,
    "jumprelu_transcoder": _jumprelu,
    "jumprelu_skip_transcoder": _jumprelu,
}


def write(sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
    """As SAELens saves it for inference: BatchTopK and Matryoshka as JumpReLU."""
    check(sae, "SAELens", normalizations=("none", "layer_norm"), transcoders=True)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + (["W_skip"] if sae.skip else [])
    own: dict[str, Any] = {}
    if isinstance(sae, GatedSAE):
        architecture, names = "gated", ["W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"]
    elif isinstance(sae, ReLUSAE):
        architecture = "standard"
    elif isinstance(sae, (JumpReLUSAE, BatchTopKSAE)):
        architecture = "jumprelu"
    elif isinstance(sae, TopKSAE):
        architecture = "topk"
        own = {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_by_decoder_norm}
    else:
        raise cannot(sae, "SAELens", f"architecture = {sae.architecture!r}", "use format='fastsae'")
    if sae.is_transcoder:
        if architecture not in ("standard", "jumprelu"):
            raise cannot(sae, "SAELens", f"d_out = {sae.d_out}", "its transcoders are ReLU or JumpReLU")
        own["d_out"] = sae.d_out
        parts = ["jumprelu"] if architecture == "jumprelu" else []
        architecture = "_".join([*parts, *(["skip"] if sae.skip else []), "transcoder"])
    tensors = {name: getattr(sae, name).detach() for name in names}
    if isinstance(sae, JumpReLUSAE):
        tensors["threshold"] = narrowest(sae.thresholds().detach(), sae.dtype)
    elif isinstance(sae, BatchTopKSAE):
        tensors["threshold"] = narrowest(threshold_of(sae, "SAELens").expand(sae.d_sae), sae.dtype)
        if sae.rescale_by_decoder_norm:
            tensors |= _folded(tensors)
    config = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.normalize_activations,
        "reshape_activations": "none",
        **own,
        "metadata": {**metadata, "sae_lens_version": _LAYOUT, "sae_lens_training_version": None},
        "architecture": architecture,
    }
    write_safetensors(folder(path) / WEIGHTS_NAME, tensors)
    write_json(path / CONFIG_NAME, config)


def _folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoder norms in the encoder, as SAELens does at this point: its JumpReLU knows no rescaling."""
    dtype = tensors["W_dec"].dtype
    norms = decoder_norms(tensors["W_dec"]).clamp_min(1e-8)
    return {
        "W_enc": (tensors["W_enc"] * norms).to(dtype),
        "b_enc": (tensors["b_enc"] * norms).to(dtype),
        "W_dec": (tensors["W_dec"] / norms[:, None]).to(dtype),
    }
