"""Other libraries' SAEs on fastsae's operators, and their files."""

from fastsae.interop.accelerate import accelerate, restore
from fastsae.interop.files import load

__all__ = ["accelerate", "load", "restore"]
