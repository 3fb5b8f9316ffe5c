"""Other libraries' SAEs on fastsae's operators, and their files."""

from fastsae.interop.accelerate import accelerate, restore

__all__ = ["accelerate", "restore"]
