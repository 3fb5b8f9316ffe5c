"""pre = (x - b_dec) W_encᵀ + b_enc, then the largest of relu(pre) in each group of latents."""

from torch import Tensor

from fastsae.reference.encode import encode_topk


def encode_groupmax(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Of each of k contiguous groups the largest of relu(pre), ties by the lower index, NaN above all.

    x [n_tokens, d_in], w_enc [d_sae, d_in] -> values [n_tokens, k], indices int32 [n_tokens, k].
    """
    size = w_enc.shape[0] // k
    values, indices = x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k).int()
    for group in range(k):
        latents = slice(group * size, (group + 1) * size)
        bias = None if b_enc is None else b_enc[latents]
        best, place = encode_topk(x, w_enc[latents], bias, b_dec, 1, True)
        values[:, group], indices[:, group] = best[:, 0], place[:, 0] + latents.start
    return values, indices
