"""`fastsae doctor`: what is installed, what runs where and why, what is missing and how to get it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastsae
from fastsae.backends import dispatch, native
from fastsae.backends.screen import screen_dtype

# What the extras of pyproject.toml add, by the name each is imported under.
EXTRAS = {"demo": ("transformers", "tokenizers", "jinja2"), "bench": ("matplotlib",)}
DTYPES = (torch.float32, torch.bfloat16)
_OPENMP = ("libgomp", "libiomp", "libomp")


@dataclass
class Finding:
    """`broken` fails the command; `slow` and `missing` do not."""

    level: str
    what: str
    how: str


@dataclass
class Report:
    """Facts by section, and what to do about them."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return any(finding.level == "broken" for finding in self.findings)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Says what is installed, what runs where and why, what is missing and how to get it.

    Exits with 1 if something is broken, with 0 otherwise: what is missing only makes fastsae slower or smaller.
    """
    report = examine()
    typer.echo(json.dumps(asdict(report), indent=2) if as_json else text(report))
    raise typer.Exit(1 if report.broken else 0)


def examine() -> Report:
    """Looks at this process and machine; runs two tiny operators, changes nothing."""
    report = Report()
    report.facts["versions"] = _versions(report)
    report.facts["native library"] = _native(report)
    report.facts["CUDA library"] = _cuda_library(report)
    report.facts["threads"] = _threads(report)
    report.facts["graphics processors"] = _gpus(report)
    report.facts["operators"] = _operators(report)
    _check_results(report)
    return report


def _versions(report: Report) -> dict[str, Any]:
    versions = {"fastsae": fastsae.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "numpy", "triton"):
        versions[name] = _version(name)
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        versions |= {name: _version(name) for name in packages}
        if missing:
            what = f"{', '.join(missing)} not installed: `fastsae {extra}` needs it"
            report.findings.append(Finding("missing", what, f"pip install 'fastsae[{extra}]'"))
    return versions


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native(report: Report) -> dict[str, Any]:
    built = sorted(str(path) for path in Path(fastsae.__file__).parent.glob("_cpu.*") if path.suffix in (".so", ".pyd"))
    if native.cpu is None:
        switched_off = os.environ.get("FASTSAE_NO_NATIVE") == "1"
        if switched_off:
            finding = Finding("missing", "the native library is switched off", "unset FASTSAE_NO_NATIVE")
        else:
            what, _, how = native.why_not_cpu.partition("; to get it, ")
            # A file that is there but does not load is not a choice that somebody made.
            finding = Finding("broken" if built else "missing", what, how)
        report.findings.append(finding)
        return {"file": None, "instruction set": None, "instruction sets": []}
    isas = [{"name": name, "built": was_built, "runs here": runs} for name, was_built, runs in native.cpu.isas()]
    return {"file": native.cpu.__file__, "instruction set": native.cpu.isa(), "instruction sets": isas}


def _cuda_library(report: Report) -> dict[str, Any]:
    if native.cuda is not None:
        return {"file": native.cuda.__file__, "architectures": native.cuda.architectures()}
    what, _, how = native.why_not_cuda.partition("; to get it, ")
    built = sorted(str(path) for path in Path(fastsae.__file__).parent.glob("_cuda.*") if path.suffix == ".so")
    # Without a GPU nothing is missing: the library would serve nothing. A file that does not load is another matter.
    if how and built:
        report.findings.append(Finding("broken", what, how))
    elif how and torch.cuda.is_available():
        report.findings.append(Finding("missing", what, how))
    return {"file": None, "why not": what}


def _threads(report: Report) -> dict[str, Any]:
    libraries = openmp_libraries(_mapped_files())
    kernels = None if native.cpu is None else native.cpu.max_threads()
    if kernels is not None and kernels != torch.get_num_threads():
        what = f"torch runs {torch.get_num_threads()} threads, the native library {kernels}"
        how = "build the native library with OpenMP (docs/building.md)" if kernels == 1 else _ONE_OPENMP
        report.findings.append(Finding("slow", what, how))
    if len(libraries) > 1:
        what = f"{len(libraries)} OpenMP runtimes are loaded, each with threads of its own: {', '.join(libraries)}"
        report.findings.append(Finding("slow", what, _ONE_OPENMP))
    return {"torch": torch.get_num_threads(), "native library": kernels, "OpenMP runtimes": libraries}


_ONE_OPENMP = "import torch before any other package that brings OpenMP, and leave LD_PRELOAD and KMP_* unset"


def _mapped_files() -> list[str]:
    """Files mapped into this process; Linux only."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    return [line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count("/")]


