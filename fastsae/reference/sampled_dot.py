"""out_nj = c_n <g_n, W_dec[i_nj]>."""

from torch import Tensor

from fastsae.reference.precision import tokens_of, widen


def sampled_dot(g: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, row_scale: Tensor | None) -> Tensor:
    """g [n_tokens, d_out], W_dec [d_sae, d_out], c [n_tokens] or None -> the shape of `indices`."""
    tokens = tokens_of(indices, offsets)
    dots = (widen(g)[tokens] * widen(w_dec)[indices.reshape(-1).long()]).sum(dim=1)
    if row_scale is not None:
        dots = dots * row_scale[tokens]
    return dots.reshape(indices.shape).to(g.dtype)
