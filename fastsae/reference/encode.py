"""pre = (x - b_dec) W_encᵀ + b_enc, then the k largest of each row."""

from torch import Tensor

from fastsae.reference.precision import widen


def preactivations(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> Tensor:
    """pre[n, f] = <x_n - b_dec, w_enc_f> + b_enc[f], [n_tokens, d_sae], in the accumulating dtype."""
    centred = widen(x) if b_dec is None else widen(x) - widen(b_dec)
    pre = centred @ widen(w_enc).T
    return pre if b_enc is None else pre + widen(b_enc)


def encode_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int, relu_first: bool
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, larger first, ties by the lower index, NaN above all.

    x [n_tokens, d_in], w_enc [d_sae, d_in] -> values [n_tokens, k], indices int32 [n_tokens, k].
    With `relu_first` the selection is among relu(pre), and relu(pre) is what is returned.
    """
    pre = preactivations(x, w_enc, b_enc, b_dec)
    if relu_first:
        pre = pre.relu()
    values, indices = pre.sort(dim=1, descending=True, stable=True)
    return values[:, :k].to(x.dtype), indices[:, :k].int()