def openmp_libraries(mapped: list[str]) -> list[str]:
    """The OpenMP runtimes among the files mapped into a process, each once, links resolved."""
    return sorted({os.path.realpath(path) for path in mapped if Path(path).name.startswith(_OPENMP)})


def _gpus(report: Report) -> dict[str, Any]:
    available = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
    kernels = [name for name in dispatch.BACKENDS if name not in ("torch", "cpu")]
    served_by = ", ".join(kernels) or "plain PyTorch (fastsae has no GPU kernels yet)"
    if not available and Path("/dev/nvidiactl").exists():
        what = f"a GPU is here, but torch {torch.__version__} cannot use it"
        report.findings.append(Finding("missing", what, "install a torch with CUDA that this driver supports"))
    return {"CUDA of torch": torch.version.cuda, "devices": names, "served by": served_by}


def _operators(report: Report) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    try:
        facts["screen of encode_topk"] = str(screen_dtype()).removeprefix("torch.")
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for dtype in DTYPES:
                choices = fastsae.explain(torch.empty(0, dtype=dtype, device=device)).choices
                facts[f"{device} {str(dtype).removeprefix('torch.')}"] = {op: asdict(c) for op, c in choices.items()}
    except ValueError as error:
        report.findings.append(Finding("broken", str(error), "mend or unset that variable (docs/environment.md)"))
    return facts


def _check_results(report: Report) -> None:
    """The native library must agree with plain PyTorch on a small encode and decode."""
    if native.cpu is None or report.broken:
        return
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: every sum is exact in any order, so the two must agree to the bit.
    x = torch.randint(-8, 9, (4, 16), generator=generator).float()
    w = torch.randint(-8, 9, (1024, 16), generator=generator).float()
    results = []
    for backend in (dispatch.BACKENDS["cpu"], dispatch.BACKENDS["torch"]):
        values, indices = backend.encode_topk(x, w, None, None, 8, False)
        results.append((values, indices, backend.decode(values, indices, None, w, None)))
    if not all(map(torch.equal, *results)):
        how = "reinstall fastsae; if it stays, FASTSAE_BACKEND=torch works, and please report this machine"
        report.findings.append(Finding("broken", "the native library computes wrong results", how))


def text(report: Report) -> str:
    """The report as a person reads it."""
    lines = []
    for section, facts in report.facts.items():
        lines.append(section[0].upper() + section[1:])
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            first, *rest = _shown(value)
            lines.append(f"  {name:<{width}}  {first}")
            lines += [f"  {'':<{width}}  {line}" for line in rest]
    for finding in report.findings:
        lines += ["", f"{finding.level.capitalize()}: {finding.what}", f"  -> {finding.how}"]
    if not report.findings:
        lines += ["", "Nothing is missing."]
    return "\n".join(lines)


def _shown(value: Any) -> list[str]:
    if value is None:
        return ["none"]
    if isinstance(value, dict):
        return _grouped(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [f"{isa['name']}: {_state(isa)}" for isa in value]
    if isinstance(value, list):
        return value or ["none"]
    return [str(value)]


def _grouped(choices: dict[str, dict[str, str]]) -> list[str]:
    """Operators that share a backend and a reason share a line."""
    by_choice: dict[tuple[str, str], list[str]] = {}
    for op, choice in choices.items():
        by_choice.setdefault((choice["backend"], choice["reason"]), []).append(op)
    if len(by_choice) == 1:
        ((backend, reason),) = by_choice
        return [f"{backend}: {reason}"]
    return [f"{backend}: {reason}: {', '.join(ops)}" for (backend, reason), ops in by_choice.items()]


def _state(isa: dict[str, Any]) -> str:
    if not isa["built"]:
        return "not built for this kind of processor"
    return "runs here" if isa["runs here"] else "this processor has none"
