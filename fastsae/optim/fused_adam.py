"""FusedAdam: forward, backward and update of an SAE in one call, without a gradient tensor."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastsae.ops import Slot, fused_update, normalize_rows_
from fastsae.saes import SAE, SAELoss, TopKSAE


class FusedAdam(torch.optim.Optimizer):
    """torch.optim.Adam for an SAE, with the backward inside: `opt.step(x)` replaces loss, backward and step.

        loss = opt.step(x)          # the same loss, and the same update up to rounding, as
                                    # loss = sae.loss(x); loss.total.backward(); adam.step() with the decoder hooks

    The gradients of a TopKSAE's W_enc, b_enc and W_dec are made latent by latent and used at once
    (`fastsae.ops.fused_update`). A step in which AuxK acts, a TopKSAE with a skip connection or Multi-TopK, and other
    architectures take autograd's way, with the same Adam state. The decoder's projection and normalisation
    are part of the step: do not also register `sae.register_optimizer_hooks`. State, `state_dict` and learning-rate
    schedulers are those of torch.optim.Adam, so a run may change from one to the other.

    Args:
        sae: any SAE of fastsae, in its usual memory layout (W_enc.T contiguous).
        lr, betas, eps, weight_decay: as torch.optim.Adam.
        master_weights: for an SAE in bfloat16 or float16, keep float32 weights and moments in the state ("master"
            beside "exp_avg" and "exp_avg_sq"): steps too small for the parameter's 8 or 11 bits then add up instead of
            being rounded away (Micikevicius et al. 2018, "Mixed precision training"). 14 bytes a parameter, not 6.

    Raises:
        TypeError: for another module.
        ValueError: for a hyperparameter out of its range.

    Source: Kingma & Ba 2015; fused as FBGEMM's table-batched embeddings fuse theirs.
    """

    def __init__(
        self,
        sae: SAE,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master_weights: bool = False,
    ):
        if not isinstance(sae, SAE):
            raise TypeError(f"sae is a {type(sae).__name__}: expected an SAE of fastsae")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr = {lr}, betas = {betas}, eps = {eps}, weight_decay = {weight_decay}: expected lr, eps and "
                "weight_decay of at least 0 and betas in [0, 1)"
            )
        if master_weights and sae.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"master_weights = True for an SAE in {sae.dtype}: expected one in bfloat16 or float16, whose weights "
                "have digits to lose"
            )
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(sae.parameters(), defaults)
        self._sae = sae
        self._master_weights = master_weights
        # What a parameter's version was when its master was made or written last.
        self._versions: dict[Tensor, int] = {}

    def _slot(self, parameter: Tensor) -> Slot:
        state = self.state[parameter]
        if not state:
            dtype = torch.float32 if self._master_weights else parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return Slot(parameter.detach(), state["exp_avg"], state["exp_avg_sq"], self._master(parameter))

    def _master(self, parameter: Tensor) -> Tensor | None:
        """The float32 weights; where somebody else has changed the parameter since, they are its values."""
        if not self._master_weights:
            return None
        state, weights = self.state[parameter], parameter.detach()
        if "master" not in state:
            state["master"] = weights.float()
        elif self._versions.get(parameter) != parameter._version:
            master = state["master"]
            master.copy_(master.where(master.to(weights.dtype) == weights, weights.float()))
        self._versions[parameter] = parameter._version
        return state["master"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts state to the parameter's dtype; float32 moments and masters stay float32."""
        super().load_state_dict(state_dict)
        if not self._master_weights:
            return
        for index, parameter in enumerate(self._sae.parameters()):
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step":
                    kept = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
                    self.state[parameter][key] = kept.copy_(value)
        self._versions.clear()

    def step(self, x: Tensor, target: Tensor | None = None) -> SAELoss:
        """One training step on activations [..., d_in], of a transcoder with its target [..., d_out].

        Returns the loss before the update.
        """
        sae = self._sae
        if not isinstance(sae, TopKSAE) or not sae.gradients_by_formula or sae.auxk_will_act(x):
            return self._step_by_autograd(x, target)
        group: dict[str, Any] = self.param_groups[0]
        loss, parts = sae.loss_with_gradients(x, target)
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
        self._adam([slots["b_dec"]], [grad_b_dec])
        self._remember_versions()
        return loss

    def _step_by_autograd(self, x: Tensor, target: Tensor | None) -> SAELoss:
        sae = self._sae
        parameters = dict(sae.named_parameters())
        with torch.enable_grad():
            loss = sae.loss(x, target)
            loss.total.backward()
        sae.project_decoder_grad_()
        slots = {name: self._slot(parameter) for name, parameter in parameters.items()}
        for parameter in parameters.values():
            self.state[parameter]["step"] += 1
        self._adam(list(slots.values()), [parameter.grad for parameter in parameters.values()])
        if sae.normalize_decoder:
            W_dec = slots["W_dec"]
            normalize_rows_(W_dec.parameter if W_dec.master is None else W_dec.master)
            if W_dec.master is not None:
                W_dec.parameter.copy_(W_dec.master)
        self._remember_versions()
        self.zero_grad(set_to_none=True)
        return loss

    def _remember_versions(self) -> None:
        self._versions = {parameter: parameter._version for parameter in self._sae.parameters()}

    @torch.no_grad()
    def _adam(self, slots: list[Slot], gradients: list[Tensor]) -> None:
        group = self.param_groups[0]
        weights = [slot.parameter if slot.master is None else slot.master for slot in slots]
        gradients = [gradient.to(weight.dtype) for gradient, weight in zip(gradients, weights, strict=True)]
        # torch's kernel for CPUs would copy a gradient that is not contiguous.
        rows, gradients, *moments = (
            [t if t.is_contiguous() else t.T for t in tensors]
            for tensors in (
                weights,
                gradients,
                [slot.first_moment for slot in slots],
                [slot.second_moment for slot in slots],
            )
        )
        # torch's function counts the step itself, and the parameters of a step are all at the same.
        step = self.state[self._sae.b_dec]["step"] - 1
        adam(
            rows,
            gradients,
            *moments,
            [],
            [step.clone() for _ in slots],
            # On other devices it would want the step counts there.
            fused=rows[0].device.type == "cpu",
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for slot in slots:
            if slot.master is not None:
                slot.parameter.copy_(slot.master)
