"""Activations of transformers models: read at a module, replaced there, and streamed in shuffled batches."""

from fastsae.activations.capture import capture, hook_module, replace_output
from fastsae.activations.shuffle import shuffled
from fastsae.activations.stream import activation_batches
from fastsae.activations.text import token_windows

__all__ = ["activation_batches", "capture", "hook_module", "replace_output", "shuffled", "token_windows"]
