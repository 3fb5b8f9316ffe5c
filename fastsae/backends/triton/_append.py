"""Latents that pass a test, out of a tile of scores in registers into lists in memory, one for each row.

List n lies at starts[n] up to starts[n + 1] of `pairs`; an entry is a pair of a score and its latent (selection.py). A
tile counts what passes in each of its rows and takes that many places by one integer atomic a row. In which order tiles
arrive differs from run to run, the set of entries does not: sorted by latent, the lists are the same on every run.
counts[n] grows by all that pass; what finds no place is not written, and a count beyond the length of its list tells of
it. Rows have counters of their own because one for all would serve every tile of the grid from one address.

Places are 32-bit numbers from the tile's first list on: in 64 bits, and with keys of 64 bits in place of latents, the
tile of an sm_90 tensor core spills whatever the slice.
"""

import triton
import triton.language as tl

from fastsae.backends.triton._launch import device_function
from fastsae.backends.triton.selection import pairs_of


@device_function
def append(found, latents, passes, first, inside, starts, counts, pairs):
    """Adds the scores `found` [rows, columns] of `latents` where `passes`, for rows `first`, ... that are `inside`."""
    rows = tl.arange(0, found.shape[0])
    number = passes.to(tl.int32)
    total = tl.sum(number, axis=1)
    base = tl.atomic_add(counts + first + rows, total, mask=inside & (total > 0), sem="relaxed")
    origin = tl.load(starts + first)
    start = (tl.load(starts + first + rows, mask=inside, other=0) - origin).to(tl.int32)
    end = (tl.load(starts + first + rows + 1, mask=inside, other=0) - origin).to(tl.int32)
    place = (start + base)[:, None] + tl.cumsum(number, axis=1) - 1
    tl.store(pairs + origin + place, pairs_of(found, latents[None, :]), mask=passes & (place < end[:, None]))


@triton.jit
def halves(tile):
    """The left and the right half of the columns of [rows, columns]."""
    parts = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    left, right = tl.split(tl.permute(parts, [0, 2, 1]))
    return left, right


@triton.jit
def halves_of_vector(vector):
    low, high = tl.split(tl.permute(tl.reshape(vector, [2, vector.shape[0] // 2]), [1, 0]))
    return low, high
