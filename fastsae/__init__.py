"""fastsae: sparse autoencoders at the speed of their sparsity."""

__version__ = "0.1.0"

from fastsae import ops, optim
from fastsae.backends.dispatch import backend
from fastsae.codes import SparseCodes
from fastsae.explain import explain
from fastsae.interop import accelerate, load, restore
from fastsae.saes import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SAELoss,
    SAEOutput,
    TopKSAE,
)

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "SAELoss",
    "SAEOutput",
    "SparseCodes",
    "TopKSAE",
    "accelerate",
    "backend",
    "explain",
    "load",
    "ops",
    "optim",
    "restore",
]
