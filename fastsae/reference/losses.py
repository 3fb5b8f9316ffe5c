"""The loss of every architecture as dense PyTorch: [n_tokens, d_sae] tensors and torch's own autograd.

`dense_loss(sae, x, target, weights)` reads the options from a module of fastsae.saes and takes the parameters from
`weights`, by name and in any dtype; x and target are normalised and flat. It returns the total and every term by name.
Straight-through estimators are written out as torch.autograd.Function.
"""

from typing import Any

import torch
from torch import Tensor

Terms = dict[str, Tensor]


def dense_loss(sae: Any, x: Tensor, target: Tensor, weights: dict[str, Tensor]) -> Terms:
    """The total and the terms of `sae.loss` in training mode; `sae.tokens_since_fired` tells who is dead."""
    w = dict(weights)
    w["x"] = x - w["b_dec"] if sae.apply_b_dec_to_input else x
    w["norms"] = w["W_dec"].unflatten(1, (sae.sites_out or 1, -1)).norm(dim=2).sum(dim=1)
    w["skip"] = x @ w["W_skip"].T if sae.skip else torch.zeros((), dtype=x.dtype, device=x.device)
    return _LOSSES[sae.architecture](sae, w, target)


def _error(w: dict[str, Tensor], acts: Tensor, target: Tensor) -> Tensor:
    """x̂ - target."""
    return acts @ w["W_dec"] + w["b_dec"] + w["skip"] - target


def _variance(x: Tensor) -> Tensor:
    return x.detach().var(dim=0, unbiased=False).sum()


def _reconstruction(sae: Any, error: Tensor, target: Tensor) -> tuple[Tensor, Terms]:
    mse = error.square().sum(dim=1).mean()
    fvu = mse / _variance(target)
    objective = {"fvu": fvu, "mse": mse, "mse_mean": error.square().mean()}[sae.reconstruction]
    return objective, {"mse": mse, "fvu": fvu}


def _preactivations(w: dict[str, Tensor]) -> Tensor:
    return w["x"] @ w["W_enc"] + w["b_enc"]


def _keep(acts: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(acts).scatter(-1, indices, acts.gather(-1, indices))


def _auxk(sae: Any, w: dict[str, Tensor], pre: Tensor, error: Tensor) -> Terms:
    dead = sae.tokens_since_fired >= sae.dead_after_tokens
    count = int(dead.sum())
    if not count or not sae.auxk or not sae.auxk_coefficient:
        return {"auxk": error.new_zeros(())}
    rank = pre * w["norms"].detach() if sae.rescale_by_decoder_norm else pre
    chosen = rank.masked_fill(~dead, -torch.inf).topk(min(sae.auxk, count)).indices
    acts = _keep(pre if sae.auxk_form == "saelens" else pre.relu(), chosen)
    error = error.detach()
    missed = (acts @ w["W_dec"] + error).square().sum(dim=1).mean()
    if sae.auxk_form == "saelens":
        return {"auxk": missed * min(1.0, count / sae.auxk)}
    return {"auxk": missed / _variance(error)}


def _topk(sae: Any, w: dict[str, Tensor], target: Tensor) -> Terms:
    pre = _preactivations(w)
    rank = pre * w["norms"].detach() if sae.rescale_by_decoder_norm else pre

    def largest(k: int) -> Tensor:
        if sae.selection == "groupmax":
            groups = pre.relu().unflatten(1, (k, -1))
            indices = groups.max(dim=2).indices + torch.arange(k, device=pre.device) * groups.shape[2]
        else:
            indices = (rank.relu() if sae.relu == "before" else rank).topk(k).indices
        return _keep(pre.relu(), indices)

    error = _error(w, largest(sae.k), target)
    total, terms = _reconstruction(sae, error, target)
    terms |= _auxk(sae, w, pre, error)
    total = total + sae.auxk_coefficient * terms["auxk"]
    if sae.multi_topk:
        more = _error(w, largest(min(4 * sae.k, sae.d_sae)), target)
        terms["multi_topk"] = _reconstruction(sae, more, target)[1]["fvu"]
        total = total + terms["multi_topk"] / 8
    return {"total": total, **terms}


def _batch_selection(sae: Any, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    pre = _preactivations(w)
    rank = pre * w["norms"].detach() if sae.rescale_by_decoder_norm else pre
    chosen = rank.relu().reshape(-1).topk(int(sae.k * pre.shape[0])).indices
    return pre, _keep(pre.relu().reshape(-1), chosen).reshape(pre.shape)


def _batchtopk(sae: Any, w: dict[str, Tensor], target: Tensor) -> Terms:
    pre, acts = _batch_selection(sae, w)
    error = _error(w, acts, target)
    total, terms = _reconstruction(sae, error, target)
    terms |= _auxk(sae, w, pre, error)
    return {"total": total + sae.auxk_coefficient * terms["auxk"], **terms}


def _matryoshka(sae: Any, w: dict[str, Tensor], target: Tensor) -> Terms:
    pre, acts = _batch_selection(sae, w)
    total, inner = 0.0, {}
    for width, weight in zip(sae.widths, sae.width_weights, strict=True):
        error = acts[:, :width] @ w["W_dec"][:width] + w["b_dec"] + w["skip"] - target
        objective, terms = _reconstruction(sae, error, target)
        total = total + weight * objective
        inner[f"mse_{width}"] = terms["mse"]
    del inner[f"mse_{sae.d_sae}"]
    terms |= inner | _auxk(sae, w, pre, error)
    return {"total": total + sae.auxk_coefficient * terms["auxk"], **terms}


def _ghost(sae: Any, w: dict[str, Tensor], pre: Tensor, error: Tensor) -> Tensor:
    dead = sae.tokens_since_fired >= sae.dead_after_tokens
    if not dead.any():
        return error.new_zeros(())
    left = -error.detach()
    ghosts = pre[:, dead].exp() @ w["W_dec"][dead]
    scale = left.norm(dim=1, keepdim=True) / (1e-6 + 2 * ghosts.norm(dim=1, keepdim=True))
    missed = (scale.detach() * ghosts - left).square().sum(dim=1)
    return (missed * (left.square().sum(dim=1) / (1e-6 + missed)).detach()).mean()


def _relu(sae: Any, w: dict[str, Tensor], target: Tensor) -> Terms:
    pre = _preactivations(w)
    acts = pre.relu()
    error = _error(w, acts, target)
    total, terms = _reconstruction(sae, error, target)
    if sae.penalty == "l1":
        weighed = acts * w["norms"] if sae.l1_weight == "decoder_norm" else acts
        terms["l1"] = weighed.norm(p=sae.lp_norm, dim=1).mean()
        total = total + sae.sparsity_scale * sae.l1_coefficient * terms["l1"]
    else:
        rho, rates = sae.kl_target, acts.tanh().mean(dim=0).clamp(1e-6, 1 - 1e-6)
        terms["kl"] = (rho * (rho / rates).log() + (1 - rho) * ((1 - rho) / (1 - rates)).log()).sum()
        total = total + sae.sparsity_scale * sae.kl_coefficient * terms["kl"]
    if sae.ghost_gradients:
        terms["ghost"] = _ghost(sae, w, pre, error)
        total = total + terms["ghost"]
    return {"total": total, **terms}


def _rectangle(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x < 0.5)).to(x.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, to_input):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        jump = threshold / ctx.bandwidth * _rectangle((pre - threshold) / ctx.bandwidth) * grad
        return (pre > threshold) * grad + (jump if ctx.to_input else 0), -jump.sum(dim=0), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, to_input):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        step = _rectangle((pre - threshold) / ctx.bandwidth) / ctx.bandwidth * grad
        return step if ctx.to_input else None, -step.sum(dim=0), None, None


