"""Builds fastsae/_cpu: one shared library that holds every instruction set and picks at run time.

No torch header and no torch library: a C++17 compiler, pybind11 and ninja are all that is needed.
Without a compiler, or with FASTSAE_NO_NATIVE=1, the package installs in pure PyTorch and
`fastsae doctor` says so.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")
KERNELS = ("encode", "decode", "sampled_dot", "accumulate_rows", "unit_rows", "isa_table")
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
INSTRUCTION_SETS = {"portable": "-march=x86-64-v2" if X86 else ""}
if X86:
    INSTRUCTION_SETS |= {
        "avx2": "-march=x86-64-v2 -mavx2 -mfma",
        "avx512": f"-march=x86-64-v2 -mavx2 -mfma {AVX512}",
        "avx512_bf16": f"-march=x86-64-v2 -mavx2 -mfma {AVX512} -mavx512bf16 -mavx512vnni",
    }
# -ffp-contract=off: a multiply and an add become one only where a kernel asks for it, so that every
# instruction set rounds alike.
FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall"


def compiler() -> str | None:
    command = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    return command if command and shutil.which(command.split()[0]) else None


class NinjaBuild(build_ext):
    """Writes a build.ninja with one object for each kernel and instruction set, and runs it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.ninja_build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTSAE_REQUIRE_NATIVE") == "1":
                raise
            warnings.warn(f"fastsae's native library was not built ({error}); pure PyTorch will serve.", stacklevel=2)

    def ninja_build(self, target: Path) -> None:
        import ninja
        import pybind11

        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc/include", pybind11.get_include(), sysconfig.get_paths()["include"]]
        include_flags = " ".join(f"-I{path}" for path in includes)
        objects = []
        with open(work / "build.ninja", "w") as file:
            build = ninja.Writer(file)
            build.variable("cxx", compiler())
            build.variable("flags", f"{FLAGS} {include_flags}" + (" -DFASTSAE_X86" if X86 else ""))
            build.rule(
                "compile",
                "$cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="CXX $out",
            )
            build.rule("link", "$cxx -shared -fopenmp $in -o $out", description="LINK $out")

            def compile_file(source: Path, name: str, isa: str = "") -> None:
                build.build(f"{name}.o", "compile", str(source), variables={"isa": isa})
                objects.append(f"{name}.o")

            for source in ("cpu/dispatch", "cpu/transpose", "cpu/memory", "bindings/cpu"):
                compile_file(ROOT / f"csrc/{source}.cpp", source.replace("/", "_"))
            for isa, isa_flags in INSTRUCTION_SETS.items():
                for kernel in KERNELS:
                    compile_file(ROOT / f"csrc/cpu/{kernel}.cpp", f"{kernel}_{isa}", f"{isa_flags} -DFASTSAE_ISA={isa}")
            build.build(str(target), "link", objects)
            build.default(str(target))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", str(work)], check=True)


def extensions() -> list[Extension]:
    if os.environ.get("FASTSAE_NO_NATIVE") == "1":
        return []
    if compiler() is None:
        print("fastsae: no C++ compiler found; installing in pure PyTorch.", file=sys.stderr)
        return []
    return [Extension("fastsae._cpu", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
