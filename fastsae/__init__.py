"""fastsae: sparse autoencoders at the speed of their sparsity."""

from fastsae import ops
from fastsae.codes import SparseCodes

__version__ = "0.1.0"
__all__ = ["SparseCodes", "ops"]
