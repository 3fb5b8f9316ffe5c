"""y_n = b_dec + Σ_j v_nj W_dec[i_nj]."""

from torch import Tensor

from fastsae.reference.precision import tokens_of, widen


def n_tokens_of(indices: Tensor, offsets: Tensor | None) -> int:
    return indices.shape[0] if offsets is None else offsets.numel() - 1


def decode(values: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """Codes and W_dec [d_sae, d_out] -> [n_tokens, d_out]."""
    terms = widen(values).reshape(-1, 1) * widen(w_dec)[indices.reshape(-1).long()]
    y = terms.new_zeros(n_tokens_of(indices, offsets), w_dec.shape[1])
    y = y.index_add(0, tokens_of(indices, offsets), terms)
    return (y if b_dec is None else y + widen(b_dec)).to(w_dec.dtype)
