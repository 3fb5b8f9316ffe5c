"""MatryoshkaSAE: nested dictionaries, each prefix of the latents a dictionary of its own."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from typing_extensions import Unpack

from fastsae.ops import nested_errors
from fastsae.saes.base import Active, SAEOptions, Weights
from fastsae.saes.batchtopk import BatchTopKSAE
from fastsae.saes.loss import Reconstruction, objective_of, variance
from fastsae.saes.registry import register


@register
class MatryoshkaSAE(BatchTopKSAE):
    """The Matryoshka sparse autoencoder of Bussmann, Nabeshima, Karvonen, Nanda 2025, "Learning Multi-Level Features
    with Matryoshka Sparse Autoencoders", on BatchTopK.

        x̂_w = codes[:, :w] W_dec[:w] + b_dec  for each width w
        loss = Σ_w weight_w · FVU(x̂_w, x) + auxk_coefficient · AuxK

    One selection serves all widths, and the prefixes are decoded one after the other, each latent once.

    Its loss has the terms of BatchTopKSAE, `mse` and `fvu` of the whole dictionary, and `mse_{w}` for each inner width.

    Args:
        d_in, d_sae, k: as for BatchTopKSAE.
        widths: of the prefixes, ascending; the last is d_sae (it is added where it is missing). Five by default, each
            twice the last.
        width_weights: of each prefix in the loss; all 1 by default.
        threshold_lr, rescale_by_decoder_norm, auxk, auxk_form, auxk_coefficient: as for BatchTopKSAE.
        options: see fastsae.saes.SAE.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture = "matryoshka"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float,
        *,
        widths: Sequence[int] | None = None,
        width_weights: Sequence[float] | None = None,
        threshold_lr: float = 0.01,
        rescale_by_decoder_norm: bool = False,
        auxk: int | None = None,
        auxk_form: str = "openai",
        auxk_coefficient: float = 1 / 32,
        **options: Unpack[SAEOptions],
    ):
        super().__init__(
            d_in,
            d_sae,
            k,
            threshold_lr=threshold_lr,
            rescale_by_decoder_norm=rescale_by_decoder_norm,
            auxk=auxk,
            auxk_form=auxk_form,
            auxk_coefficient=auxk_coefficient,
            **options,
        )
        if widths is None:
            widths = sorted({max(1, d_sae >> shift) for shift in range(5)})
        widths = [int(width) for width in widths]
        if not widths or widths[-1] != d_sae:
            widths.append(d_sae)
        if widths[0] < 1 or any(narrow >= wide for narrow, wide in pairwise(widths)):
            raise ValueError(f"widths = {widths}: expected them ascending from 1 or more up to d_sae = {d_sae}")
        weights = [1.0] * len(widths) if width_weights is None else [float(weight) for weight in width_weights]
        if len(weights) != len(widths) or not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(
                f"width_weights = {width_weights!r}: expected {len(widths)} finite numbers of at least 0, one for "
                f"each of the widths {widths}"
            )
        self.widths, self.width_weights = widths, weights

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        return super().config() | {"widths": self.widths, "width_weights": self.width_weights}

    @property
    def gradients_by_formula(self) -> bool:
        """Each part of the dictionary has a residual of its own."""
        return False

    def _reconstruct(self, active: Active, x: Tensor, target: Tensor, weights: Weights) -> Reconstruction:
        scale = variance(target)
        if self.skip:
            target = target - x @ self.W_skip.T
        residual, squared = nested_errors(active.codes, weights.W_dec, self.b_dec, target, self.widths)
        errors = squared.mean(dim=0)
        mse = errors[-1]
        objective = sum(
            weight * objective_of(error, error / scale, self.reconstruction, target.shape[1])
            for error, weight in zip(errors, self.width_weights, strict=True)
        )
        terms = {"mse": mse, "fvu": mse / scale}
        terms |= {f"mse_{width}": error for width, error in zip(self.widths[:-1], errors, strict=False)}
        return Reconstruction(residual, objective, terms)
