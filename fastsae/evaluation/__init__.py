"""How good an SAE is: sparsity, reconstruction, dead latents, language-model loss kept, known features recovered."""

from fastsae.evaluation.loss_recovered import LossRecovered, loss_recovered
from fastsae.evaluation.metrics import SAEMetrics, dead_latents, evaluate, explained_variance, l0
from fastsae.evaluation.recovery import CodeRecovery, Recovery, code_recovery, feature_recovery

__all__ = [
    "CodeRecovery",
    "LossRecovered",
    "Recovery",
    "SAEMetrics",
    "code_recovery",
    "dead_latents",
    "evaluate",
    "explained_variance",
    "feature_recovery",
    "l0",
    "loss_recovered",
]
