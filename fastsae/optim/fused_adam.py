"""FusedAdam: forward, backward and update of an SAE in one call, without a gradient tensor."""

from typing import Any

import torch
from torch import Tensor

from fastsae.ops import Slot, fused_update, gradient_norm
from fastsae.optim import _dense
from fastsae.saes import SAE, SAELoss

# What torch.optim.Adam's groups have besides ours.
_OF_ADAM = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


class FusedAdam(torch.optim.Optimizer):
    """torch.optim.Adam for an SAE, with the backward inside: `opt.step(x)` replaces loss, backward and step.

        loss = opt.step(x)          # the same loss, and the same update up to rounding, as
                                    # loss = sae.loss(x); loss.total.backward(); adam.step() with the decoder hooks

    The gradients of W_enc, b_enc and W_dec are made latent by latent and used at once (`fastsae.ops.fused_update`) for
    TopK, BatchTopK, ReLU and JumpReLU. A step in which AuxK acts, a TopKSAE with a skip connection or Multi-TopK,
    penalties on the decoder's norms or on dead latents (a ReLUSAE's default has the first), Matryoshka and Gated take
    autograd's way, with the same Adam state; `sae.gradients_by_formula` tells. The decoder's projection and
    normalisation are part of the step: do not also register `sae.register_optimizer_hooks`.

    What needs gradients before the update, their accumulation and their reduction over processes, goes by autograd:

        for part in parts:
            (sae.loss(part).total / len(parts)).backward()
        for p in sae.parameters():                      # with several processes
            torch.distributed.all_reduce(p.grad)
            p.grad /= torch.distributed.get_world_size()
        opt.step_from_gradients()
        opt.zero_grad()

    Clips, in this order, after the projection and before weight decay, as `fastsae.training.update` and the training
    loops of OpenAI and dictionary_learning have it: by value, by row, by the norm of all. The last takes two passes, of
    which the first sums every latent's gradients for their norm and keeps none. Each multiplies by
    min(1, c / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.

    State, `state_dict` and learning-rate schedulers are those of torch.optim.Adam, so a run may change from one to the
    other. The options stand in `param_groups[0]` beside the learning rate.

    Args:
        sae: any SAE of fastsae, in its usual memory layout (W_enc.T contiguous).
        lr, betas, eps, weight_decay: as torch.optim.Adam.
        master_weights: for an SAE in bfloat16 or float16, keep float32 weights and moments in the state ("master"
            beside "exp_avg" and "exp_avg_sq"): steps too small for the parameter's 8 or 11 bits then add up instead of
            being rounded away (Micikevicius et al. 2018, "Mixed precision training"). 14 bytes a parameter, not 6.
        clip_value: every entry of every gradient is clamped to [-clip_value, clip_value].
        clip_row_norm: each latent's encoder gradient, a row of W_enc.T, and its decoder gradient, a row of W_dec, are
            scaled to at most this norm.
        clip_norm: all gradients together are scaled to at most this norm, b_dec's included; `opt.grad_norm` is what it
            was before, in the last step.
        lazy: the step of torch.optim.SparseAdam. A latent without an entry in the batch keeps its parameters and
            moments, where Adam's still move by what its moments remember; the bias correction counts all steps; eps is
            added to √v before the bias correction, not after. b_dec and W_skip, which every token touches, take
            Adam's. A step by autograd also leaves alone a latent whose gradients are all zero: `step_from_gradients`
            knows of no batch. No weight decay.
        state_dtype: torch.bfloat16 keeps both moments in bfloat16, with float32 weights (parameters or masters): 8
            bytes a parameter, not 12. They are rounded up or down at random so that their mean is right, by bits that
            follow from `seed`, step, parameter, row and column alone: the same on every backend, with any number of
            threads. The step itself uses the moments before they are rounded. None is the dtype of the weights.
        seed: of that rounding, saved with the state.
        independent: in a process of torch.distributed that trains an SAE of its own: `step(x)` then averages nothing
            over processes. Otherwise it raises.

    Raises:
        TypeError: for another module.
        ValueError: for a hyperparameter out of its range.

    Source: Kingma & Ba 2015; fused as FBGEMM's table-batched embeddings fuse theirs, whose state may be rounded at
    random too.
    """

    def __init__(
        self,
        sae: SAE,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master_weights: bool = False,
        *,
        clip_value: float | None = None,
        clip_row_norm: float | None = None,
        clip_norm: float | None = None,
        lazy: bool = False,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        independent: bool = False,
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
        clips = {"clip_value": clip_value, "clip_row_norm": clip_row_norm, "clip_norm": clip_norm}
        for name, clip in clips.items():
            if clip is not None and not clip > 0:
                raise ValueError(f"{name} = {clip}: expected a number above 0, or None")
        if lazy and weight_decay:
            raise ValueError(f"weight_decay = {weight_decay} with lazy=True: expected 0, as SparseAdam has none")
        weights = torch.float32 if master_weights else sae.dtype
        if state_dtype not in (None, weights) and (state_dtype, weights) != (torch.bfloat16, torch.float32):
            raise ValueError(
                f"state_dtype = {state_dtype} with weights in {weights}: expected None, {weights}, or torch.bfloat16 "
                "with weights in float32 (those of the SAE, or master_weights=True)"
            )
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, **clips, "lazy": lazy}
        super().__init__(sae.parameters(), {**defaults, "seed": seed})
        self.grad_norm: Tensor | None = None
        self._sae = sae
        self._master_weights = master_weights
        self._state_dtype = state_dtype
        self._independent = independent
        # What a parameter's version was when its master was made or written last.
        self._versions: dict[Tensor, int] = {}

    def _slot(self, parameter: Tensor) -> Slot:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for moment in ("exp_avg", "exp_avg_sq"):
                dtype = self._moment_dtype(parameter)
                state[moment] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return Slot(parameter.detach(), state["exp_avg"], state["exp_avg_sq"], self._master(parameter))

    def _moment_dtype(self, parameter: Tensor) -> torch.dtype:
        return self._state_dtype or (torch.float32 if self._master_weights else parameter.dtype)

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
        """A state of FusedAdam, whose options come with it, or of torch.optim.Adam, beside which the options stay.

        Moments take this optimizer's dtype, to the nearest, and the memory layout of their parameters.

        Raises ValueError as torch's does, and for a state of Adam with amsgrad, maximize or decoupled weight decay.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            for name in ("amsgrad", "maximize", "decoupled_weight_decay"):
                if group.get(name) and (name != "decoupled_weight_decay" or group["weight_decay"]):
                    raise ValueError(f"the state is of an Adam with {name}=True: expected one without, as FusedAdam is")
            for name in _OF_ADAM:
                group.pop(name, None)
        options = [dict(group) for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, before in zip(self.param_groups, options, strict=True):
            for name, value in before.items():
                group.setdefault(name, value)
            for place, parameter in zip(groups[0]["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(place, {}).items():
                    self.state[parameter][key] = self._as_kept(parameter, key, value)
        self._versions.clear()

    def _as_kept(self, parameter: Tensor, key: str, value: Any) -> Tensor:
        if key == "step":
            return torch.tensor(float(value), dtype=torch.float32)
        dtype = torch.float32 if key == "master" else self._moment_dtype(parameter)
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(value)

    def step(self, x: Tensor, target: Tensor | None = None) -> SAELoss:
        """One training step on activations [..., d_in], of a transcoder with its target [..., d_out].

        Returns the loss before the update. Raises RuntimeError in a run of several processes, whose gradients it could
        not average, unless `independent`; and where a parameter holds a gradient, which it would not use.
        """
        self._check_alone()
        for name, parameter in self._sae.named_parameters():
            if parameter.grad is not None:
                raise RuntimeError(
                    f"{name} holds a gradient, which step(x) would not use: call step_from_gradients(), or zero_grad() "
                    "before"
                )
        if self._may_fuse(x):
            return self._step_fused(x, target)
        with torch.enable_grad():
            loss = self._sae.loss(x, target)
            loss.total.backward()
        self._step_on_gradients(_dense.has_entry(loss.codes))
        self.zero_grad(set_to_none=True)
        return loss

    def step_from_gradients(self) -> None:
        """The same step on the gradients that the parameters hold, from any number of backwards and processes.

        Projects and clips them in place and leaves them; `zero_grad()` is the caller's. A parameter without a gradient
        is left, as torch.optim.Adam leaves it. Raises RuntimeError if none has one.
        """
        if all(parameter.grad is None for parameter in self._sae.parameters()):
            raise RuntimeError("no parameter holds a gradient: call sae.loss(x).total.backward() before, or step(x)")
        self._step_on_gradients(torch.zeros(self._sae.d_sae, dtype=torch.bool, device=self._sae.device))
        # A learning-rate scheduler asks whether the optimizer has stepped.
        self._opt_called = True

    def _check_alone(self) -> None:
        distributed = torch.distributed
        if self._independent or not (distributed.is_available() and distributed.is_initialized()):
            return
        if (processes := distributed.get_world_size()) > 1:
            raise RuntimeError(
                f"step(x) makes no gradients that the {processes} processes of torch.distributed could average: call "
                "backward, all_reduce each parameter's grad and call step_from_gradients(), or build FusedAdam with "
                "independent=True where each process trains an SAE of its own"
            )

    def _may_fuse(self, x: Tensor) -> bool:
        sae = self._sae
        if not sae.gradients_by_formula or sae.auxk_will_act(x):
            return False
        parameters = list(sae.parameters())
        steps = {float(self.state.get(p, {}).get("step", 0.0)) for p in parameters}
        return len(steps) == 1 and all(parameter.requires_grad for parameter in parameters)

    @torch.no_grad()
    def _step_fused(self, x: Tensor, target: Tensor | None) -> SAELoss:
        sae: Any = self._sae
        group: dict[str, Any] = self.param_groups[0]
        loss, parts = sae.loss_with_gradients(x, target)
        slots = {name: self._slot(p) for name, p in sae.named_parameters()}
        step = self._count(sae.parameters())
        shared = {
            "b_dec": sae.b_dec.detach() if sae.apply_b_dec_to_input else None,
            "row_scale": parts.row_scale,
            "unit_norm": sae.normalize_decoder,
            "clip_value": group["clip_value"],
            "clip_row_norm": group["clip_row_norm"],
        }
        batch = loss.codes, parts.grad_values, parts.residual, parts.x
        small, scale = {"b_dec": parts.grad_b_dec, **parts.others}, None
        if group["clip_value"] is not None:
            small = {n: grad.clamp(-group["clip_value"], group["clip_value"]) for n, grad in small.items()}
        if group["clip_norm"] is not None:
            W_dec = slots["W_dec"]
            norm = gradient_norm(*batch, W_dec.parameter if W_dec.master is None else W_dec.master, **shared)
            norms = [norm, *(torch.linalg.vector_norm(grad, dtype=norm.dtype) for grad in small.values())]
            self.grad_norm = torch.linalg.vector_norm(torch.stack(norms))
            scale = _dense.share(self.grad_norm, group["clip_norm"]).to(torch.promote_types(sae.dtype, torch.float32))
            small = {n: grad * scale.to(grad.dtype) for n, grad in small.items()}
        fused_update(
            *batch,
            slots["W_enc"],
            slots["b_enc"],
            slots["W_dec"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            gradient_scale=scale,
            lazy=group["lazy"],
            seed=group["seed"],
            **shared,
        )
        touched = _dense.has_entry(loss.codes).nonzero()[:, 0] if group["lazy"] and parts.others else None
        for name, gradient in small.items():
            self._dense_step(name, slots[name], gradient, touched)
        self._remember_versions()
        return loss

    def _count(self, parameters: Any) -> int:
        """Counts a step of the parameters; -> the number of it, of the last one's."""
        step = 0.0
        for parameter in parameters:
            self.state[parameter]["step"] += 1
            step = float(self.state[parameter]["step"])
        return int(step)

    @torch.no_grad()
    def _step_on_gradients(self, touched: Tensor) -> None:
        """`touched` [d_sae] are the latents that a lazy step does not leave, beside those with a gradient."""
        sae = self._sae
        group: dict[str, Any] = self.param_groups[0]
        sae.project_decoder_grad_()
        parameters = {name: p for name, p in sae.named_parameters() if p.grad is not None}
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        self.grad_norm = _dense.clip_(gradients, group)
        rows = (touched | _dense.has_gradient(sae, gradients)).nonzero()[:, 0] if group["lazy"] else None
        for name, parameter in parameters.items():
            slot = self._slot(parameter)
            self._count([parameter])
            self._dense_step(name, slot, gradients[name], rows)
        if sae.normalize_decoder and "W_dec" in parameters:
            W_dec = self._slot(sae.W_dec)
            _dense.normalize_(W_dec.parameter if W_dec.master is None else W_dec.master, rows)
            if W_dec.master is not None:
                W_dec.parameter.copy_(W_dec.master)
        self._remember_versions()

    def _dense_step(self, name: str, slot: Slot, gradient: Tensor, touched: Tensor | None) -> None:
        names = [name for name, _ in self._sae.named_parameters()]
        step = int(self.state[self._sae.get_parameter(name)]["step"])
        _dense.adam_(_dense.rows_of(name, slot, gradient, names), self.param_groups[0], step, touched)
        if slot.master is not None:
            slot.parameter.copy_(slot.master)

    def _remember_versions(self) -> None:
        self._versions = {parameter: parameter._version for parameter in self._sae.parameters()}
