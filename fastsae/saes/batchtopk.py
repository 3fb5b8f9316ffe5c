"""BatchTopKSAE: k latents for each token on average, the largest of a batch."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsae.codes import SparseCodes
from fastsae.ops import encode_batch_topk, encode_threshold
from fastsae.saes.auxk import HasAuxK
from fastsae.saes.base import Active, SAEOptions, Weights
from fastsae.saes.decoder_norms import decoder_norms
from fastsae.saes.loss import Penalty, Reconstruction
from fastsae.saes.registry import register


@register
class BatchTopKSAE(HasAuxK):
    """The BatchTopK sparse autoencoder of Bussmann, Leask, Nanda 2024, "BatchTopK Sparse Autoencoders".

        codes = the int(k · n_tokens) largest of relu((x - b_dec) W_enc + b_enc) over the batch
        x̂ = codes W_dec + b_dec
        loss = FVU(x̂, x) + auxk_coefficient · AuxK

    A batch decides what its tokens keep, so for inference a threshold stands in for it: the running mean of the least
    positive activation that training batches kept. In training mode `encode` selects over the batch, in evaluation
    mode it keeps pre > threshold (once there is one).

    Its loss has the term `auxk` (see fastsae.saes.auxk.HasAuxK).

    Args:
        d_in, d_sae: width of an activation, number of latents.
        k: latents a token on average, above 0 and up to d_sae; may be fractional. `sae.k` may be changed at any time.
        threshold_lr: r of threshold ← (1 - r) threshold + r · least, 0.01 in SAELens; 0.001 in dictionary_learning.
        rescale_by_decoder_norm: see fastsae.saes.rescaled.RescaledByNorm; the threshold is then one of activations so
            rescaled.
        auxk, auxk_form, auxk_coefficient: as for TopKSAE.
        options: see fastsae.saes.SAE; `reconstruction` is "fvu" by default.

    Attributes:
        threshold: float64 scalar; -1 until the first training batch, which sets it.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture = "batchtopk"
    _kept_dtypes = HasAuxK._kept_dtypes | {"threshold": torch.float64}

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float,
        *,
        threshold_lr: float = 0.01,
        rescale_by_decoder_norm: bool = False,
        auxk: int | None = None,
        auxk_form: str = "openai",
        auxk_coefficient: float = 1 / 32,
        **options: Unpack[SAEOptions],
    ):
        super().__init__(d_in, d_sae, **{"reconstruction": "fvu"} | options)
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 < k <= d_sae:
            raise ValueError(f"k = {k!r}: expected a number with 0 < k <= d_sae = {d_sae}")
        if not 0 < threshold_lr <= 1:
            raise ValueError(f"threshold_lr = {threshold_lr!r}: expected a number in (0, 1]")
        self.k = k
        self.threshold_lr = threshold_lr
        self._set_rescale(rescale_by_decoder_norm)
        self._set_auxk(auxk, auxk_form, auxk_coefficient)
        self.register_buffer("threshold", torch.full((), -1.0, dtype=torch.float64, device=self.device))

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        return super().config() | {
            "k": self.k,
            "threshold_lr": self.threshold_lr,
            "rescale_by_decoder_norm": self.rescale_by_decoder_norm,
            **self._auxk_config(),
        }

    @property
    def gradients_by_formula(self) -> bool:
        """With every option."""
        return True

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        if self.training or self.threshold < 0:
            return self._rescaled(self._select(x, self.W_enc))
        threshold: Tensor | float = float(self.threshold)
        if self.rescale_by_decoder_norm:
            threshold = threshold / decoder_norms(self.W_dec.detach())
        return self._rescaled(encode_threshold(x, self.W_enc, self.b_enc, threshold, b_dec=self._b_dec_of_input))

    def _select(self, x: Tensor, W_enc: Tensor) -> SparseCodes:
        scale = self._rank_scale(self.W_dec)
        return encode_batch_topk(x, W_enc, self.b_enc, self.k, b_dec=self._b_dec_of_input, scale=scale)

    def _activate(self, x: Tensor, weights: Weights) -> Active:
        codes = self._select(x, weights.encoder_rows.T)
        if self.training:
            self.update_threshold(self._rescaled(codes.detach()))
        return Active(codes)

    @torch.no_grad()
    def update_threshold(self, codes: SparseCodes) -> None:
        """Moves `threshold` towards the least positive activation of a batch; `loss` does so in training mode."""
        values = codes.values.double()
        if not values.numel():
            return
        least = values.where(values > 0, torch.inf).min()
        moved = torch.where(self.threshold < 0, least, torch.lerp(self.threshold, least, self.threshold_lr))
        self.threshold.copy_(torch.where(least.isfinite(), moved, self.threshold))

    def _penalties(
        self, active: Active, x: Tensor, target: Tensor, error: Reconstruction, weights: Weights
    ) -> dict[str, Penalty]:
        return {"auxk": self._auxk_penalty(x, error.residual.detach(), weights)}
