"""Optimizers that know the shape of an SAE's gradient."""

from fastsae.optim.fused_adam import FusedAdam

__all__ = ["FusedAdam"]
