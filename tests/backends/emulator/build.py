"""Compiles csrc/cuda with a C++ compiler into a module that runs the kernels on a CPU (fastsae/launch.cuh here)."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
# -ffp-contract=off, as nvcc's -fmad=false: results are then those of a GPU to the bit.
FLAGS = "-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -Wall -Wno-unknown-pragmas"


def cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h: of the toolkit whose nvcc is found, else of CUDA_HOME or /usr/local/cuda."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = [Path(home, "include") for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def build(folder: Path) -> ModuleType:
    """The emulated `_cuda`, compiled in `folder` where it is not there already."""
    folder.mkdir(parents=True, exist_ok=True)
    include = f"-I{HERE} -I{CSRC / 'include'} -isystem {cuda_headers()} -isystem {pybind11.get_include()}"
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.name != "sort_pairs.cu"]
    sources += [HERE / "sort_pairs.cpp", CSRC / "bindings" / "cuda.cpp"]
    with open(folder / "build.ninja", "w") as file:
        rules = ninja.Writer(file)
        command = f"{os.environ.get('CXX', 'g++')} {FLAGS} {include} -isystem {sysconfig.get_paths()['include']}"
        rules.rule("compile", f"{command} -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        rules.rule("link", f"{os.environ.get('CXX', 'g++')} -shared $in -o $out")
        for source in sources:
            rules.build(f"{source.stem}.o", "compile", str(source))
        rules.build(str(target), "link", [f"{source.stem}.o" for source in sources])
    done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:])
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(target))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
    loader.exec_module(module)
    return module
