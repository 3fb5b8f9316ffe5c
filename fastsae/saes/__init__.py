"""SAE modules: one architecture in each file, on the operators of fastsae.ops."""

from fastsae.saes.base import SAE, SAELoss, SAEOutput
from fastsae.saes.files import load
from fastsae.saes.topk import TopKSAE

__all__ = ["SAE", "SAELoss", "SAEOutput", "TopKSAE", "load"]
