"""TopKSAE: exactly k latents for each token."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsae.codes import SparseCodes
from fastsae.ops import encode_groupmax, encode_topk, sampled_dot, squared_error
from fastsae.ops._encoder import sum_of_rows
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.transpose import transposed
from fastsae.saes.auxk import HasAuxK
from fastsae.saes.base import Active, SAEOptions, Weights
from fastsae.saes.code_gradients import CodeGradients, row_scale_of
from fastsae.saes.loss import Penalty, Reconstruction, SAELoss, objective_of, variance
from fastsae.saes.options import flag, one_of
from fastsae.saes.registry import register

# Multi-TopK: the second selection is of so many times k latents, and its error counts one part in so many.
_MULTI_K, _MULTI_SHARE = 4, 8


@register
class TopKSAE(HasAuxK):
    """The TopK sparse autoencoder of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".

        codes = relu(TopK_k((x - b_dec) W_enc + b_enc))
        x̂ = codes W_dec + b_dec
        loss = FVU(x̂, x) + auxk_coefficient · AuxK

    Its loss has the term `auxk` (see fastsae.saes.auxk.HasAuxK), and `multi_topk` if that is on.

    Args:
        d_in, d_sae: width of an activation, number of latents.
        k: latents kept for each token; `sae.k` may be changed at any time (k annealing).
        relu: "after" selects among raw pre-activations and then applies ReLU (OpenAI, SAELens); "before" selects among
            relu(pre) (sparsify, dictionary_learning). They differ only in which zero-valued places a token with fewer
            than k positive pre-activations names.
        selection: "topk", or "groupmax": the largest of relu(pre) in each of k contiguous groups of d_sae / k latents
            (EleutherAI's sparsify).
        multi_topk: also count FVU / 8 of the reconstruction by the 4k largest, so that more latents may be read out
            than were trained for (Gao et al. 2024, section 5.3; its weight is sparsify's).
        rescale_by_decoder_norm: see fastsae.saes.rescaled.RescaledByNorm; what SAELens does in training.
        auxk: latents for each token in the auxiliary loss; None is d_out // 2, 0 turns it off.
        auxk_form, auxk_coefficient: "openai" or "saelens", and its weight, 1/32 in the paper.
        options: see fastsae.saes.SAE; `reconstruction` is "fvu" by default.

    Raises ValueError or TypeError for an argument out of its range.
    """

    architecture = "topk"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        relu: str = "after",
        selection: str = "topk",
        multi_topk: bool = False,
        rescale_by_decoder_norm: bool = False,
        auxk: int | None = None,
        auxk_form: str = "openai",
        auxk_coefficient: float = 1 / 32,
        **options: Unpack[SAEOptions],
    ):
        super().__init__(d_in, d_sae, **{"reconstruction": "fvu"} | options)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
            raise ValueError(f"k = {k!r}: expected an int with 1 <= k <= d_sae = {d_sae}")
        one_of("relu", relu, ("after", "before"))
        one_of("selection", selection, ("topk", "groupmax"))
        flag("multi_topk", multi_topk)
        if selection == "groupmax" and (d_sae % k or multi_topk or rescale_by_decoder_norm):
            raise ValueError(
                f"selection = 'groupmax' with d_sae = {d_sae}, k = {k}: expected a k that divides d_sae, and neither "
                "multi_topk nor rescale_by_decoder_norm"
            )
        self.k = k
        self.relu = relu
        self.selection = selection
        self.multi_topk = multi_topk
        self._set_rescale(rescale_by_decoder_norm)
        self._set_auxk(auxk, auxk_form, auxk_coefficient)

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        return super().config() | {
            "k": self.k,
            "relu": self.relu,
            "selection": self.selection,
            "multi_topk": self.multi_topk,
            "rescale_by_decoder_norm": self.rescale_by_decoder_norm,
            **self._auxk_config(),
        }

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        return self._rescaled(self._select(x, self.W_enc, self.k))

    def _select(self, x: Tensor, W_enc: Tensor, k: int) -> SparseCodes:
        if self.selection == "groupmax":
            return encode_groupmax(x, W_enc, self.b_enc, k, b_dec=self._b_dec_of_input)
        codes = encode_topk(
            x,
            W_enc,
            self.b_enc,
            k,
            b_dec=self._b_dec_of_input,
            relu_first=self.relu == "before",
            scale=self._rank_scale(self.W_dec),
        )
        return codes.relu()

    def _activate(self, x: Tensor, weights: Weights) -> Active:
        if not self.multi_topk:
            return Active(self._select(x, weights.encoder_rows.T, self.k))
        more = self._select(x, weights.encoder_rows.T, min(_MULTI_K * self.k, self.d_sae))
        # They come in the order of their values: the k largest stand first.
        values, indices = more.values[:, : self.k], more.indices[:, : self.k]
        return Active(SparseCodes._trusted(values, indices, None, self.d_sae, more.leading_shape), more)

    def _penalties(
        self, active: Active, x: Tensor, target: Tensor, error: Reconstruction, weights: Weights
    ) -> dict[str, Penalty]:
        penalties = {"auxk": self._auxk_penalty(x, error.residual.detach(), weights)}
        if self.multi_topk:
            more = self._reconstruct(Active(active.extra), x, target, weights)
            penalties["multi_topk"] = Penalty(more.terms["fvu"], 1 / _MULTI_SHARE)
        return penalties

    @property
    def gradients_by_formula(self) -> bool:
        """No skip connection and no Multi-TopK."""
        return not (self.skip or self.multi_topk)

    @torch.no_grad()
    def loss_with_gradients(self, x: Tensor, target: Tensor | None = None) -> tuple[SAELoss, CodeGradients]:
        """As SAE.loss_with_gradients, without autograd: one pass less over the residual."""
        x, target = self._batch(x, target)
        codes = self._select(x, self.W_enc, self.k)
        if self.training:
            self.count_firing(codes)
        residual, squared = squared_error(codes, self.W_dec, self.b_dec, target)
        mse, total_variance = squared.mean(), variance(target)
        fvu = mse / total_variance
        objective = objective_of(mse, fvu, self.reconstruction, target.shape[1])
        row_scale = row_scale_of(target, self.reconstruction, total_variance)
        grad_values = sampled_dot(residual, codes, self.W_dec) * row_scale[:, None].to(x.dtype)
        # A pick that ReLU cut to zero gets no gradient.
        grad_values = grad_values.where(~(codes.values <= 0), 0)
        grad_b_dec = row_scale.to(x.dtype) @ residual
        if self.apply_b_dec_to_input:
            # One column: only the sums of the values are wanted, and those in one order on every device.
            latent_major = transposed(codes.indices, codes.offsets, codes.d_sae)
            _, grad_b_enc = accumulate_rows_op(grad_values, *latent_major, x[:, :1], None, None)
            grad_b_dec -= sum_of_rows(grad_b_enc, self.W_enc.T)
        terms = {"mse": mse, "fvu": fvu, "auxk": torch.zeros_like(fvu)}
        return SAELoss(objective, terms, codes), CodeGradients(x, residual, row_scale, grad_values, grad_b_dec, {})
