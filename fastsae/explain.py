"""fastsae.explain: which backend serves what, and why."""

from dataclasses import dataclass

import torch

from fastsae.backends import dispatch, native
from fastsae.backends.screen import screen_dtype, served
from fastsae.interop.accelerate import saes_in
from fastsae.interop.record import Record, record_of

_OPS = (
    "encode_topk",
    "encode_threshold",
    "encode_batch_topk",
    "encode_groupmax",
    "decode",
    "squared_error",
    "sampled_dot",
    "transpose",
    "accumulate_rows",
    "fused_update",
    "gradient_norm",
)


@dataclass(frozen=True)
class Explanation:
    """One line for each operator; `str` of it is a table, `choices` the same by name."""

    choices: dict[str, dispatch.Choice]
    heading: str

    def __str__(self) -> str:
        width = max((len(op) for op in self.choices), default=0)
        lines = [f"  {op:<{width}}  {choice.backend:<5}  {choice.reason}" for op, choice in self.choices.items()]
        return "\n".join([self.heading, *(lines or ["  no operator has run yet"])])


def _library() -> str:
    if native.cpu is None:
        return native.why_not_cpu
    what = f"native CPU library, instruction set {native.cpu.isa()}, screen of encode_topk in {screen_dtype()}"
    rows = ", ".join(f"{count:,} {path} ({dtype})" for (dtype, path), count in sorted(served.items()))
    return f"{what}; its rows so far: {rows}" if rows else what


def _heading(what: str, choices: dict[str, dispatch.Choice]) -> str:
    parts = [_library()]
    if any(choice.backend == "triton" for choice in choices.values()):
        from fastsae.backends.triton.encode import float32_products

        parts.append(f"float32 products of Triton's encoders in {float32_products()}")
    return f"{what} ({'; '.join(parts)}):"


@dataclass(frozen=True)
class Paths:
    """What became of the calls of accelerated SAEs of other libraries; `str` of it is a table.

    records: of each SAE, in the order they are found.
    """

    records: tuple[Record, ...]

    def __str__(self) -> str:
        return "\n".join(line for record in self.records for line in _lines(record))


def _lines(record: Record) -> list[str]:
    name = f"{record.library}.{record.original.__name__}"
    if record.why_not is not None:
        return [f"{name}: all of it is {record.library}'s own code: {record.why_not}"]
    width = max((len(method) for method, _, _ in record.calls), default=0)
    lines = [
        f"  {method:<{width}}  {path}, {count} call{'' if count == 1 else 's'}{': ' if reason else ''}{reason}"
        for (method, path, reason), count in record.calls.items()
    ]
    return [f"{name}, accelerated:", *(lines or ["  nothing has been called yet"])]


def explain(obj: object = None) -> Explanation | Paths:
    """Which backend serves each operator, and why; in what precision Triton multiplies float32, where it serves.

    Without an argument: what ran last in this process. With an SAE or a tensor: what calls of its device and dtype
    would run on. With what `fastsae.accelerate` was called on: which path each method of each of its SAEs took, how
    often, and why. Raises TypeError for anything else.
    """
    if obj is None:
        choices = dict(dispatch.last_choices())
        return Explanation(choices, _heading("Last calls", choices))
    records = tuple(record for sae in saes_in(obj) if (record := record_of(sae)) is not None)
    if records:
        return Paths(records)
    device, dtype = getattr(obj, "device", None), getattr(obj, "dtype", None)
    if not isinstance(device, torch.device) or not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"obj is a {type(obj).__name__}: expected an SAE, a tensor, what fastsae.accelerate took, or nothing"
        )
    choices = {op: dispatch.choose(op, device, dtype) for op in _OPS}
    return Explanation(choices, _heading(f"{type(obj).__name__} on {device} in {dtype}", choices))
