"""sparsify's folders: cfg.json and sae.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsae.interop.files.build import build
from fastsae.interop.files.fields import read_json
from fastsae.interop.files.tensors import read_safetensors
from fastsae.interop.files.write import cannot, check, folder, write_json, write_safetensors
from fastsae.saes import TopKSAE
from fastsae.saes.base import SAE

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae.safetensors"
NAMES = (CONFIG_NAME, WEIGHTS_NAME)
MAIN = WEIGHTS_NAME
KEEPS_METADATA = False


def recognizes(path: Path) -> bool:
    return (path / WEIGHTS_NAME).is_file()


def read(path: Path, device: torch.device | str) -> SAE:
    fields = read_json(path / CONFIG_NAME)
    tensors = read_safetensors(path / WEIGHTS_NAME)
    d_in, expansion = fields.size("d_in"), fields.size("expansion_factor", 32)
    # 0, which it writes by default, stands for the multiple of d_in.
    given = fields.take("num_latents", 0)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        fields.fail("num_latents", given, "an int of at least 0")
    d_sae = given or d_in * expansion
    transcode, skip = fields.flag("transcode", False), fields.flag("skip_connection", False)
    if skip and not transcode:
        fields.fail("skip_connection", True, "false without transcode: fastsae's skip connections are transcoders'")
    fields.refuse("signed", False, why="a selection by absolute value is not one of relu(pre)")
    options = {
        "k": fields.size("k", 32),
        "selection": fields.text("activation", "topk", of=("topk", "groupmax")),
        "multi_topk": fields.flag("multi_topk", False),
        "normalize_decoder": fields.flag("normalize_decoder", True),
        "d_out": d_in if transcode else None,
        "skip": skip,
    }
    fields.done()
    weights = {
        "W_enc": tensors.take("encoder.weight", d_sae, d_in).T,
        "b_enc": tensors.take("encoder.bias", d_sae),
        "W_dec": tensors.take("W_dec", d_sae, d_in),
        "b_dec": tensors.take("b_dec", d_in),
    }
    if skip:
        weights["W_skip"] = tensors.take("W_skip", d_in, d_in)
    tensors.done()
    return build(TopKSAE, fields.where, weights, device, d_in=d_in, d_sae=d_sae, relu="before", **options)


def write(sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
    if not isinstance(sae, TopKSAE):
        raise cannot(sae, "sparsify", f"architecture = {sae.architecture!r}", "it has TopK and GroupMax alone")
    check(sae, "sparsify", transcoders=True, subtracts_b_dec=True)
    if sae.d_out != sae.d_in:
        raise cannot(sae, "sparsify", f"d_out = {sae.d_out}", f"expected d_in = {sae.d_in}, the width of its W_dec")
    if sae.rescale_by_decoder_norm:
        raise cannot(sae, "sparsify", "rescale_by_decoder_norm = True", "it ranks pre-activations as they are")
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.skip:
        tensors["W_skip"] = sae.W_skip
    config = {
        "activation": sae.selection,
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": sae.normalize_decoder,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": sae.multi_topk,
        "skip_connection": sae.skip,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
    }
    write_safetensors(folder(path) / WEIGHTS_NAME, tensors)
    write_json(path / CONFIG_NAME, config)
