"""What goes into an SAE and what should come out of it: checked, normalised and flat."""

import torch
from torch import Tensor, nn

from fastsae.saes import normalization


class HasInputs(nn.Module):
    """Activations [..., d_in], or [..., sites, d_in]; a transcoder's targets [..., d_out], or [..., sites_out, d_out].

    With normalize_activations="scalar" they are multiplied by `activation_scale` (and `target_scale`), a number for
    each site.
    """

    d_in: int
    d_out: int
    sites: int | None
    sites_out: int | None
    is_transcoder: bool
    normalize_activations: str
    activation_scale: Tensor
    target_scale: Tensor

    def _checked(self, x: Tensor, name: str = "x") -> Tensor:
        width, sites = (self.d_in, self.sites) if name == "x" else (self.d_out, self.sites_out)
        places, meaning = (width,), f"d_{'in' if name == 'x' else 'out'} = {width}"
        if sites is not None:
            places, meaning = (sites, width), f"{sites} sites and {meaning}"
        expected = f"[..., {', '.join(map(str, places))}]"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} is {getattr(x, 'dtype', type(x))}: expected a floating tensor {expected}")
        if x.shape[-len(places) :] != places:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {expected} with {meaning}")
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device} and the SAE on {self.device}: move one to the other")
        return x.to(self.dtype)

    def _normalized(self, x: Tensor) -> normalization.Normalized:
        """x [..., d_in], or [..., sites, d_in], as it is encoded: [..., width]."""
        x = self._checked(x)
        if self.sites is None:
            return normalization.normalize(x, self.normalize_activations, self.activation_scale)
        normalized = normalization.normalize(x, self.normalize_activations, self.activation_scale[:, None])
        return normalization.Normalized(normalized.x.flatten(-2), None)

    def _batch(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is encoded and what should come out, normalised: [n_tokens, width] each."""
        leading = x.shape[: x.dim() - (1 if self.sites is None else 2)] if isinstance(x, Tensor) else ()
        x = self._normalized(x).x
        x = x.reshape(-1, x.shape[-1])
        if not self.is_transcoder:
            if target is not None:
                raise ValueError("target is given to an SAE whose target is its input: build it with d_out")
            return x, x
        if target is None:
            raise ValueError("target is missing: expected loss(x, target) of an SAE that was built with d_out")
        target = self._checked(target, "target")
        if target.shape[: target.dim() - (1 if self.sites_out is None else 2)] != leading:
            raise ValueError(f"target has shape {tuple(target.shape)}: expected the tokens of x, {tuple(leading)}")
        scale = self.target_scale if self.sites_out is None else self.target_scale[:, None]
        target = normalization.normalize(target, self.normalize_activations, scale).x
        return x, target.reshape(x.shape[0], -1)

    @torch.no_grad()
    def set_activation_scale(self, scale: float | Tensor, target_scale: float | Tensor | None = None) -> None:
        """The factor of normalize_activations='scalar'; `estimate_activation_scale` finds the usual one.

        With several sites one number for all of them, or one for each; `target_scale` is a transcoder's other factor.
        """
        if self.normalize_activations != "scalar":
            raise ValueError(
                f"normalize_activations = {self.normalize_activations!r} uses no scale: build with 'scalar'"
            )
        for name, value in (("scale", scale), ("target_scale", target_scale)):
            if value is None:
                continue
            if name == "target_scale" and not self.is_transcoder:
                raise ValueError("target_scale is given to an SAE whose target is its input: expected scale alone")
            numbers = torch.as_tensor(value, dtype=torch.float32)
            if not bool(((numbers > 0) & (numbers < torch.inf)).all()):
                raise ValueError(f"{name} = {value!r}: expected a finite number above 0")
            (self.activation_scale if name == "scale" else self.target_scale).copy_(numbers)

    def estimate_activation_scale(self, x: Tensor, target: Tensor | None = None) -> float | list[float]:
        """Sets and returns √d_in / mean‖x‖ over a sample [..., d_in], for each site; and √d_out / mean‖target‖."""
        scale = normalization.scales_of(self._checked(x), self.sites)
        other = None if target is None else normalization.scales_of(self._checked(target, "target"), self.sites_out)
        self.set_activation_scale(scale, other)
        return scale.tolist()
