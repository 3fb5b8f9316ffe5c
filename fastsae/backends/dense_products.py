"""When codes are so dense that the CPU kernels read the dictionary by tiles, shared by many tokens, and what says so.

An early ReLU SAE has thousands of latents active in each token. Gathering a row of W_dec for each entry then reads the
whole dictionary once for every token. By tiles (`csrc/cpu/tiled_rows.h`, `csrc/cpu/dot_block.h`) a block of tokens
shares the reading. Both ways make the same sums in the same order, so the choice changes no bit: not with the thread
count, the batch or this rule, and an entry that is not stored multiplies nothing, whatever W_dec holds there. A
product of torch's has the bits of its thread count, multiplies NaN by zeros that are not stored, and rounds a bfloat16
result before a bias or a target can be added; `benchmarks/dense_crossover.py` times it beside these two, and in
float32 tiles take about half its time.
"""

import torch
from torch import Tensor

from fastsae.backends import native

# F / L0 up to which tiles win, of the densities measured in benchmarks/results/dense_crossover/gpt2-small-cpu.json; 0
# where they never do. For accumulate_rows it is the tokens of a batch over those of a latent.
MOST_LATENTS_PER_ENTRY = {
    "decode": {torch.float32: 16, torch.bfloat16: 8},
    "squared_error": {torch.float32: 16, torch.bfloat16: 8},
    "sampled_dot": {torch.float32: 4, torch.bfloat16: 0},
    "accumulate_rows": {torch.float32: 8, torch.bfloat16: 4},
}
# Fewer sums than this do not pay for the copy of a tile they share.
FEWEST_ROWS = 32

_last: dict[str, str] = {}


def pays(op: str, dtype: torch.dtype, indices: Tensor, offsets: Tensor | None, n_rows: int, width: int) -> bool:
    """Whether `op` goes by tiles for n_rows sums over `width` rows, and a note of it for fastsae.explain.

    Entries of a row must ascend: only then do many rows want the same tile at the same time.
    """
    nnz = indices.numel()
    if nnz == 0 or n_rows < FEWEST_ROWS or nnz * MOST_LATENTS_PER_ENTRY[op][dtype] < n_rows * width:
        return False
    k = 0 if offsets is not None else indices.shape[1]
    if not native.cpu.ascending(indices.data_ptr(), 0 if offsets is None else offsets.data_ptr(), n_rows, k):
        return False
    _last[op] = f"dense codes (1 of {n_rows * width / nnz:.1f} places), by tiles"
    return True


def taken(op: str) -> str:
    """What the call that has just ended noted, or an empty string; it is told once."""
    return _last.pop(op, "")
