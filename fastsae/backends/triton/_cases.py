"""What a module's COMPILE_CASES list holds."""

from dataclasses import dataclass, field
from typing import Any

# Widths of real SAEs: GPT-2 small, Gemma 2 2B, Llama 3 8B.
WIDTHS = (768, 2304, 4096)


@dataclass(frozen=True)
class CompileCase:
    """One kernel as it is launched on a real shape, to be compiled without a GPU."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    # Arguments that a launch finds to be multiples of 16: Triton then compiles vector loads.
    aligned: tuple[str, ...] = ()
    # Compute capabilities on which it is launched, "80" and so on; none names all.
    archs: tuple[str, ...] = ()


def case(
    name: str, kernel: Any, types: str, constexprs: dict[str, Any], *, archs: tuple[str, ...] = (), **options: int
) -> CompileCase:
    """`types` are those of the kernel's arguments but the constexprs, in order, each name followed by its type.

    Pointers, strides and widths count as aligned: what torch allocates is, and the widths of real models are.
    """
    words = types.split()
    signature = dict(zip(words[::2], words[1::2], strict=True))
    runtime = {n: t for n, t in signature.items() if n not in constexprs}
    aligned = tuple(n for n, t in runtime.items() if t.startswith("*") or n == "d" or n.endswith("stride"))
    ordered = {n: "constexpr" if n in constexprs else signature[n] for n in kernel.arg_names}
    return CompileCase(name, kernel, ordered, constexprs, options, aligned, archs)
