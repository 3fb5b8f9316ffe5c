"""What a machine with a GPU is asked in one go: build, tests on the device, sanitizers, the reference shapes.

    make gpu-check OUT=DIR          # or: python benchmarks/gpu_check.py DIR [--wheels DIR]

Every stage runs, whatever became of those before it, each with a limit of its own (nine minutes in all); DIR gets a log
a stage, the bench's records and summary.json. Needs no network: packages that are missing come from --wheels. Exits
with 1 if a stage failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ["pybind11", "ninja", "setuptools", "pytest", "pytest-benchmark", "hypothesis", "typer", "rich", "safetensors"]
# Shapes A, B and C of the speed targets.
SHAPES = {
    "a": ["--shape", "gpt2-small", "--tokens", "4096"],
    "b": ["--shape", "gemma-2-2b-65k", "--tokens", "8192", "--k", "64"],
    "c": ["--shape", "llama-3-8b", "--tokens", "8192", "--k", "64"],
}


@dataclass
class Stage:
    """One command with its limit; without the program `needs` it is left out, `backend` serves every operator."""

    name: str
    command: list[str]
    seconds: int
    needs: str | None = None
    backend: str | None = None


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float


def stages(out: Path, wheels: Path | None) -> list[Stage]:
    python = sys.executable
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index"]
    found = [] if wheels is None else [Stage("packages", [*pip, "--find-links", str(wheels), *TOOLS], 30)]
    build = [*pip, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)]
    tests = [python, "-m", "pytest", "-q", "tests/ops", "tests/saes", "tests/optim", "tests/backends"]
    found += [
        Stage("build", build, 100),
        Stage("doctor", [python, "-m", "fastsae", "doctor"], 15),
        Stage("tests", tests, 180),
    ]
    sanitized = [python, "benchmarks/every_kernel.py"]
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *sanitized]
        found.append(Stage(tool, command, 30, needs="compute-sanitizer"))
    for name, size in SHAPES.items():
        bench = [python, "-m", "fastsae", "bench", "--device", "cuda", "--dtype", "bfloat16", "--repeats", "11", *size]
        found.append(Stage(f"bench-{name}", [*bench, "--out", str(out / f"bench-{name}.json")], 50, backend="triton"))
    return found


def run(stage: Stage, out: Path) -> Outcome:
    if stage.needs is not None and shutil.which(stage.needs) is None:
        return Outcome(stage.name, f"left out: {stage.needs} is not installed", 0.0)
    environment = os.environ | {"FASTSAE_TEST_BACKENDS": "cuda", "FASTSAE_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    # One architecture: three would take most of the build's time.
    environment.setdefault("FASTSAE_CUDA_ARCHS", "90")
    if stage.backend is not None:
        environment["FASTSAE_BACKEND"] = stage.backend
    began = time.monotonic()
    with (out / f"{stage.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                stage.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=stage.seconds
            )
            status = "passed" if done.returncode == 0 else f"failed with {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"failed: over {stage.seconds} s"
        except OSError as error:
            status = f"failed: {error}"
    return Outcome(stage.name, status, round(time.monotonic() - began, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for logs and records")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for the packages that this machine lacks")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for stage in stages(out, arguments.wheels):
        outcomes.append(run(stage, out))
        print(f"{stage.name:<10} {outcomes[-1].seconds:>6.1f} s  {outcomes[-1].status}", flush=True)
        (out / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    return int(any(outcome.status.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
