"""`fastsae demo`: the experiment of "Towards Monosemanticity" (Bricken et al. 2023), on a laptop."""

from fastsae.demo.experiment import run_demo
from fastsae.demo.options import DemoOptions

__all__ = ["DemoOptions", "run_demo"]
