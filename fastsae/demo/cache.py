"""Where trained language models stay between runs."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "FASTSAE_CACHE"


def cache_folder(given: Path | None = None) -> Path:
    """`given`, or $FASTSAE_CACHE, or `fastsae` in the platform's folder for a user's caches."""
    if given is not None:
        return given
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "fastsae"


def fingerprint(texts: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Twenty hexadecimal digits of a SHA-256 that change with any text, their order, or any setting."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:20]
