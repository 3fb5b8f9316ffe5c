"""GatedSAE: which latents are active is decided apart from how active they are."""

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastsae.codes import SparseCodes
from fastsae.ops import encode_threshold, squared_error
from fastsae.saes.base import SAE, Active, SAEOptions, Weights
from fastsae.saes.loss import Penalty, Reconstruction
from fastsae.saes.options import at_least, flag
from fastsae.saes.ragged import at_entries, wide
from fastsae.saes.registry import register
from fastsae.saes.relu import lp_penalty


@register
class GatedSAE(SAE):
    """The gated sparse autoencoder of Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse
    Autoencoders".

        gate = (x - b_dec) W_enc + b_gate
        magnitude = (x - b_dec) (W_enc · exp(r_mag)) + b_mag
        codes = 1[gate > 0] · relu(magnitude)
        x̂ = codes W_dec + b_dec
        loss = mean_n ‖x̂_n - x_n‖² + l1_coefficient · mean_n Σ_f relu(gate_nf) ‖W_dec[f]‖
               + aux_coefficient · mean_n ‖relu(gate_n) W_dec + b_dec - x_n‖²

    Both paths share one product with W_enc, and only latents with an open gate need a magnitude. The last term
    reaches the gate alone where the decoder in it is frozen. Norms of decoder rows count only where
    `normalize_decoder` does not keep them at 1.

    Terms of its loss: `l1` and `aux`. Parameters b_gate, r_mag and b_mag [d_sae] stand in place of b_enc.

    Args:
        d_in, d_sae: width of an activation, number of latents.
        l1_coefficient: weight of the L1 term.
        aux_coefficient: weight of the auxiliary reconstruction, 1 in the paper.
        freeze_decoder: take W_dec and b_dec as constants there (the paper, dictionary_learning); SAELens does not.
        options: see fastsae.saes.SAE.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture = "gated"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        l1_coefficient: float = 1.0,
        aux_coefficient: float = 1.0,
        freeze_decoder: bool = True,
        **options: Unpack[SAEOptions],
    ):
        super().__init__(d_in, d_sae, **options)
        at_least("l1_coefficient", l1_coefficient)
        at_least("aux_coefficient", aux_coefficient)
        flag("freeze_decoder", freeze_decoder)
        self.l1_coefficient = l1_coefficient
        self.aux_coefficient = aux_coefficient
        self.freeze_decoder = freeze_decoder
        zeros = torch.zeros_like(self.b_enc)
        self.b_enc = None
        self.b_gate, self.r_mag, self.b_mag = (nn.Parameter(zeros.clone()) for _ in range(3))

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        return super().config() | {
            "l1_coefficient": self.l1_coefficient,
            "aux_coefficient": self.aux_coefficient,
            "freeze_decoder": self.freeze_decoder,
        }

    @property
    def _weighs_by_norms(self) -> bool:
        return not self.normalize_decoder

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        return self._gated(x, self.W_enc)[0]

    def _gated(self, x: Tensor, W_enc: Tensor) -> tuple[SparseCodes, SparseCodes]:
        return gated(x, W_enc, self.b_gate, self.r_mag, self.b_mag, self._b_dec_of_input)

    def _activate(self, x: Tensor, weights: Weights) -> Active:
        return Active(*self._gated(x, weights.encoder_rows.T))

    def _penalties(
        self, active: Active, x: Tensor, target: Tensor, error: Reconstruction, weights: Weights
    ) -> dict[str, Penalty]:
        gate: SparseCodes = active.extra
        l1 = lp_penalty(gate, weights.decoder_norms)
        W_dec, b_dec = weights.W_dec, self.b_dec
        if self.freeze_decoder:
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        if self.skip:
            target = target - x @ self.W_skip.T
        _, squared = squared_error(gate, W_dec, b_dec, target)
        return {
            "l1": Penalty(l1, self.sparsity_scale * self.l1_coefficient),
            "aux": Penalty(squared.mean(), self.aux_coefficient),
        }


def gated(
    x: Tensor, W_enc: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor, b_dec: Tensor | None
) -> tuple[SparseCodes, SparseCodes]:
    """The activations of x, 1[gate > 0] · relu(magnitude), and relu(gate) at the same places."""
    # <x - b_dec, w> + b > 0 if and only if <x - b_dec, w> > -b, in floating point too.
    places = encode_threshold(x, W_enc, None, -b_gate, b_dec=b_dec)
    products = wide(places.values)
    b_gate, r_mag, b_mag = (at_entries(wide(p), places) for p in (b_gate, r_mag, b_mag))
    gate, magnitude = products + b_gate, products * r_mag.exp() + b_mag
    return tuple(places.with_values(part.relu().to(x.dtype)) for part in (magnitude, gate))
