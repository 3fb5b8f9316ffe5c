"""sparsify as a peer (see comparison.py)."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from peers.comparison import D_IN, D_SAE, Results, gradients, load
from sparsify import SparseCoder, SparseCoderConfig, sparse_coder
from sparsify.fused_encoder import EncoderOutput
from torch import Tensor

NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}


def build(weights: Results, **options: Any) -> SparseCoder:
    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, **options), dtype=weights["W_enc"].dtype)
    load(coder, weights, NAMES)
    return coder


def trained(
    *, dead: Tensor | None = None, auxk_coefficient: float = 0.0, **options: Any
) -> Callable[[Results], Results]:
    """A peer with the results of comparison.training; it minimises FVU, AuxK times its coefficient and FVU / 8 of the
    4k largest.

    It divides AuxK by the variance of the target; here it is made a share of the residual's, as in Gao et al. 2024
    and fastsae. Both are constants to the gradient.
    """

    def run(inputs: Results) -> Results:
        weights = dict(inputs)
        x, target = weights.pop("x"), weights.pop("target", None)
        coder = build(weights, **options)
        found = coder.encode(x)
        activations = torch.zeros_like(found.pre_acts).scatter(-1, found.top_indices, found.top_acts)
        out = coder(x, target, dead_mask=dead)
        results = {"activations": activations, "output": out.sae_out, "fvu": out.fvu}
        total = out.fvu
        if coder.cfg.multi_topk:
            results["multi_topk"], total = out.multi_topk_fvu, total + out.multi_topk_fvu / 8
            results["output"] = coder.decode(found.top_acts, found.top_indices)
        if auxk_coefficient:
            y = x if target is None else target
            left = (y - out.sae_out).detach()
            share = y.var(0).sum() / left.var(0).sum() / min(1, int(dead.sum()) / (y.shape[-1] // 2))
            results["auxk"], total = share * out.auxk_loss, total + auxk_coefficient * share * out.auxk_loss
        total.backward()
        results["total"] = total
        return {name: value.detach() for name, value in results.items()} | gradients(coder, weights, NAMES)

    return run


def by_autograd() -> Any:
    """A context in which sparsify's encoder is its formula, and its gradient torch's.

    Its own backward (1.3.3) passes nothing on from the pre-activations, so that AuxK and Multi-TopK never reach the
    encoder, and lets a latent of a token with fewer than k positive ones learn that was kept with activation 0.
    """

    def encoder(x: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str) -> EncoderOutput:
        pre = torch.nn.functional.linear(x, weight, bias).relu()
        if activation == "topk":
            return EncoderOutput(*pre.topk(k), pre)
        values, places = pre.unflatten(-1, (k, -1)).max(dim=-1)
        return EncoderOutput(values, places + torch.arange(k) * (pre.shape[-1] // k), pre)

    return mock.patch.object(sparse_coder, "fused_encoder", encoder)
