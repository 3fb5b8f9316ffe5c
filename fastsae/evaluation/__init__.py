"""How good an SAE is: sparsity, reconstruction, dead latents, and the language-model loss it keeps."""

from fastsae.evaluation.loss_recovered import LossRecovered, loss_recovered
from fastsae.evaluation.metrics import SAEMetrics, dead_latents, evaluate, explained_variance, l0

__all__ = ["LossRecovered", "SAEMetrics", "dead_latents", "evaluate", "explained_variance", "l0", "loss_recovered"]
