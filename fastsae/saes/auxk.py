"""AuxK: the dead latents alone reconstruct what the live ones leave over."""

from torch import Tensor
from torch.nn import functional

from fastsae.ops import encode_topk, squared_error
from fastsae.saes.base import Weights
from fastsae.saes.loss import Penalty, variance, zero_of
from fastsae.saes.options import at_least, one_of
from fastsae.saes.rescaled import RescaledByNorm

FORMS = ("openai", "saelens")


class HasAuxK(RescaledByNorm):
    """An SAE with the auxiliary loss of Gao et al. 2024, section 2.4; its cost grows with the dead latents, not d_sae.

    `auxk` of the dead latents are kept for each token (all of them if fewer are dead), without b_dec.

    auxk_form "openai": relu of their pre-activations, and the FVU of the residual (OpenAI, sparsify,
        dictionary_learning).
    auxk_form "saelens": the pre-activations as they are, and the squared error (summed over d_out, mean over tokens)
        times min(1, dead / auxk).
    """

    auxk: int
    auxk_form: str
    auxk_coefficient: float

    def _set_auxk(self, auxk: int | None, auxk_form: str, auxk_coefficient: float) -> None:
        if auxk is not None and (isinstance(auxk, bool) or not isinstance(auxk, int) or auxk < 0):
            raise ValueError(f"auxk = {auxk!r}: expected None or an int of at least 0")
        one_of("auxk_form", auxk_form, FORMS)
        at_least("auxk_coefficient", auxk_coefficient)
        self.auxk = max(1, self.d_out // 2) if auxk is None else auxk
        self.auxk_form = auxk_form
        self.auxk_coefficient = auxk_coefficient

    def _auxk_config(self) -> dict:
        return {"auxk": self.auxk, "auxk_form": self.auxk_form, "auxk_coefficient": self.auxk_coefficient}

    def auxk_will_act(self, x: Tensor) -> bool:
        """Whether the next `loss(x)` in training mode may have an AuxK term: some latent is dead, or about to be."""
        if not (self.training and self.auxk and self.auxk_coefficient):
            return False
        tokens = x.numel() // (self.d_in * (self.sites or 1))
        return self._oldest.reaches(self.tokens_since_fired, self.dead_after_tokens - tokens)

    def _auxk_penalty(self, x: Tensor, residual: Tensor, weights: Weights) -> Penalty:
        """Of -residual as the dead latents reconstruct it; zero where there is nothing to do.

        Weights of the dead are gathered into compact matrices; their gradients go back as sparse rows
        (`embedding(sparse=True)`), which autograd adds in place to the main loss's: nothing here is as large as d_sae.
        """
        dead = self._dead_in_training() if self.auxk and self.auxk_coefficient else None
        if dead is None:
            return Penalty(zero_of(residual), 0.0)
        w_enc = functional.embedding(dead, weights.encoder_rows, sparse=True)
        w_dec = functional.embedding(dead, self.W_dec, sparse=True)
        k = min(self.auxk, len(dead))
        codes = encode_topk(x, w_enc.T, self.b_enc[dead], k, b_dec=self._b_dec_of_input, scale=self._rank_scale(w_dec))
        if self.auxk_form == "openai":
            codes = codes.relu()
        # The residual is x̂ - x; the dead should give x - x̂. Negating their few decoder rows spares a copy of it.
        _, squared = squared_error(codes, -w_dec, None, residual)
        if self.auxk_form == "openai":
            # A residual of zero leaves nothing to reconstruct (0/0).
            return Penalty((squared.mean() / variance(residual)).nan_to_num(0.0), self.auxk_coefficient)
        return Penalty(squared.mean() * min(1.0, len(dead) / self.auxk), self.auxk_coefficient)
