"""SAE modules: one architecture in each file, on the operators of fastsae.ops."""

from fastsae.saes.base import SAE, SAEOutput
from fastsae.saes.batchtopk import BatchTopKSAE
from fastsae.saes.files import load
from fastsae.saes.gated import GatedSAE
from fastsae.saes.jumprelu import JumpReLUSAE
from fastsae.saes.loss import SAELoss
from fastsae.saes.matryoshka import MatryoshkaSAE
from fastsae.saes.relu import ReLUSAE
from fastsae.saes.topk import TopKSAE

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "SAELoss",
    "SAEOutput",
    "TopKSAE",
    "load",
]
