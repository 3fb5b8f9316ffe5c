"""A loss's backward down to what belongs to codes; the weights' gradients follow from it, latent by latent."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae.saes.loss import SAELoss, objective_of, variance


class CodeGradients(NamedTuple):
    """What a fused update needs besides the codes; rows are tokens."""

    x: Tensor  # what was encoded, normalised [n_tokens, d_in]
    residual: Tensor  # x̂ - target [n_tokens, d_out]
    row_scale: Tensor  # the gradient of x̂_n is row_scale_n · residual_n
    grad_values: Tensor  # gradient of the pre-activations at the places of the codes, of their shape
    grad_b_dec: Tensor  # [d_out]
    others: dict[str, Tensor]  # gradients of parameters beside W_enc, b_enc, W_dec and b_dec, by name


def row_scale_of(target: Tensor, reconstruction: str, total_variance: Tensor) -> Tensor:
    """CodeGradients.row_scale of an objective, for a target of this variance."""
    share = objective_of(torch.ones_like(total_variance), 1 / total_variance, reconstruction, target.shape[1])
    return (2 * share / max(target.shape[0], 1)).expand(target.shape[0]).contiguous()


class HasCodeGradients(nn.Module):
    """An SAE whose weights' gradients an optimizer may make itself, if `gradients_by_formula`."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    reconstruction: str

    @property
    def gradients_by_formula(self) -> bool:
        """Whether `loss_with_gradients` covers this SAE's options, but for AuxK.

        The gradients of W_enc, b_enc and W_dec must all follow from those of the pre-activations and of x̂.
        """
        return False

    def auxk_will_act(self, x: Tensor) -> bool:
        """Whether the next `loss(x)` in training mode may have an AuxK term."""
        return False

    def loss_with_gradients(self, x: Tensor, target: Tensor | None = None) -> tuple[SAELoss, CodeGradients]:
        """`loss` and what is left of its backward without the three large gradients: for optimizers that fuse these.

        The gradient of the reconstruction is row_scale_n · residual_n; those of W_dec and W_enc follow from it and
        grad_values (see fastsae.ops.fused_update). AuxK is left out, and what `gradients_by_formula` is False for.
        """
        x, target = self._batch(x, target)
        others = {n: p for n, p in self.named_parameters() if n not in ("W_enc", "b_enc", "W_dec", "b_dec")}
        with torch.enable_grad():
            weights = self._weights()._replace(encoder_rows=self.W_enc.T.detach(), W_dec=self.W_dec.detach())
            loss, active, error = self._loss(x, target, weights)
            wanted = [self._preactivations(active), self.b_dec, *others.values()]
            grad_values, grad_b_dec, *rest = torch.autograd.grad(loss.total, wanted, materialize_grads=True)
        row_scale = row_scale_of(target, self.reconstruction, variance(target))
        gradients = dict(zip(others, rest, strict=True))
        residual = error.residual.detach()
        loss = SAELoss(loss.total.detach(), {n: t.detach() for n, t in loss.terms.items()}, loss.codes.detach())
        return loss, CodeGradients(x, residual, row_scale, grad_values, grad_b_dec, gradients)

    def _preactivations(self, active: Any) -> Tensor:
        """What the encoder returned, at the places of the codes."""
        return active.codes.values
