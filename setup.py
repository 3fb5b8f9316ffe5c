"""Builds fastsae/_cpu: one shared library that holds every instruction set and picks at run time.

And fastsae/_cuda, where nvcc and a GPU are (`cuda_wanted`). No torch header and no torch library: a C++17 compiler,
pybind11 and ninja are all that is needed. Without a compiler, or with FASTSAE_NO_NATIVE=1, the package installs in
pure PyTorch and `fastsae doctor` says so. docs/building.md tells more.
"""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
INSTRUCTION_SETS = {"portable": "-march=x86-64-v2" if X86 else ""}
if X86:
    INSTRUCTION_SETS |= {
        "avx2": "-march=x86-64-v2 -mavx2 -mfma",
        "avx512": f"-march=x86-64-v2 -mavx2 -mfma {AVX512}",
        "avx512_bf16": f"-march=x86-64-v2 -mavx2 -mfma {AVX512} -mavx512bf16 -mavx512vnni",
    }
# -ffp-contract=off: a multiply and an add become one only where a kernel asks for it, so that every
# instruction set rounds alike. -Wno-*uninitialized: GCC 12 warns of its own vector headers.
WARNINGS = "-Wall -Wno-maybe-uninitialized -Wno-uninitialized"
FLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno {WARNINGS}"
# Beside the instruction sets: what one source alone is compiled with, where the compiler knows it.
AMX = "-mavx512f -mamx-tile -mamx-int8 -mamx-bf16"
REQUIRED = os.environ.get("FASTSAE_REQUIRE_NATIVE") == "1"
CUDA_REQUIRED = os.environ.get("FASTSAE_REQUIRE_CUDA") == "1"
# A100, H100 and H200, B200; newer ones compile the PTX of the last when they first run.
CUDA_ARCHS = ("80", "90", "100")
# -fmad=false: as -ffp-contract=off. The exclusion keeps the static CUDA runtime's symbols from being taken from the
# shared one that torch may have loaded, and the other way round.
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden,-Wall"
NVCC_LINK_FLAGS = "-shared -cudart static -Xlinker --exclude-libs,ALL"


def compiler() -> str | None:
    """The command of the C++ compiler: $CXX, else the first that is found."""
    command = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    return command if command and shutil.which(shlex.split(command)[0]) else None


