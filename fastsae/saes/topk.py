"""TopKSAE: exactly k latents for each token."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastsae.codes import SparseCodes
from fastsae.ops import encode_topk, sampled_dot, squared_error
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.encode import sum_of_rows
from fastsae.ops.transpose import transposed
from fastsae.saes.base import SAE, SAELoss, _one_of
from fastsae.saes.registry import register


@register
class TopKSAE(SAE):
    """The TopK sparse autoencoder of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".

        codes = relu(TopK_k((x - b_dec) W_enc + b_enc))
        x̂ = codes W_dec + b_dec
        loss = FVU(x̂, x) + auxk_coefficient · AuxK

    AuxK (same paper, section 2.4) lets the dead latents alone, k_aux of them for each token, reconstruct what the
    live ones leave over; its cost grows with the dead latents, not with d_sae.

    Args:
        d_in, d_sae: width of an activation, number of latents.
        k: latents kept for each token; `sae.k` may be changed at any time (k annealing).
        relu: "after" selects among raw pre-activations and then applies ReLU (OpenAI, SAELens); "before" selects among
            relu(pre) (sparsify, dictionary_learning). They differ only in which zero-valued places a token with fewer
            than k positive pre-activations names.
        auxk: latents for each token in the auxiliary loss; None is d_in // 2, 0 turns it off.
        auxk_coefficient: its weight, 1/32 in the paper.
        dead_after_tokens: a latent that has not fired for so many tokens is dead, 10 million in the paper.
        others: see fastsae.saes.SAE.

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
        auxk: int | None = None,
        auxk_coefficient: float = 1 / 32,
        dead_after_tokens: int = 10_000_000,
        apply_b_dec_to_input: bool = True,
        normalize_decoder: bool = True,
        normalize_activations: str = "none",
        init: str = "openai",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            d_in,
            d_sae,
            apply_b_dec_to_input=apply_b_dec_to_input,
            normalize_decoder=normalize_decoder,
            normalize_activations=normalize_activations,
            init=init,
            device=device,
            dtype=dtype,
        )
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
            raise ValueError(f"k = {k!r}: expected an int with 1 <= k <= d_sae = {d_sae}")
        _one_of("relu", relu, ("after", "before"))
        if auxk is not None and (isinstance(auxk, bool) or not isinstance(auxk, int) or auxk < 0):
            raise ValueError(f"auxk = {auxk!r}: expected None or an int of at least 0")
        if not 0 <= auxk_coefficient < float("inf"):
            raise ValueError(f"auxk_coefficient = {auxk_coefficient!r}: expected a finite number of at least 0")
        if dead_after_tokens < 1:
            raise ValueError(f"dead_after_tokens = {dead_after_tokens!r}: expected at least 1")
        self.k = k
        self.relu = relu
        self.auxk = max(1, d_in // 2) if auxk is None else auxk
        self.auxk_coefficient = auxk_coefficient
        self.dead_after_tokens = dead_after_tokens

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        return super().config() | {
            "k": self.k,
            "relu": self.relu,
            "auxk": self.auxk,
            "auxk_coefficient": self.auxk_coefficient,
            "dead_after_tokens": self.dead_after_tokens,
        }

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        return self._select(x, self.W_enc)

    def _select(self, x: Tensor, W_enc: Tensor) -> SparseCodes:
        b_dec = self.b_dec if self.apply_b_dec_to_input else None
        relu_first = self.relu == "before"
        return encode_topk(x, W_enc, self.b_enc, self.k, b_dec=b_dec, relu_first=relu_first).relu()

    def loss(self, x: Tensor) -> SAELoss:
        """FVU(x̂, x) + auxk_coefficient · AuxK of a batch [..., d_in], in the normalised space that is encoded.

        In training mode the batch also updates `tokens_since_fired`, and AuxK acts on latents then dead.
        """
        x = self._normalized(x).x.reshape(-1, self.d_in)
        # One view for both uses: autograd then meets their gradients before it transposes, where AuxK's sparse rows
        # can still be added to the dense ones.
        encoder_rows = self.W_enc.T
        codes = self._select(x, encoder_rows.T)
        if self.training:
            self.count_firing(codes)
        residual, squared = squared_error(codes, self.W_dec, self.b_dec, x)
        mse = squared.mean()
        fvu = mse / variance(x)
        auxk = self._auxk(x, encoder_rows, residual.detach()) if self.training else None
        if auxk is None:
            return SAELoss(fvu, mse, fvu, torch.zeros_like(fvu), codes)
        return SAELoss(fvu + self.auxk_coefficient * auxk, mse, fvu, auxk, codes)

    @torch.no_grad()
    def loss_with_gradients(self, x: Tensor) -> tuple[SAELoss, "CodeGradients"]:
        """`loss` without AuxK, and by formula what its backward would need: for optimizers that fuse the rest.

        The gradient of the reconstruction is row_scale_n · residual_n, that of W_dec and W_enc follows from it and
        grad_values (see fastsae.ops.fused_update).
        """
        x = self._normalized(x).x.reshape(-1, self.d_in)
        codes = self._select(x, self.W_enc)
        if self.training:
            self.count_firing(codes)
        residual, squared = squared_error(codes, self.W_dec, self.b_dec, x)
        mse, total_variance = squared.mean(), variance(x)
        fvu = mse / total_variance
        row_scale = (2 / (total_variance * max(codes.n_tokens, 1))).expand(codes.n_tokens).contiguous()
        grad_values = sampled_dot(residual, codes, self.W_dec) * row_scale[:, None].to(x.dtype)
        # A pick that ReLU cut to zero gets no gradient.
        grad_values = grad_values.where(~(codes.values <= 0), 0)
        grad_b_dec = row_scale.to(x.dtype) @ residual
        if self.apply_b_dec_to_input:
            # One column: only the sums of the values are wanted, and those in one order on every device.
            latent_major = transposed(codes.indices, codes.offsets, codes.d_sae)
            _, grad_b_enc = accumulate_rows_op(grad_values, *latent_major, x[:, :1], None, None)
            grad_b_dec -= sum_of_rows(grad_b_enc, self.W_enc.T)
        loss = SAELoss(fvu, mse, fvu, torch.zeros_like(fvu), codes)
        return loss, CodeGradients(x, residual, row_scale, grad_values, grad_b_dec)

    def auxk_will_act(self, x: Tensor) -> bool:
        """Whether the next `loss(x)` in training mode may have an AuxK term: some latent is dead, or about to be."""
        if not (self.training and self.auxk and self.auxk_coefficient):
            return False
        return self._oldest.reaches(self.tokens_since_fired, self.dead_after_tokens - x.numel() // self.d_in)

    def dead_latents(self) -> Tensor:
        """The latents that have not fired for `dead_after_tokens` tokens: int64, ascending."""
        return (self.tokens_since_fired >= self.dead_after_tokens).nonzero()[:, 0]

    def _auxk(self, x: Tensor, encoder_rows: Tensor, residual: Tensor) -> Tensor | None:
        """FVU of -residual as the dead latents reconstruct it, without b_dec; None when there is nothing to do.

        Weights of the dead are gathered into compact matrices; their gradients go back as sparse rows
        (`embedding(sparse=True)`), which autograd adds in place to the main loss's: nothing here is as large as d_sae.
        """
        if not self.auxk or not self.auxk_coefficient:
            return None
        if not self._oldest.reaches(self.tokens_since_fired, self.dead_after_tokens):
            return None
        dead = self.dead_latents()
        if not len(dead):
            return None
        w_enc = functional.embedding(dead, encoder_rows, sparse=True)
        w_dec = functional.embedding(dead, self.W_dec, sparse=True)
        b_dec = self.b_dec if self.apply_b_dec_to_input else None
        k = min(self.auxk, len(dead))
        codes = encode_topk(x, w_enc.T, self.b_enc[dead], k, b_dec=b_dec).relu()
        # The residual is x̂ - x; the dead should give x - x̂. Negating their few decoder rows spares a copy of it.
        _, squared = squared_error(codes, -w_dec, None, residual)
        # A residual of zero leaves nothing to reconstruct (0/0).
        return (squared.mean() / variance(residual)).nan_to_num(0.0)


class CodeGradients(NamedTuple):
    """What a fused update needs besides the codes; rows are tokens."""

    x: Tensor  # what was encoded, normalised [n_tokens, d_in]
    residual: Tensor  # x̂ - x [n_tokens, d_in]
    row_scale: Tensor  # the gradient of x̂_n is row_scale_n · residual_n
    grad_values: Tensor  # gradient of the codes' values
    grad_b_dec: Tensor  # [d_in]


def variance(x: Tensor) -> Tensor:
    """Σ_d Var(x_d) of x [n_tokens, d], with n_tokens in the denominator; float32 (float64 for float64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.detach().to(wide).var(dim=0, unbiased=False).sum()