def _jumprelu(sae: Any, w: dict[str, Tensor], target: Tensor) -> Terms:
    theta = w["log_threshold"].exp() if sae.learns_log else w["threshold"]
    pre = _preactivations(w)
    norms = torch.ones_like(w["norms"]) if sae.normalize_decoder else w["norms"]
    acts = _JumpReLU.apply(pre, theta, sae.bandwidth, sae.ste_to_input)
    total, terms = _reconstruction(sae, _error(w, acts, target), target)
    if sae.penalty == "tanh":
        terms["l0"] = (sae.tanh_scale * acts * norms).tanh().sum(dim=1).mean()
    else:
        l0 = _Step.apply(pre, theta, sae.bandwidth, sae.ste_to_input).sum(dim=1)
        terms["l0"] = {
            "step": lambda: l0.mean(),
            "quadratic": lambda: (2 / sae.target_l0 * (l0 - sae.target_l0).square()).mean(),
            "target": lambda: (l0.mean() / sae.target_l0 - 1).square(),
        }[sae.penalty]()
    total = total + sae.sparsity_scale * sae.l0_coefficient * terms["l0"]
    if sae.pre_act_coefficient:
        dead = sae.tokens_since_fired >= sae.dead_after_tokens
        terms["pre_act"] = ((theta - pre).relu() * dead * norms).sum(dim=1).mean()
        total = total + sae.pre_act_coefficient * terms["pre_act"]
    return {"total": total, **terms}


def _gated(sae: Any, w: dict[str, Tensor], target: Tensor) -> Terms:
    gate = w["x"] @ w["W_enc"] + w["b_gate"]
    magnitude = w["x"] @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]
    total, terms = _reconstruction(sae, _error(w, (gate > 0) * magnitude.relu(), target), target)
    norms = torch.ones_like(w["norms"]) if sae.normalize_decoder else w["norms"]
    terms["l1"] = (gate.relu() * norms).sum(dim=1).mean()
    frozen = w | {name: w[name].detach() for name in ("W_dec", "b_dec")} if sae.freeze_decoder else w
    terms["aux"] = _error(frozen, gate.relu(), target).square().sum(dim=1).mean()
    total = total + sae.sparsity_scale * sae.l1_coefficient * terms["l1"] + sae.aux_coefficient * terms["aux"]
    return {"total": total, **terms}


_LOSSES = {
    "topk": _topk,
    "batchtopk": _batchtopk,
    "matryoshka": _matryoshka,
    "relu": _relu,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
