"""OpenMOSS' folders (lm-saes, llamascopium): config.json and sae_weights.safetensors, of sae_type "sae"."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.files.build import build
from fastsae.interop.files.fields import Fields, read_json
from fastsae.interop.files.tensors import Tensors, exactly, read_safetensors
from fastsae.interop.files.write import cannot, check, folder, write_json, write_safetensors
from fastsae.saes import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from fastsae.saes.base import SAE
from fastsae.saes.decoder_norms import decoder_norms

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "sae_weights.safetensors"
NAMES = (CONFIG_NAME, WEIGHTS_NAME)
MAIN = WEIGHTS_NAME
KEEPS_METADATA = True
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
# Fields that say nothing about what is computed: kernels, training, loading. top_k is there whatever the activation.
_BESIDE_THE_POINT = (
    "device", "dtype", "use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel", "jumprelu_threshold_window",
    "jumprelu_lr_factor", "force_unit_decoder_norm", "sae_pretrained_name_or_path", "strict_loading", "top_k",
)  # fmt: skip


def recognizes(path: Path) -> bool:
    return (path / WEIGHTS_NAME).is_file() and (path / CONFIG_NAME).is_file()


def read(path: Path, device: torch.device | str) -> SAE:
    fields = read_json(path / CONFIG_NAME)
    tensors = read_safetensors(path / WEIGHTS_NAME)
    fields.text("sae_type", "sae", of=("sae",))
    fields.refuse("use_glu_encoder", False, why="fastsae's encoders are linear")
    fields.refuse("apply_decoder_bias_to_pre_encoder", False, why="its SAEs read x as it is")
    d_in, expansion = fields.size("d_model"), fields.number("expansion_factor")
    d_sae = int(d_in * expansion)
    hooks = [fields.text("hook_point_in"), fields.text("hook_point_out")]
    transcodes = hooks[0] != hooks[1]
    target: dict[str, Any] = {"d_out": d_in} if transcodes else {"apply_b_dec_to_input": False}
    weights = {
        "W_enc": tensors.take("W_E", d_in, d_sae),
        "b_enc": tensors.take("b_E", d_sae),
        "W_dec": tensors.take("W_D", d_sae, d_in),
        "b_dec": torch.zeros(0),
    }
    has_bias = fields.flag("use_decoder_bias", True)
    weights["b_dec"] = tensors.take("b_D", d_in) if has_bias else weights["W_dec"].new_zeros(d_in)
    mode = fields.text("norm_activation", "dataset-wise", of=("inference", "dataset-wise"))
    if mode == "dataset-wise":
        weights["activation_scale"] = _scale(tensors, hooks[0], d_in)
        if transcodes:
            weights["target_scale"] = _scale(tensors, hooks[1], d_in)
    by_norm = fields.flag("sparsity_include_decoder_norm", True)
    act_fn = fields.text("act_fn", "relu", of=("relu", "jumprelu", "topk", "batchtopk"))
    cls, own = _activation(act_fn, by_norm, fields, tensors, weights)
    fields.drop(*_BESIDE_THE_POINT)
    fields.done()
    tensors.drop(*(_NORM + hook for hook in hooks))
    tensors.done()
    return build(
        cls,
        fields.where,
        weights,
        device,
        d_in=d_in,
        d_sae=d_sae,
        normalize_decoder=False,
        normalize_activations="none" if mode == "inference" else "scalar",
        **target,
        **own,
    )


def _scale(tensors: Tensors, hook: str, d_in: int) -> Tensor:
    average = tensors.take(_NORM + hook).double()
    if not 0 < average < math.inf:
        raise ValueError(f"{tensors.where}: {_NORM}{hook} = {average.item():g}: expected a finite number above 0")
    return (math.sqrt(d_in) / average).float()


def _activation(
    act_fn: str, by_norm: bool, fields: Fields, tensors: Tensors, weights: dict[str, Tensor]
) -> tuple[type[SAE], dict[str, Any]]:
    """`by_norm`: pre-activations are held to the rule times the norms of decoder rows."""
    if act_fn == "relu":
        return ReLUSAE, {}
    if act_fn == "topk":
        return TopKSAE, {"k": fields.size("top_k", 50), "relu": "before", "rescale_by_decoder_norm": by_norm}
    if act_fn == "batchtopk":
        weights["threshold"] = torch.tensor(-1.0, dtype=torch.float64)
        return BatchTopKSAE, {"k": fields.size("top_k", 50), "rescale_by_decoder_norm": by_norm}
    log_threshold = tensors.take(_LOG_THRESHOLD, len(weights["W_dec"]))
    weights["log_threshold"] = exactly(log_threshold, torch.float32, _LOG_THRESHOLD, tensors.where)
    if by_norm:
        # pre · norm > θ where pre > θ / norm, and what passes is pre itself.
        weights["threshold"] = weights.pop("log_threshold").exp() / decoder_norms(weights["W_dec"])
    return JumpReLUSAE, {"log_threshold": not by_norm}


def write(sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
    """`metadata` holds hook_point_in and hook_point_out; those of a transcoder differ."""
    check(sae, "OpenMOSS", transcoders=True, subtracts_b_dec=False)
    if sae.d_out != sae.d_in or sae.skip:
        raise cannot(sae, "OpenMOSS", f"d_out = {sae.d_out}, skip = {sae.skip}", "expected d_in, and no W_skip")
    own: dict[str, Any] = {"sparsity_include_decoder_norm": getattr(sae, "rescale_by_decoder_norm", False)}
    tensors = {"W_E": sae.W_enc, "b_E": sae.b_enc, "W_D": sae.W_dec, "b_D": sae.b_dec}
    if isinstance(sae, ReLUSAE):
        own["act_fn"] = "relu"
    elif isinstance(sae, TopKSAE):
        own |= {"act_fn": "topk", "top_k": sae.k}
    elif isinstance(sae, JumpReLUSAE):
        if not sae.learns_log:
            raise cannot(sae, "OpenMOSS", "log_threshold = False", "it stores log θ, whose exp is not θ to the bit")
        own["act_fn"] = "jumprelu"
        tensors[_LOG_THRESHOLD] = sae.log_threshold
    elif type(sae) is BatchTopKSAE and sae.threshold < 0 and sae.k == int(sae.k):
        own |= {"act_fn": "batchtopk", "top_k": int(sae.k)}
    elif isinstance(sae, BatchTopKSAE):
        what = "widths" if isinstance(sae, MatryoshkaSAE) else f"threshold = {float(sae.threshold):g}, k = {sae.k}"
        raise cannot(sae, "OpenMOSS", what, "its batchtopk has an int k, and selects over a batch always")
    else:
        raise cannot(sae, "OpenMOSS", f"architecture = {sae.architecture!r}", "use format='fastsae'")
    hooks = {"hook_point_in": "unknown", "hook_point_out": "unknown.out" if sae.is_transcoder else "unknown"}
    hooks |= {name: metadata[name] for name in hooks if name in metadata}
    if (hooks["hook_point_in"] != hooks["hook_point_out"]) is not sae.is_transcoder:
        raise ValueError(
            f"metadata = {dict(metadata)}: expected hook points that differ for a transcoder, and only there"
        )
    config = {
        "sae_type": "sae",
        **hooks,
        "d_model": sae.d_in,
        "expansion_factor": _expansion(sae),
        "use_decoder_bias": True,
        "use_glu_encoder": False,
        "norm_activation": "inference",
        **own,
    }
    write_safetensors(folder(path) / WEIGHTS_NAME, tensors)
    write_json(path / CONFIG_NAME, config)


def _expansion(sae: SAE) -> float:
    """The number whose product with d_in is cut to d_sae."""
    factor = sae.d_sae / sae.d_in
    return factor if int(sae.d_in * factor) == sae.d_sae else math.nextafter(factor, math.inf)
