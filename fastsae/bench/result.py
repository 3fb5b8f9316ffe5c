"""The file a run writes: everything that was measured and everything a reader needs to judge it."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastsae.durable import replace_file

SCHEMA = "fastsae-bench/1"


@dataclass
class Row:
    """One phase of one implementation; seconds, bytes, and ratios over the encoder's GEMM in the same run."""

    phase: str
    implementation: str
    precision: str
    seconds: list[float]
    p20: float
    p50: float
    p80: float
    # Medians of the ratios within each round, over `x @ W_enc` and over `torch.mm(x, W_enc, out=)`.
    over_gemm: float
    over_gemm_out: float
    flops: int = 0
    bytes: int = 0
    peak_memory: int | None = None


@dataclass
class Skipped:
    """What was not measured, and why."""

    phase: str
    implementation: str
    reason: str


@dataclass
class Target:
    """A promise, and what this run found."""

    what: str
    limit: float
    found: float | None

    @property
    def met(self) -> bool:
        return self.found is not None and self.found <= self.limit


@dataclass
class Measurement:
    """One shape in one dtype."""

    shape: dict[str, Any]
    dtype: str
    inputs: str
    nnz: int
    l0: float
    checks: list[dict[str, Any]]
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    @property
    def green(self) -> bool:
        return all(check["passed"] for check in self.checks)

    def row(self, phase: str, implementation: str) -> Row | None:
        return next((r for r in self.rows if (r.phase, r.implementation) == (phase, implementation)), None)

    @property
    def dense_bytes(self) -> int:
        """One [n_tokens, d_sae] tensor in the dtype of the run."""
        itemsize = 2 if self.dtype == "bfloat16" else 4
        return self.shape["n_tokens"] * self.shape["d_sae"] * itemsize


@dataclass
class Result:
    """A run: machine, versions, commit, settings, and its measurements."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, Any]
    commit: dict[str, Any] | None
    settings: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    schema: str = SCHEMA


def to_json(result: Result) -> str:
    return json.dumps(asdict(result), indent=1) + "\n"


def save_result(result: Result, path: str | os.PathLike) -> None:
    """Writes a result beside `path`, syncs it and renames it, so that a crash leaves no half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, to_json(result).encode())


def load_result(path: str | os.PathLike) -> Result:
    """Reads a result file.

    Raises ValueError, naming the file and what is wrong with it, for anything but a whole result of this schema.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no result of `fastsae bench`: not JSON ({error})") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}: expected {SCHEMA!r}; measure again with this fastsae")
    try:
        measurements = [_measurement(m) for m in raw["measurements"]]
        return _build(Result, raw | {"measurements": measurements})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no whole result of `fastsae bench`: {error}") from error


def _measurement(raw: dict[str, Any]) -> Measurement:
    parts = {"rows": Row, "skipped": Skipped, "targets": Target}
    return _build(Measurement, raw | {name: [_build(kind, item) for item in raw[name]] for name, kind in parts.items()})


def _build(kind: type, raw: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(unknown)}")
    return kind(**raw)
