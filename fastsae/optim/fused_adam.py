"""FusedAdam: forward, backward and update of an SAE in one call, without a gradient tensor."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastsae.ops import Slot, fused_update
from fastsae.saes import SAELoss, TopKSAE


class FusedAdam(torch.optim.Optimizer):
    """torch.optim.Adam for a TopKSAE, with the backward inside: `opt.step(x)` replaces loss, backward and step.

        loss = opt.step(x)          # the same loss, and the same update up to rounding, as
                                    # loss = sae.loss(x); loss.total.backward(); adam.step() with the decoder hooks

    The gradients of W_enc, b_enc and W_dec are made latent by latent and used at once (`fastsae.ops.fused_update`). A
    step in which AuxK acts takes autograd's way, with the same Adam state. The decoder's projection and normalisation
    are part of the step: do not also register `sae.register_optimizer_hooks`. State, `state_dict` and learning-rate
    schedulers are those of torch.optim.Adam, so a run may change from one to the other.

    Args:
        sae: a fastsae.TopKSAE in its usual memory layout (W_enc.T contiguous).
        lr, betas, eps, weight_decay: as torch.optim.Adam.

    Raises:
        TypeError: for another module.
        ValueError: for a hyperparameter out of its range.

    Source: Kingma & Ba 2015; fused as FBGEMM's table-batched embeddings fuse theirs.
    """

    def __init__(
        self,
        sae: TopKSAE,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if not isinstance(sae, TopKSAE):
            raise TypeError(f"sae is a {type(sae).__name__}: expected a fastsae.TopKSAE")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr = {lr}, betas = {betas}, eps = {eps}, weight_decay = {weight_decay}: expected lr, eps and "
                "weight_decay of at least 0 and betas in [0, 1)"
            )
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(sae.parameters(), defaults)
        self._sae = sae

    def _slot(self, parameter: Tensor) -> Slot:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return Slot(parameter.detach(), state["exp_avg"], state["exp_avg_sq"])

    def step(self, x: Tensor) -> SAELoss:
        """One training step on activations [..., d_in]; returns the loss before the update, detached."""
        sae = self._sae
        if sae.auxk_will_act(x):
            return self._step_by_autograd(x)
        group: dict[str, Any] = self.param_groups[0]
        loss, parts = sae.loss_with_gradients(x)
        slots = {name: self._slot(p) for name, p in sae.named_parameters()}
        for parameter in sae.parameters():
            self.state[parameter]["step"] += 1
        grad_b_dec = parts.grad_b_dec
        fused_update(
            loss.codes,
            parts.grad_values,
            parts.residual,
            parts.x,
            slots["W_enc"],
            slots["b_enc"],
            slots["W_dec"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(self.state[sae.W_dec]["step"]),
            b_dec=sae.b_dec.detach() if sae.apply_b_dec_to_input else None,
            row_scale=parts.row_scale,
            unit_norm=sae.normalize_decoder,
        )
        self._adam([sae.b_dec], [grad_b_dec])
        return loss

    def _step_by_autograd(self, x: Tensor) -> SAELoss:
        sae = self._sae
        parameters = list(sae.parameters())
        with torch.enable_grad():
            loss = sae.loss(x)
            loss.total.backward()
        sae.project_decoder_grad_()
        for parameter in parameters:
            self._slot(parameter)
            self.state[parameter]["step"] += 1
        self._adam(parameters, [p.grad for p in parameters])
        sae.normalize_decoder_()
        self.zero_grad(set_to_none=True)
        return loss

    @torch.no_grad()
    def _adam(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        group = self.param_groups[0]
        states = [self.state[p] for p in parameters]
        # torch's kernel for CPUs would copy a gradient that is not contiguous.
        parameters, gradients, *moments = (
            [t if t.is_contiguous() else t.T for t in tensors]
            for tensors in (
                parameters,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            )
        )
        adam(
            parameters,
            gradients,
            *moments,
            [],
            # torch's function counts the step itself.
            [state["step"] - 1 for state in states],
            # On other devices it would want the step counts there.
            fused=parameters[0].device.type == "cpu",
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
