"""What every accelerated SAE of SAELens shares: when fastsae serves a call, and the library's own code around it.

The class of an accelerated SAE derives from `Fast` and from the class it had. SAELens' own `forward` and
`training_forward_pass` run as they are; while they do, `encode` hands them a `DenseOnDemand` that carries sparse codes,
and `decode` takes the codes. Called by anybody else `encode` returns a dense tensor, as it always did.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sae_lens.saes.topk_sae import SparseHookPoint
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from fastsae.codes import SparseCodes
from fastsae.interop.record import Record, attach, record_of
from fastsae.interop.saelens.on_demand import DenseOnDemand, of_codes
from fastsae.ops import decode

# Of a ReLU, JumpReLU or Gated SAE so large a share of the latents may be active that dense products are faster: forward
# and backward at D = 768, F = 24,576, N = 1,024 on two cores took 0.45 of SAELens' time at 7 % of the latents, 1.1 at
# 16 % and 2.8 at 50 %.
MOST_DENSE = 0.12
# Tokens that are looked at to find out.
_SAMPLE = 32
_STATE = "_fastsae_state"
# What returns its input if it has no hooks; SAELens puts an Identity there while it computes an error term.
_POINTS = (HookPoint, SparseHookPoint, nn.Identity)


@dataclass
class Chosen:
    """What fastsae selected for a batch."""

    x: Tensor  # what was encoded, before b_dec is subtracted [..., d_in]
    b_dec: Tensor | None  # what is subtracted
    codes: SparseCodes  # the activations
    decoded: SparseCodes  # what W_dec is multiplied by
    # Weights through one node of autograd's graph each: gradients of all their uses meet there.
    encoder_rows: Tensor
    W_dec: Tensor
    norms: Tensor | None = None  # of decoder rows, where the architecture uses them
    extra: Any = None


@dataclass
class _State:
    method: str | None = None  # the library's method that is running and hands codes on
    ready: Tensor | None = None  # an input that is processed already
    density: float | None = None  # share of latents that were active when last counted


class Fast:
    """Mixed in before a class of SAELens; its subclasses say how to select."""

    original: ClassVar[type]
    # Classes of `activation_fn` that the selection reproduces.
    _activations: ClassVar[tuple[type, ...]] = (nn.ReLU,)

    def _choose(self, x: Tensor, b_dec: Tensor | None) -> Chosen:
        """The codes of x [..., d_in]."""
        raise NotImplementedError

    def _sampled_density(self, x: Tensor, b_dec: Tensor | None) -> float:
        """The share of latents that are active in a few tokens of x; 0 where selection bounds it."""
        return 0.0

    @property
    def _fast(self) -> _State:
        return self.__dict__.setdefault(_STATE, _State())

    @property
    def _record(self) -> Record:
        if record_of(self) is None:
            # Made by its class, as `type(sae)(cfg)` does.
            attach(self, Record("sae_lens", self.original))
        return record_of(self)

    @contextlib.contextmanager
    def _handing_on(self, method: str) -> Iterator[None]:
        """While `method` of the library runs, `encode` returns codes."""
        state = self._fast
        before, state.method = state.method, method
        try:
            yield
        finally:
            state.method, state.ready = before, None

    def _why_not(self) -> str:
        """Why this call is the library's, or an empty string."""
        if torch.compiler.is_compiling():
            return "torch.compile takes the library's code"
        for name in ("hook_sae_acts_pre", "hook_sae_acts_post"):
            point = getattr(self, name)
            if type(point) not in _POINTS:
                return f"{name} is a {type(point).__name__}"
            if _has_hooks(point):
                return f"a hook on {name} asks for dense activations"
        if type(self.activation_fn) not in self._activations:
            return f"activation_fn is a {type(self.activation_fn).__name__}"
        return ""

    def _input(self, x: Tensor) -> Tensor:
        """`process_sae_in` without the subtraction of b_dec, which fastsae's encoders do themselves."""
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype))))

    @property
    def _subtracted(self) -> Tensor | None:
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """As the library's; an input that fastsae has processed before it gave the call back is taken as it is."""
        state = self._fast
        if state.ready is None:
            return super().process_sae_in(sae_in)
        ready, state.ready = state.ready, None
        return ready

    def _encoded(self, x: Tensor) -> Chosen | str:
        """What fastsae selects, or why it does not."""
        why_not = self._why_not()
        if why_not:
            return why_not
        x, b_dec = self._input(x), self._subtracted
        # A kernel's products are as exact as the parameters; autocast asks for less.
        with torch.autocast(x.device.type, enabled=False):
            if self._is_dense(x, b_dec):
                self._fast.ready = x if b_dec is None else x - b_dec
                return f"more than {MOST_DENSE:.0%} of the latents are active: dense products are faster"
            chosen = self._choose(x, b_dec)
        places = chosen.decoded.n_tokens * chosen.decoded.d_sae
        self._fast.density = chosen.decoded.nnz / places if places else None
        return chosen

    @torch.no_grad()
    def _is_dense(self, x: Tensor, b_dec: Tensor | None) -> bool:
        """Looks at a few tokens if the last batch was dense, or at the first one; else the last batch tells."""
        state = self._fast
        if state.density is None or state.density > MOST_DENSE:
            rows = x.reshape(-1, x.shape[-1])
            state.density = self._sampled_density(rows[:: max(1, len(rows) // _SAMPLE)][:_SAMPLE], b_dec)
        return state.density > MOST_DENSE

    def _on_demand(self, chosen: Chosen, method: str) -> DenseOnDemand:
        self._took_fastsae(method)
        acts = of_codes(chosen.codes, lambda asked_by: self._record.took_original("activations", _made(asked_by)))
        acts.chosen = chosen
        return acts

    def _took_fastsae(self, method: str) -> None:
        feature_major = self.W_enc.T.is_contiguous()
        self._record.took_fastsae(method, "" if feature_major else "W_enc is row-major and copied in each call")

    def encode(self, x: Tensor) -> Tensor:
        """As the library's."""
        method = self._fast.method
        chosen = self._encoded(x)
        if isinstance(chosen, str):
            self._record.took_original(method or "encode", chosen)
            return super().encode(x)
        if method is None:
            self._took_fastsae("encode")
            return chosen.codes.to_dense()
        return self._on_demand(chosen, method)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """As the library's."""
        chosen = chosen_of(feature_acts)
        if chosen is None:
            if self._fast.method is None:
                self._record.took_original("decode", "its activations are a dense tensor")
            return super().decode(feature_acts)
        with torch.autocast(feature_acts.device.type, enabled=False):
            y = self._decoded(chosen)
        return self._output(self.hook_sae_recons(y))

    def _decoded(self, chosen: Chosen) -> Tensor:
        return decode(chosen.decoded, chosen.W_dec, self.b_dec)

    def _output(self, y: Tensor) -> Tensor:
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(y), self.d_head)

    def forward(self, x: Tensor) -> Tensor:
        """As the library's."""
        with self._handing_on("forward"):
            return super().forward(x)

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """As the library's; in the plain layout, since safetensors takes no other."""
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    # What loads an SAE through the class of an instance gets one of the class it would have had.
    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> type:
        return cls.original.get_sae_class_for_architecture(architecture)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        return cls.original.from_dict(config_dict)


def chosen_of(tensor: Tensor) -> Chosen | None:
    """What fastsae selected, if this is it and nobody has made (and maybe changed) the dense tensor."""
    if isinstance(tensor, DenseOnDemand) and tensor.codes() is not None:
        return tensor.chosen
    return None


def _made(asked_by: str) -> str:
    return f"{asked_by} needs the dense tensor"


def _has_hooks(point: nn.Module) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)
