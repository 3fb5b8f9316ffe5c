"""pre = (x - b_dec) W_encᵀ + b_enc, then the k largest of each row."""

from torch import Tensor

from fastsae.reference.precision import widen


def preactivations(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> Tensor:
    """pre[n, f] = <x_n - b_dec, w_enc_f> + b_enc[f], [n_tokens, d_sae], in the accumulating dtype."""
    centred = widen(x) if b_dec is None else widen(x) - widen(b_dec)
    pre = centred @ widen(w_enc).T
    return pre if b_enc is None else pre + widen(b_enc)


def encode_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    relu_first: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, larger first, ties by the lower index, NaN above all.

    x [n_tokens, d_in], w_enc [d_sae, d_in] -> values [n_tokens, k], indices int32 [n_tokens, k].
    With `relu_first` the selection is among relu(pre), and relu(pre) is what is returned. With a scale [d_sae] they
    are ranked by pre · scale.
    """
    pre = preactivations(x, w_enc, b_enc, b_dec)
    rank = pre if scale is None else pre * scale.to(pre.dtype)
    if relu_first:
        # What the scale makes zero counts as zero.
        rank, pre = rank.relu(), pre.where(~(rank <= 0), 0)
    indices = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return pre.gather(1, indices).to(x.dtype), indices.int()
