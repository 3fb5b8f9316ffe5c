"""Text to windows of tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_windows(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int) -> Tensor:
    """Texts one after the other, the end-of-text token behind each, cut into rows: int64 [n_windows, length].

    What is left over at the end, less than a row, is dropped. Raises ValueError for a length below 2 (a row needs a
    token and its successor) and for text too short for one row.
    """
    if length < 2:
        raise ValueError(f"length = {length!r}: expected at least 2, a token and its successor")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids = torch.cat([torch.tensor(text + end, dtype=torch.int64) for text in encoded]) if encoded else torch.empty(0)
    n_windows = len(ids) // length
    if n_windows == 0:
        raise ValueError(f"text of {len(ids)} tokens: expected at least {length} for one window; give more text")
    return ids[: n_windows * length].view(n_windows, length)
