"""OpenAI's sparse_autoencoder: one .pt file of a state dict and the name of its activation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsae.interop.files.build import build
from fastsae.interop.files.fields import Fields
from fastsae.interop.files.tensors import read_pickle, tensors_of
from fastsae.interop.files.write import cannot, check, folder, write_pickle
from fastsae.saes import ReLUSAE, TopKSAE
from fastsae.saes.base import SAE

WEIGHTS_NAME = "autoencoder.pt"
NAMES = (WEIGHTS_NAME,)
MAIN = WEIGHTS_NAME
KEEPS_METADATA = False
# Counts of its own training, in calls and not in tokens; nothing is computed from them.
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognizes(path: Path) -> bool:
    if path.is_dir():
        return (path / WEIGHTS_NAME).is_file()
    # ae.pt and ae_STEP.pt are dictionary_learning's.
    return path.suffix == ".pt" and path.stem != "ae" and not path.stem.startswith("ae_")


def read(path: Path, device: torch.device | str) -> SAE:
    path = path / WEIGHTS_NAME if path.is_dir() else path
    values = read_pickle(path)
    where = str(path)
    fields = Fields(
        {name: values.pop(name) for name in ("activation", "activation_state_dict") if name in values}, where
    )
    tensors = tensors_of(values, where)
    d_sae, d_in = tensors.shape("encoder.weight", 2)
    weights = {
        "W_enc": tensors.take("encoder.weight", d_sae, d_in).T,
        "b_enc": tensors.take("latent_bias", d_sae),
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T,
        "b_dec": tensors.take("pre_bias", d_in),
    }
    tensors.drop(*_STATISTICS)
    tensors.done()
    options: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    # "Identity" keeps every latent, negative ones too: none of fastsae's architectures.
    activation = fields.text("activation", "ReLU", of=("ReLU", "TopK"))
    state = fields.object("activation_state_dict", {})
    if activation == "ReLU":
        state.done()
        return build(ReLUSAE, where, weights, device, **options, l1_weight="none")
    options["k"] = state.size("k")
    state.text("postact_fn", "ReLU", of=("ReLU",))
    state.done()
    # The file does not say so; Autoencoder.from_state_dict normalises if and only if the activation is TopK.
    return build(TopKSAE, where, weights, device, **options, relu="after", normalize_activations="layer_norm")


def write(sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
    """To the file `path` if it ends in .pt, else into the folder."""
    if isinstance(sae, TopKSAE):
        # By its activation alone the reader decides whether to normalise.
        check(sae, "OpenAI", normalizations=("layer_norm",), subtracts_b_dec=True)
        if sae.rescale_by_decoder_norm:
            raise cannot(sae, "OpenAI", "rescale_by_decoder_norm = True", "it ranks pre-activations as they are")
        activation, state = "TopK", {"k": sae.k, "postact_fn": "ReLU"}
    elif isinstance(sae, ReLUSAE):
        check(sae, "OpenAI", subtracts_b_dec=True)
        activation, state = "ReLU", {}
    else:
        raise cannot(sae, "OpenAI", f"architecture = {sae.architecture!r}", "it has TopK and ReLU alone")
    if path.suffix != ".pt":
        path = folder(path) / WEIGHTS_NAME
    folder(path.parent)
    write_pickle(
        path,
        {
            "pre_bias": sae.b_dec,
            "latent_bias": sae.b_enc,
            "encoder.weight": sae.W_enc.T,
            "decoder.weight": sae.W_dec.T,
            "stats_last_nonzero": torch.zeros(sae.d_sae, dtype=torch.int64),
            "latents_activation_frequency": torch.ones(sae.d_sae),
            "latents_mean_square": torch.zeros(sae.d_sae),
            "activation": activation,
            "activation_state_dict": state,
        },
    )
