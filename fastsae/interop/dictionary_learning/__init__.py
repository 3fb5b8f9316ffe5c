"""dictionary_learning on fastsae's operators: `fastsae.accelerate`, and drop-in classes for its trainers' configs.

    from fastsae.interop.dictionary_learning import AutoEncoderTopK, TopKTrainer    # instead of dictionary_learning's

    trainSAE(data, trainer_configs=[{"trainer": TopKTrainer, "dict_class": AutoEncoderTopK, ...}], ...)

Every class has the name of the library's that it derives from, takes the same arguments and writes the same files.
"""

from dictionary_learning.dictionary import Dictionary
from dictionary_learning.trainers.trainer import SAETrainer
from torch import nn

from fastsae.interop.dictionary_learning import trainers
from fastsae.interop.dictionary_learning.dictionaries import (
    DICTIONARIES,
    NAME,
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
    take_over,
)
from fastsae.interop.dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedAnnealTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    MatryoshkaBatchTopKTrainer,
    PAnnealTrainer,
    StandardTrainer,
    StandardTrainerAprilUpdate,
    TopKTrainer,
)
from fastsae.interop.record import Record, attach, detach, record_of

__all__ = [
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "BatchTopKTrainer",
    "GatedAnnealTrainer",
    "GatedAutoEncoder",
    "GatedSAETrainer",
    "JumpReluAutoEncoder",
    "JumpReluTrainer",
    "MatryoshkaBatchTopKSAE",
    "MatryoshkaBatchTopKTrainer",
    "PAnnealTrainer",
    "StandardTrainer",
    "StandardTrainerAprilUpdate",
    "TopKTrainer",
    "accelerate",
    "restore",
    "saes_in",
]


def saes_in(obj: object) -> list:
    """The dictionaries that obj is or holds; of a trainer its dictionary and the trainer itself, which computes too."""
    if isinstance(obj, SAETrainer):
        return [obj.ae, obj] if isinstance(getattr(obj, "ae", None), Dictionary) else []
    modules = obj.modules() if isinstance(obj, nn.Module) else ()
    return [module for module in modules if isinstance(module, Dictionary)]


def accelerate(sae: Dictionary | SAETrainer) -> None:
    """Gives a dictionary or a trainer fastsae's class in place of its own."""
    if isinstance(sae, SAETrainer):
        trainers.accelerate(sae)
    elif type(sae) in DICTIONARIES:
        sae.__class__ = DICTIONARIES[type(sae)]
        take_over(sae)
    else:
        kind = type(sae)
        name = f"{kind.__module__}.{kind.__qualname__}"
        reason = f"{name} is none of the library's classes that fastsae has an encoder for"
        attach(sae, Record(NAME, kind, why_not=reason))


def restore(sae: Dictionary | SAETrainer) -> None:
    """Gives it its own class back."""
    if isinstance(sae, SAETrainer):
        trainers.restore(sae)
    else:
        sae.__class__ = record_of(sae).original
        detach(sae)
