"""The largest of a batch, found as its entries come by."""

import torch
from torch import Tensor

# Entries held beyond those that will be kept, as a share of them and at least so many: cutting down costs a selection.
_SLACK = 1.0
_LEAST_SLACK = 4096


class LargestOfBatch:
    """Holds entries of a batch until `k_total` of them are known to be the largest.

    `floor` rises: an entry ranked at or below it cannot be among them any more. Of entries that tie the lower token
    wins, then the lower latent. NaN and +inf are kept and not counted. Memory is that of k_total entries, or twice.
    """

    def __init__(self, k_total: int, floor: float = 0.0):
        self.k_total, self.floor = k_total, floor
        self._parts: list[tuple[Tensor, ...]] = []
        self._held = 0

    def add(self, tokens: Tensor, latents: Tensor, values: Tensor, ranks: Tensor) -> None:
        """Flat entries, each above `floor` as it was (or NaN): two of int32, and two of the accumulating dtype."""
        self._parts.append((tokens, latents, values, ranks))
        self._held += ranks.numel()
        if self._held > self.k_total + max(_LEAST_SLACK, int(_SLACK * self.k_total)):
            self._cut()

    def _cut(self) -> None:
        tokens, latents, values, ranks = (torch.cat(columns) for columns in zip(*self._parts, strict=True))
        chosen, least = self._choose(tokens, latents, ranks)
        self._parts, self._held = [tuple(part[chosen] for part in (tokens, latents, values, ranks))], len(chosen)
        # Strictly below what k_total entries reach: an entry to come may tie with the last and stand before it.
        below = torch.nextafter(least, torch.zeros_like(least))
        self.floor = max(self.floor, float(below))

    def _choose(self, tokens: Tensor, latents: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries are kept, by token, then latent; and the least of k_total ranks, -inf if there are fewer."""
        order = (tokens.long() << 32 | latents).argsort()
        ranks = ranks[order]
        counts = _counts(ranks)
        counted = ranks.where(counts, -torch.inf)
        if self.k_total == 0:
            least = counted.new_full((), torch.inf)
        elif counted.numel() > self.k_total:
            least = counted.topk(self.k_total, sorted=False).values.min()
        else:
            least = counted.new_full((), -torch.inf)
        above, tied = counted > least, counts & (counted == least)
        chosen = above | (tied & (tied.cumsum(0) <= self.k_total - above.sum())) | ~counts
        return order[chosen], least

    @property
    def enough(self) -> bool:
        """Whether k_total entries that count are held: then no entry at or below `floor` is missing."""
        return sum(int(_counts(part[3]).sum()) for part in self._parts) >= self.k_total

    def result(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values in the dtype of `like` [n_tokens, d], indices and offsets: the final cut, rows in order."""
        n_tokens = like.shape[0]
        if not self._parts:
            empty = torch.empty(0, dtype=torch.int32, device=like.device)
            return like.new_empty(0), empty, torch.zeros(n_tokens + 1, dtype=torch.int64, device=like.device)
        tokens, latents, values, ranks = (torch.cat(columns) for columns in zip(*self._parts, strict=True))
        chosen, _ = self._choose(tokens, latents, ranks)
        sizes = torch.bincount(tokens[chosen], minlength=n_tokens)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return values[chosen].to(like.dtype), latents[chosen], offsets


def _counts(ranks: Tensor) -> Tensor:
    return ~(ranks.isnan() | (ranks == torch.inf))
