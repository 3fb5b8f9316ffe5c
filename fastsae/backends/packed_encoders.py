"""The packed forms of W_enc, kept for as long as the weights they are of.

Whoever changes the weights need not tell: each use compares a fingerprint of every 16 latents with that of what was
packed, and packs those that differ (`csrc/cpu/pack_panels.cpp`). So a form is never stale, whether the weights were
changed by an optimizer, through `.data`, by `copy_`, by numpy or by another process that shares them.
"""

import threading
from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastsae.backends.screen_panels import Kind, PackedEncoder


@dataclass
class _Entry:
    storage: StorageWeakRef
    packed: PackedEncoder
    resting: int = 0


# A screen that most rows overflow costs its time for nothing; trying it once in so many uses costs little.
_RESTED_USES = 32
_entries: dict[tuple, _Entry] = {}
_lock = threading.Lock()


def packed_encoder(w_enc: Tensor, kind: Kind, powers: Tensor | None = None) -> PackedEncoder:
    """w_enc [d_sae, d_in] as screens of this kind multiply it, dimensions times `powers`.

    At most 2 bytes an entry are kept for each kind in use (int8: 1), until the first call after the weights are gone.
    """
    key = _key(w_enc, kind)
    with _lock:
        entry = _living(key)
        if entry is None or not _same(entry.packed.powers, powers):
            entry = _Entry(StorageWeakRef(w_enc.untyped_storage()), PackedEncoder(*w_enc.shape, kind, powers))
            _entries[key] = entry
        entry.packed.pack(w_enc)
    return entry.packed


def _key(w_enc: Tensor, kind: Kind) -> tuple:
    return w_enc.data_ptr(), w_enc.shape, w_enc.stride(), w_enc.dtype, kind


def _living(key: tuple) -> _Entry | None:
    for gone in [old for old, entry in _entries.items() if entry.storage.expired()]:
        del _entries[gone]
    return _entries.get(key)


def rest(w_enc: Tensor, kind: Kind) -> None:
    """Leaves a kind of screen out for the next uses of these weights: it has just been of no use."""
    with _lock:
        entry = _living(_key(w_enc, kind))
        if entry is not None:
            entry.resting = _RESTED_USES


def resting(w_enc: Tensor, kind: Kind) -> bool:
    """Whether a kind of screen is left out this time; counts as a use."""
    with _lock:
        entry = _living(_key(w_enc, kind))
        if entry is None or not entry.resting:
            return False
        entry.resting -= 1
        return True


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.equal(b)
