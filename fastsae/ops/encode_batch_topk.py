import torch

from fastsae.codes import SparseCodes


def encode_batch_topk(x, W_enc, b_enc, k, *, b_dec=None, scale=None):
    pre = (x if b_dec is None else x - b_dec) @ W_enc + b_enc
    rank = pre if scale is None else pre * scale
    t = rank.relu().flatten().topk(int(k * len(x)))
    m = torch.zeros_like(pre, dtype=torch.bool).flatten().scatter(0, t.indices, True).view_as(pre) & (pre > 0)
    c = m.sum(1)
    return SparseCodes(pre[m], m.nonzero()[:, 1], pre.shape[1], offsets=torch.cat([c.new_zeros(1), c.cumsum(0)]))
