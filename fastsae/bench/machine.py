"""What a timing depends on beside the code: hardware, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastsae
from fastsae.backends import native
from fastsae.backends.screen import screen_dtype

# Of the processor's flags, those that decide which kernels run.
_FLAG_PREFIXES = ("sse4", "avx", "amx", "fma", "f16c", "vnni", "neon", "asimd", "sve", "bf16", "i8mm")

_CPU = torch.device("cpu")


def describe(device: torch.device = _CPU) -> dict[str, Any]:
    """Processor, memory and what fastsae uses of them, as JSON can hold it; the GPU too if `device` is one."""
    model, flags = _processor()
    return {
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu": model,
        "architecture": platform.machine(),
        "cores": _cores(),
        "flags": sorted(flag for flag in flags if flag.startswith(_FLAG_PREFIXES)),
        "memory_bytes": total_memory(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "class": machine_class(),
        "isa": None if native.cpu is None else native.cpu.isa(),
        "screen": str(screen_dtype()).removeprefix("torch.") if native.cpu is not None else None,
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, Any]:
    return {
        "fastsae": fastsae.__version__,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any] | None:
    """The commit that runs and whether tracked files differ from it; None outside a checkout of fastsae."""
    root = Path(fastsae.__file__).resolve().parent.parent
    try:
        # A virtual environment inside somebody else's repository is no checkout of fastsae.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return {"hash": _git(root, "rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine_class() -> str:
    """ "server" from 16 cores and 64 GiB on, else "laptop": how many tokens a shape takes by default."""
    return "server" if _cores() >= 16 and (total_memory() or 0) >= 60 * 2**30 else "laptop"


def total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory(device: torch.device = _CPU) -> int | None:
    """Bytes that can be allocated on `device`, without swapping; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    return available if limit is None or used is None else min(available, limit - used)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown", set()
    fields = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or "unknown", set(flags.split())
