"""Selection by the size of what a latent writes: pre-activations ranked times the norms of their decoder rows."""

from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.saes.base import SAE
from fastsae.saes.decoder_norms import decoder_norms
from fastsae.saes.options import flag
from fastsae.saes.ragged import at_entries


class RescaledByNorm(SAE):
    """An SAE that may treat its decoder as if its rows had unit norm (SAELens' `rescale_acts_by_decoder_norm`).

    Latents are ranked by pre_f ‖W_dec[f]‖, activations are relu(pre_f) ‖W_dec[f]‖, and decoding divides by the norms.
    In a loss the two cancel, so there the activations are decoded as they were before either; codes from `encode`
    carry the gradient to the norms.
    """

    rescale_by_decoder_norm: bool

    def _set_rescale(self, rescale_by_decoder_norm: bool) -> None:
        flag("rescale_by_decoder_norm", rescale_by_decoder_norm)
        self.rescale_by_decoder_norm = rescale_by_decoder_norm

    def _rank_scale(self, W_dec: Tensor) -> Tensor | None:
        """What pre-activations are ranked times: [d_sae] or None."""
        return decoder_norms(W_dec.detach()) if self.rescale_by_decoder_norm else None

    def _rescaled(self, codes: SparseCodes) -> SparseCodes:
        if not self.rescale_by_decoder_norm:
            return codes
        norms = at_entries(decoder_norms(self.W_dec), codes)
        return codes.with_values((codes.values * norms).to(codes.dtype))

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """As SAE.decode; activations are divided by the decoder's norms where they were multiplied by them."""
        if self.rescale_by_decoder_norm:
            norms = at_entries(decoder_norms(self.W_dec), codes)
            codes = codes.with_values((codes.values / norms).to(codes.dtype))
        return super().decode(codes, x)
