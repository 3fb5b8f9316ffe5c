import torch

from fastsae.codes import SparseCodes


def encode_groupmax(x, W_enc, b_enc, k, *, b_dec=None):
    pre = ((x if b_dec is None else x - b_dec) @ W_enc + b_enc).relu()
    v, i = pre.view(len(x), k, -1).max(-1)
    i = i + torch.arange(k) * (pre.shape[1] // k)
    return SparseCodes(v, i, pre.shape[1])
