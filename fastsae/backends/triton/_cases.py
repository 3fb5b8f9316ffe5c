"""What a module's COMPILE_CASES list holds."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel as it is launched on a real shape, to be compiled without a GPU."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
