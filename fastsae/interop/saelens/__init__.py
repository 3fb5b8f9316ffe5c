"""SAELens: its SAEs on fastsae's operators, in place (sae-lens 6)."""

from sae_lens.saes.sae import SAE
from torch import nn

from fastsae.interop.record import Record, attach, detach, record_of
from fastsae.interop.saelens import attached
from fastsae.interop.saelens.base import _STATE, Fast
from fastsae.interop.saelens.jumprelu import FastJumpReLUSAE, FastJumpReLUTrainingSAE
from fastsae.interop.saelens.layout import feature_major_, row_major_
from fastsae.interop.saelens.relu import (
    FastGatedSAE,
    FastGatedTrainingSAE,
    FastStandardSAE,
    FastStandardTrainingSAE,
)
from fastsae.interop.saelens.topk import (
    FastBatchTopKTrainingSAE,
    FastMatryoshkaBatchTopKTrainingSAE,
    FastTopKSAE,
    FastTopKTrainingSAE,
)
from fastsae.interop.saelens.transcoder import (
    FastJumpReLUSkipTranscoder,
    FastJumpReLUTranscoder,
    FastSkipTranscoder,
    FastTranscoder,
)

_FAST: dict[type, type[Fast]] = {
    fast.original: fast
    for fast in (
        FastBatchTopKTrainingSAE,
        FastGatedSAE,
        FastGatedTrainingSAE,
        FastJumpReLUSAE,
        FastJumpReLUSkipTranscoder,
        FastJumpReLUTrainingSAE,
        FastJumpReLUTranscoder,
        FastMatryoshkaBatchTopKTrainingSAE,
        FastSkipTranscoder,
        FastStandardSAE,
        FastStandardTrainingSAE,
        FastTopKSAE,
        FastTopKTrainingSAE,
        FastTranscoder,
    )
}
# What torch.compile or a test may have put on an instance: fastsae's methods would never be called.
_METHODS = ("encode", "decode", "forward", "encode_with_hidden_pre", "training_forward_pass", "calculate_aux_loss")


def saes_in(obj: object) -> list[nn.Module]:
    """The SAEs that obj is or holds: an SAE, a trainer, a runner, a model with SAEs attached, a module with some."""
    found: list[nn.Module] = []
    if isinstance(obj, nn.Module):
        found += [module for module in obj.modules() if isinstance(module, SAE)]
        held = getattr(obj, "acts_to_saes", None)
    else:
        held = getattr(obj, "saes", None)
        if isinstance(getattr(obj, "sae", None), SAE):
            found.append(obj.sae)
    if isinstance(held, dict):
        found += [sae for sae in held.values() if isinstance(sae, SAE)]
    return list({id(sae): sae for sae in found}.values())


def accelerate(sae: nn.Module) -> None:
    """Gives the SAE the class of fastsae's that derives from its own, and its encoder a row for each latent."""
    original = type(sae)
    record = Record("sae_lens", original)
    attach(sae, record)
    replaced = [name for name in _METHODS if name in sae.__dict__]
    if original not in _FAST:
        record.why_not = f"{original.__module__}.{original.__qualname__} is not a class that fastsae has a form of"
    elif replaced:
        record.why_not = f"{', '.join(replaced)} of this SAE is not that of its class (torch.compile, a patch)"
    else:
        attached.install()
        feature_major_(sae.W_enc)
        sae.__class__ = _FAST[original]


def restore(sae: nn.Module) -> None:
    """Gives the SAE its own class and memory layout back."""
    record = record_of(sae)
    if isinstance(sae, Fast):
        sae.__class__ = record.original
        row_major_(sae.W_enc)
    sae.__dict__.pop(_STATE, None)
    detach(sae)
