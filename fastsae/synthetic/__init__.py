"""Activations whose true features are known: what an SAE finds can be held against what is there."""

from fastsae.synthetic.dictionary import SparseDictionary, zipf_probabilities
from fastsae.synthetic.source import KnownFeatures
from fastsae.synthetic.superposition import ToySuperposition

__all__ = ["KnownFeatures", "SparseDictionary", "ToySuperposition", "zipf_probabilities"]
