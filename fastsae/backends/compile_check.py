"""Compiles every GPU kernel without a GPU: python -m fastsae.backends.compile_check [--archs 80,90,100].

Triton's kernels at the block sizes of real shapes (COMPILE_CASES of each module in fastsae/backends/triton), and each
file of csrc/cuda by nvcc where that is found. Prints what each kernel takes of a multiprocessor and exits with 1 if one
does not compile, spills registers, or needs more than the architecture has.
"""

import argparse
import concurrent.futures
import importlib
import importlib.util
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ARCHS = ("80", "90", "100")
MOST_REGISTERS = 255
# Shared memory that one block can have, in bytes (CUDA C++ Programming Guide, compute capabilities).
MOST_SHARED = {"80": 163 << 10, "86": 99 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10, "120": 99 << 10}
ROOT = Path(__file__).parents[2]
_COMPILED = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<arch>\w+)'"
    r"(?:(?!Compiling entry).)*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:(?!Compiling entry).)*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_IN_CUBIN = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture; `error` where it did not compile."""

    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    error: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with it, or an empty string."""
        if self.error:
            return self.error
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.registers > MOST_REGISTERS:
            return f"takes {self.registers} registers, there are {MOST_REGISTERS}"
        most = MOST_SHARED.get(self.arch.rstrip("af"), max(MOST_SHARED.values()))
        return f"takes {self.shared} bytes of shared memory, there are {most}" if self.shared > most else ""


def parse_ptxas(text: str) -> list[Usage]:
    """What `ptxas -v` says of each kernel; spilled bytes are those stored and those loaded."""
    usages = []
    for match in _COMPILED.finditer(text):
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", match["rest"])
        static = int(shared[1]) if shared else 0
        spilled = int(match["stores"]) + int(match["loads"])
        usages.append(Usage(match["kernel"], match["arch"], int(match["registers"]), static, spilled))
    return usages


def readable(kernels: list[str]) -> dict[str, str]:
    """C++ kernels as they are written, without namespaces and arguments, where c++filt is found."""
    if not kernels or shutil.which("c++filt") is None:
        return dict(zip(kernels, kernels, strict=True))
    done = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True)
    return dict(zip(kernels, map(_shortened, done.stdout.splitlines()), strict=True))


def _shortened(name: str) -> str:
    # Of CUB's names, which fill a screen, the kernel and its key are enough.
    name = re.sub(r"\(anonymous namespace\)::", "", name).removeprefix("void ")
    name = re.sub(r"^((?:\w+::)*\w+)(<.*?>)?.*", r"\1\2", name) if "cub::" in name else name.split("(fastsae")[0]
    name = re.sub(r"\w+::(?=\w)|__nv_|\((?:int|bool)\)", "", re.sub(r"\([^()]*\*.*", "", name))
    return name if len(name) < 70 else name[:69] + "…"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def check_cuda(source: Path, arch: str) -> list[Usage]:
    """The kernels of one file of csrc/cuda; the flags are those of setup.py."""
    flags = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc' / 'include'}"]
    with tempfile.TemporaryDirectory() as folder:
        out = ["-cubin", "-o", str(Path(folder, "kernel.cubin")), "-Xptxas", "-v"]
        code, text = _run([nvcc() or "nvcc", *flags, f"-arch=sm_{arch}", *out, str(source)])
    if code:
        return [Usage(source.name, arch, error=f"nvcc: {text.strip()[-2000:]}")]
    return parse_ptxas(text)


def triton_modules() -> list[str]:
    from fastsae.backends import triton as package

    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def check_triton(module: str, archs: list[str]) -> list[Usage]:
    """The COMPILE_CASES of one module; runs in a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = getattr(importlib.import_module(f"fastsae.backends.triton.{module}"), "COMPILE_CASES", [])
        return [check_case(case, arch) for case in cases for arch in archs if not case.archs or arch in case.archs]


def check_case(case, arch: str) -> Usage:
    """One CompileCase. Triton keeps no word of ptxas: a stack, which its kernels have no other use for, is a spill."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    try:
        source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=aligned)
        target = GPUTarget("cuda", int(arch.rstrip("af")), 32)
        compiled = triton.compile(source, target=target, options=dict(case.options))
    except Exception as error:
        return Usage(case.name, arch, error=f"{type(error).__name__}: {error}"[:2000])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        code, text = _run([str(tools / "cuobjdump"), "--dump-resource-usage", str(cubin)])
    found = _IN_CUBIN.search(text)
    if code or found is None:
        return Usage(case.name, arch, error=f"cuobjdump: {text.strip()[-2000:]}")
    registers, stack, local = map(int, found.groups())
    return Usage(case.name, arch, registers, compiled.metadata.shared, stack + local)


def check_all(archs: list[str], jobs: int) -> tuple[list[Usage], list[str]]:
    """Every kernel, and what could not be checked."""
    usages, notes = [], []
    context = multiprocessing.get_context("spawn")
    # Threads wait for nvcc and processes work for Triton: as many of both together as there are processors.
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as threads,
        concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as processes,
    ):
        pending = []
        if nvcc() is None:
            notes.append("nvcc is not found (CUDA_HOME, then PATH): csrc/cuda is left out")
        else:
            files = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
            pending += [threads.submit(check_cuda, source, arch) for source in files for arch in archs]
        for done in concurrent.futures.as_completed(pending):
            usages += done.result()
        if importlib.util.find_spec("triton") is None:
            notes.append("Triton is not installed: its kernels are left out")
        else:
            pending = [processes.submit(check_triton, module, [arch]) for module in triton_modules() for arch in archs]
            for done in concurrent.futures.as_completed(pending):
                usages += done.result()
    names = readable(sorted({usage.kernel for usage in usages if usage.kernel.startswith("_Z")}))
    named = [Usage(**{**vars(usage), "kernel": names.get(usage.kernel, usage.kernel)}) for usage in usages]
    return sorted(named, key=lambda usage: (usage.kernel, int(usage.arch.rstrip("af")))), notes


def table_of(usages: list[Usage]) -> Table:
    table = Table("kernel", "arch")
    for column in ("registers", "shared memory", "spill bytes"):
        table.add_column(column, justify="right")
    for usage in usages:
        numbers = ("", "", "") if usage.error else (str(usage.registers), str(usage.shared), str(usage.spilled))
        table.add_row(usage.kernel, f"sm_{usage.arch}", *numbers, style="red" if usage.fault else None)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(ARCHS), help="compute capabilities, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many compilers at a time")
    options = parser.parse_args(arguments)
    usages, notes = check_all(options.archs.split(","), options.jobs)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table_of(usages))
    faults = [usage for usage in usages if usage.fault]
    for usage in faults:
        console.print(f"{usage.kernel} on sm_{usage.arch}: {usage.fault}", style="red", markup=False, highlight=False)
    for note in notes:
        console.print(note, markup=False)
    console.print(f"{len(usages)} kernels, {len(faults)} at fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
