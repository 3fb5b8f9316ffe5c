"""Compiles every GPU kernel without a GPU: python -m fastsae.backends.compile_check [--archs 80,90,100] [--each].

Triton's kernels at the block sizes of real shapes (COMPILE_CASES of each module in fastsae/backends/triton; cases that
differ in name alone are compiled once), and each file of csrc/cuda by nvcc where that is found. ptxas says what each
kernel takes of a multiprocessor. The exit status is 1 if one does not compile, spills registers, or needs more than the
architecture has, and if `--require` names a compiler that is missing. No cache is read.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
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


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture, as ptxas says; `error` where it did not compile."""

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
    """What `ptxas -v` says of each kernel; spilled bytes are those stored and those loaded.

    A stack alone is no spill: a call has one too.
    """
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

    return sorted(info.name for info in pkgutil.iter_modules(package.__path__))


def _cases_of(module: str) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(f"fastsae.backends.triton.{module}"), "COMPILE_CASES", [])


def distinct_cases(module: str) -> list[tuple[int, str, tuple[str, ...]]]:
    """The place, the joined name and the architectures (none means all) of cases that compile to different things."""
    alike = {}
    for place, case in enumerate(_cases_of(module)):
        parts = (case.signature.items(), case.constexprs.items(), case.options.items(), case.aligned, case.archs)
        alike.setdefault((id(case.kernel), *map(tuple, parts)), []).append((place, case.name))
    return [(same[0][0], _joined([name for _, name in same]), key[-1]) for key, same in alike.items()]


def _joined(names: list[str]) -> str:
    """`decode fp32 768` and `decode fp32 2304` are `decode fp32 768/2304`."""
    words = [dict.fromkeys(same) for same in itertools.zip_longest(*map(str.split, names), fillvalue="")]
    return " ".join("/".join(word) for word in words)


def _start_worker(cache: str) -> None:
    """Triton compiles, prints what ptxas says and finds nothing compiled before; here and in no other process."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(TRITON_CACHE_DIR=cache, TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Processes in which `check_triton` and `check_cuda` can run."""
    with tempfile.TemporaryDirectory() as cache:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, context, _start_worker, (cache,)) as pool:
            yield pool


def check_triton(module: str, place: int, arch: str) -> Usage:
    """One of a module's COMPILE_CASES, in a process of `workers`."""
    return check_case(_cases_of(module)[place], arch)


def check_case(case, arch: str) -> Usage:
    """One CompileCase, by the ptxas and the flags that Triton itself takes for the architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    said = io.StringIO()
    try:
        source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=aligned)
        target = GPUTarget("cuda", int(arch.rstrip("af")), 32)
        with contextlib.redirect_stdout(said):
            compiled = triton.compile(source, target=target, options=dict(case.options))
    except Exception as error:
        return Usage(case.name, arch, error=f"{type(error).__name__}: {error}"[:2000])
    usages = parse_ptxas(said.getvalue())
    if len(usages) != 1:
        return Usage(case.name, arch, error=f"ptxas: {said.getvalue().strip()[-2000:] or 'said nothing'}")
    # Shared memory is given at launch: ptxas does not know of it.
    return replace(usages[0], kernel=case.name, arch=arch, shared=compiled.metadata.shared)


def check_all(archs: list[str], jobs: int) -> tuple[list[Usage], list[str]]:
    """Every kernel, and which of "nvcc" and "triton" are missing."""
    usages, missing = [], []
    with workers(jobs) as pool:
        pending = {}
        if nvcc() is None:
            missing.append("nvcc")
        else:
            files = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
            pending |= {pool.submit(check_cuda, source, arch): None for source in files for arch in archs}
        if importlib.util.find_spec("triton") is None:
            missing.append("triton")
        else:
            modules = triton_modules()
            for module, cases in zip(modules, pool.map(distinct_cases, modules), strict=True):
                for place, name, only in cases:
                    chosen = [arch for arch in archs if not only or arch in only]
                    pending |= {pool.submit(check_triton, module, place, arch): name for arch in chosen}
        for done in concurrent.futures.as_completed(pending):
            found, name = done.result(), pending[done]
            usages += found if name is None else [replace(found, kernel=name)]
    names = readable(sorted({usage.kernel for usage in usages if usage.kernel.startswith("_Z")}))
    named = [replace(usage, kernel=names.get(usage.kernel, usage.kernel)) for usage in usages]
    return sorted(named, key=lambda usage: (usage.kernel, int(usage.arch.rstrip("af")))), missing


def _family(kernel: str) -> str:
    return re.split(r"[ <]", kernel, maxsplit=1)[0]


def table_of(usages: list[Usage], each: bool) -> Table:
    """A row for each kernel, or for all forms of a kernel; on each architecture the most that one of them takes."""
    archs = sorted({usage.arch for usage in usages}, key=lambda arch: int(arch.rstrip("af")))
    name = (lambda kernel: kernel) if each else _family
    groups = {}
    for usage in usages:
        groups.setdefault(name(usage.kernel), []).append(usage)
    table = Table("kernel", title="registers a thread, shared memory in KiB, bytes spilled")
    table.add_column("forms", justify="right")
    for arch in archs:
        table.add_column(f"sm_{arch}", justify="right")
    for kernel, group in groups.items():
        cells = [_most([usage for usage in group if usage.arch == arch]) for arch in archs]
        forms = len({usage.kernel for usage in group})
        table.add_row(kernel, str(forms), *cells, style="red" if any(usage.fault for usage in group) else None)
    return table


def _most(usages: list[Usage]) -> str:
    compiled = [usage for usage in usages if not usage.error]
    if not compiled:
        return "does not compile" if usages else ""
    registers, shared, spilled = (max(map(attrgetter(name), compiled)) for name in ("registers", "shared", "spilled"))
    return f"{registers:3} {shared / 1024:6.1f} {spilled:3}"


MISSING = {
    "nvcc": "csrc/cuda was NOT checked: nvcc is not found (CUDA_HOME, then PATH)",
    "triton": "The Triton kernels were NOT checked: Triton is not installed",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(ARCHS), help="compute capabilities, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many compilers at a time")
    parser.add_argument("--each", action="store_true", help="a row for each form of a kernel")
    parser.add_argument(
        "--require", default="", help="of nvcc and triton, separated by commas, those whose absence is a failure"
    )
    options = parser.parse_args(arguments)
    required = set(filter(None, options.require.split(",")))
    if not required <= set(MISSING):
        parser.error(f"--require {options.require}: expected {' or '.join(MISSING)}, separated by commas")
    usages, missing = check_all(options.archs.split(","), options.jobs)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table_of(usages, options.each))
    faults = [usage for usage in usages if usage.fault]
    for usage in faults:
        console.print(f"{usage.kernel} on sm_{usage.arch}: {usage.fault}", style="red", markup=False, highlight=False)
    console.print(f"{len(usages)} kernels compiled, {len(faults)} at fault")
    for compiler in missing:
        console.print(MISSING[compiler], style="yellow", markup=False)
    return int(bool(faults) or not required.isdisjoint(missing))


if __name__ == "__main__":
    sys.exit(main())
