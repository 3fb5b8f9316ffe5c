"""Peak memory of each phase: on a CPU by the operating system's count, on a GPU by torch's.

On a CPU a child process makes the problem, warms up until gradients and optimizer state exist, notes its resident
memory, resets the peak that Linux keeps (5 into /proc/self/clear_refs), runs the phase once and reads the peak
(VmHWM). What is above the noted memory is what the phase took beyond parameters, gradients, optimizer state and x,
and beyond the packed W_enc that the screens keep from call to call (2 bytes an entry; int8: 1).
(On a GPU torch's allocator counts, in the process that timed: beyond what is allocated.) With MALLOC_MMAP_THRESHOLD_
at 64 KiB every block of that size or more goes back to the system when it is freed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from fastsae.bench.baselines import contestants
from fastsae.bench.implementations import Implementation
from fastsae.bench.problem import DTYPES, Problem
from fastsae.bench.shapes import Shape

# Gradients and optimizer state exist after the first step; the second finds the allocator as later ones do.
_WARM_UP_STEPS = 2
CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Unmeasured(RuntimeError):
    """Peak memory cannot be had here; the message says why."""


def peak_memory(
    shape: Shape, dtype: str, implementation: str, *, inputs: str = "mixture", train: bool = True
) -> dict[str, int]:
    """Peak bytes by phase (encode, decode and, if `train`, the step and its parts) in a process of its own.

    Raises Unmeasured where the system keeps no peak that can be reset, or when the child fails (out of memory).
    """
    task = {
        "shape": asdict(shape),
        "dtype": dtype,
        "inputs": inputs,
        "implementation": implementation,
        "train": train,
        "threads": torch.get_num_threads(),
    }
    child = subprocess.run(
        [sys.executable, "-m", "fastsae.bench.memory", json.dumps(task)],
        env=os.environ | CHILD_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise Unmeasured(f"the process that measures memory ended with {child.returncode}: {lines[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


class HostMemory:
    """The system's count of this process: resident memory and its peak."""

    def reset(self) -> int:
        """Lets the peak be counted anew; what is in use now."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return self._status("VmRSS")
        except OSError as error:
            raise Unmeasured(f"this system resets no peak of resident memory ({error})") from error

    def peak(self) -> int:
        return self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise Unmeasured(f"/proc/self/status has no {field}")


class DeviceMemory(HostMemory):
    """torch's count of the current CUDA device."""

    def reset(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


def _peak_of(run: Callable[[], object], warm_ups: int, memory: HostMemory) -> int:
    """Bytes by which `run`, after as many calls of it as `warm_ups`, raises memory at its worst."""
    for _ in range(warm_ups):
        run()
    before = memory.reset()
    result = run()
    after = memory.peak()
    del result
    return max(0, after - before)


def measure_here(problem: Problem, implementation: Implementation, train: bool) -> dict[str, int]:
    """`peak_memory` of this process, which on a CPU should have been started for it."""
    memory = DeviceMemory() if problem.x.is_cuda else HostMemory()
    peaks: dict[str, int] = {}
    if not implementation.trains_only:
        peaks |= _inference_peaks(problem, implementation, memory)
    if train:
        peaks["step"] = _peak_of(lambda: list(implementation.step(problem)), _WARM_UP_STEPS, memory)
    if train and not implementation.trains_only:
        peaks |= _part_peaks(problem, implementation, memory)
    return peaks


def _part_peaks(problem: Problem, implementation: Implementation, memory: HostMemory) -> dict[str, int]:
    """Of a step's parts. A forward has no gradients beside it: their absence would hide what it takes, so it is
    counted from memory without them, backward and update from memory with them."""
    peaks, before = {}, memory.reset()
    parts = implementation.step(problem)
    next(parts)
    for _ in range(2):
        memory.reset()
        part = next(parts)
        peaks[part] = max(0, memory.peak() - before)
    parts.close()
    problem.zero_grad()
    peaks["forward"] = _peak_of(lambda: implementation.loss(problem, problem.x), 0, memory)
    return peaks


@torch.no_grad()
def _inference_peaks(problem: Problem, implementation: Implementation, memory: HostMemory) -> dict[str, int]:
    codes = implementation.encode(problem, problem.x)
    return {
        "encode": _peak_of(lambda: implementation.encode(problem, problem.x), 0, memory),
        "decode": _peak_of(lambda: implementation.decode(problem, codes), 1, memory),
    }


def main(task: dict) -> None:
    torch.set_num_threads(task["threads"])
    dtype = DTYPES[task["dtype"]]
    problem = Problem(Shape(**task["shape"]), dtype, task["inputs"])
    by_name = {implementation.name: implementation for implementation in contestants(dtype, problem.x.device)}
    print(json.dumps(measure_here(problem, by_name[task["implementation"]], task["train"])))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