def compiles(cxx: str, flags: str, program: str) -> bool:
    """Whether the compiler makes a program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program + "\n")
        command = [*shlex.split(cxx), *shlex.split(flags), str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def openmp(cxx: str) -> str:
    """The flag that turns OpenMP on, or nothing where the compiler has none (Apple's clang)."""
    if compiles(cxx, "-fopenmp", "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"):
        return "-fopenmp"
    print(f"fastsae: {cxx} has no OpenMP; the kernels will run on one thread.", file=sys.stderr)
    return "-Wno-unknown-pragmas"


def nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """The path of nvcc: in $CUDA_HOME, else on the path."""
    home = environment.get("CUDA_HOME")
    return shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc", path=environment.get("PATH"))


def cuda_archs(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The architectures to compile for, as in "80 90": $FASTSAE_CUDA_ARCHS, separated by spaces, commas or semicolons.

    In ascending order, so that the last is the newest.
    """
    names = environment.get("FASTSAE_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    for name in names:
        if not name.rstrip("af").isdecimal():
            raise SystemExit(f"FASTSAE_CUDA_ARCHS names {name!r}: expected compute capabilities as in '80 90 100'")
    return sorted(set(names or CUDA_ARCHS), key=lambda name: (int(name.rstrip("af")), name))


def gencode(archs: list[str]) -> str:
    """nvcc's flags: machine code for each architecture, and PTX of the last."""
    flags = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def gpu_here() -> bool:
    """Whether this machine has an NVIDIA GPU or its driver."""
    if os.path.exists("/dev/nvidiactl"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def cuda_wanted(environment: Mapping[str, str], here: bool) -> bool:
    """Building the CUDA library takes minutes: on a machine that cannot run it, it has to be asked for."""
    if environment.get("FASTSAE_NO_CUDA") == "1":
        return False
    return here or "1" in (environment.get("FASTSAE_CUDA"), environment.get("FASTSAE_REQUIRE_CUDA"))


class NinjaBuild(build_ext):
    """Writes a build.ninja with one object for each source and instruction set, and runs it."""

    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name == "fastsae._cuda"
        try:
            self.ninja_build(Path(self.get_ext_fullpath(ext.name)).resolve(), is_cuda)
        except (OSError, subprocess.CalledProcessError) as error:
            if CUDA_REQUIRED if is_cuda else REQUIRED:
                raise
            what, serves = ("CUDA", "Triton or plain PyTorch") if is_cuda else ("native", "pure PyTorch")
            warnings.warn(f"fastsae's {what} library was not built ({error}); {serves} will serve.", stacklevel=2)

    def ninja_build(self, target: Path, is_cuda: bool) -> None:
        import fcntl

        import ninja

        # Not self.build_temp: that is a new folder at every editable install, which would compile all anew.
        kind = "cuda" if is_cuda else "native"
        work = ROOT / "build" / f"{kind}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            # Two installs of one source tree at a time would write the same objects.
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open(work / "build.ninja", "w") as file:
                if is_cuda:
                    write_cuda_rules(ninja.Writer(file), compiler(), target)
                else:
                    write_rules(ninja.Writer(file), compiler(), target)
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", str(work)], check=True)


def write_rules(build, cxx: str, target: Path) -> None:
    """The whole build: the kernels see csrc/include alone, the bindings pybind11 and Python too."""
    import pybind11

    threads = openmp(cxx)
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    build.variable("cxx", cxx)
    build.variable("flags", f"{FLAGS} {threads} -I{ROOT / 'csrc/include'}" + (" -DFASTSAE_X86" if X86 else ""))
    build.rule(
        "compile",
        "$cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="CXX $out",
    )
    build.rule("link", f"$cxx {shared} {threads} $in -o $out", description="LINK $out")
    amx = AMX if X86 and compiles(cxx, AMX, "int main() {}") else ""
    objects = []

    def compile_file(source: Path, name: str, more: str) -> None:
        build.build(f"{name}.o", "compile", str(source), variables={"more": more})
        objects.append(f"{name}.o")

    python = sysconfig.get_paths()["include"]
    compile_file(ROOT / "csrc/bindings/cpu.cpp", "bindings", f"-I{pybind11.get_include()} -I{python}")
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        # A source whose code stands in the namespace FASTSAE_ISA is compiled once for each.
        if "namespace FASTSAE_ISA" not in source.read_text():
            compile_file(source, source.stem, amx if source.stem == "amx_products" else "")
            continue
        for isa, isa_flags in INSTRUCTION_SETS.items():
            compile_file(source, f"{source.stem}_{isa}", f"{isa_flags} -DFASTSAE_ISA={isa}")
    build.build(str(target), "link", objects)
    build.default(str(target))


def write_cuda_rules(build, cxx: str, target: Path) -> None:
    """The kernels by nvcc, the bindings by the C++ compiler: they see no CUDA header."""
    import pybind11

    archs = cuda_archs()
    include = f"-I{ROOT / 'csrc/include'}"
    build.variable("cxx", cxx)
    build.variable("nvcc", nvcc())
    build.variable("flags", f"{FLAGS} {include} -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}")
    build.variable("nvcc_flags", f"{NVCC_FLAGS} {include} {gencode(archs)}")
    build.rule(
        "compile",
        "$cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="CXX $out",
    )
    build.rule(
        "compile_cuda",
        "$nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="NVCC $out",
    )
    build.rule("link", f"$nvcc {NVCC_LINK_FLAGS} $in -o $out", description="LINK $out")
    define = f"'-DFASTSAE_CUDA_ARCHS=\"{' '.join(archs)}\"'"
    build.build("bindings.o", "compile", str(ROOT / "csrc/bindings/cuda.cpp"), variables={"more": define})
    objects = ["bindings.o"]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        build.build(f"{source.stem}.o", "compile_cuda", str(source))
        objects.append(f"{source.stem}.o")
    build.build(str(target), "link", objects)
    build.default(str(target))


def cuda_extension() -> list[Extension]:
    if not cuda_wanted(os.environ, gpu_here()):
        return []
    if nvcc() is not None:
        return [Extension("fastsae._cuda", sources=[], optional=not CUDA_REQUIRED)]
    why_not = "no nvcc found (CUDA_HOME, then PATH)"
    if CUDA_REQUIRED:
        raise SystemExit(f"fastsae: {why_not}, and FASTSAE_REQUIRE_CUDA=1 is set.")
    print(f"fastsae: {why_not}; installing without the CUDA library.", file=sys.stderr)
    return []


def extensions() -> list[Extension]:
    if os.environ.get("FASTSAE_NO_NATIVE") == "1":
        return []
    why_not = ""
    if sys.platform == "win32":
        why_not = "the kernels are not built on Windows yet"
    elif compiler() is None:
        why_not = f"no C++ compiler found ({os.environ.get('CXX') or 'g++, clang++, c++'})"
    if not why_not:
        # Optional: an editable install goes on where the library could not be built.
        return [Extension("fastsae._cpu", sources=[], optional=not REQUIRED), *cuda_extension()]
    if REQUIRED:
        raise SystemExit(f"fastsae: {why_not}, and FASTSAE_REQUIRE_NATIVE=1 is set.")
    print(f"fastsae: {why_not}; installing in pure PyTorch.", file=sys.stderr)
    return []


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
