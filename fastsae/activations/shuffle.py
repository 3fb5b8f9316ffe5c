"""A shuffle buffer over a stream of rows."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def shuffled(blocks: Iterable[Tensor], capacity: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of a stream of blocks [n, d], each once, in batches [batch_size, d] of random order.

    Up to `capacity` rows (at least a batch) are held and permuted; half of them are served before the next rows come
    in, so that neighbours in the stream, which are tokens of one text, part by thousands of rows. The last batch may
    be short. The order depends on the blocks and the generator alone.
    """
    if batch_size < 1 or capacity < batch_size:
        raise ValueError(f"capacity = {capacity}, batch_size = {batch_size}: expected capacity >= batch_size >= 1")
    held: list[Tensor] = []
    n_held = 0
    for block in blocks:
        held.append(block)
        n_held += len(block)
        if n_held < capacity:
            continue
        rows = _permuted(held, generator)
        n_served = max(1, n_held // 2 // batch_size) * batch_size
        yield from rows[:n_served].split(batch_size)
        # A copy: a view would keep the served half alive as well.
        held = [rows[n_served:].clone()]
        n_held -= n_served
    if n_held:
        yield from _permuted(held, generator).split(batch_size)


def _permuted(blocks: list[Tensor], generator: torch.Generator) -> Tensor:
    rows = torch.cat(blocks)
    return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
