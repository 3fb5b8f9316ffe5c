"""One shape from the gate to the numbers."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone

import torch

from fastsae.bench import cases, gate, machine, targets, timing
from fastsae.bench.baselines import contestants
from fastsae.bench.implementations import Implementation
from fastsae.bench.memory import Unmeasured, measure_here, peak_memory
from fastsae.bench.problem import DTYPES, Problem
from fastsae.bench.result import Measurement, Result, Row, Skipped, Target
from fastsae.bench.shapes import Shape

# Of the memory that is available, so much may be planned for: the rest is the system's.
_USABLE = 0.85


def run(
    shapes: Sequence[Shape],
    *,
    dtype: str = "float32",
    inputs: str = "mixture",
    rounds: int = 11,
    memory: bool = True,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda message: None,
) -> Result:
    """Checks, times and (if `memory`) weighs every implementation at each shape.

    A shape whose checks are not all green has no rows: no speed is reported for wrong results.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r}: expected cpu or cuda")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}: torch {torch.__version__} sees no CUDA device")
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: expected at least 1")
    result = Result(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine.describe(where),
        versions=machine.versions(),
        commit=machine.commit(),
        settings={
            "rounds": rounds,
            "warm_up_rounds": timing.WARM_UP_ROUNDS,
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "optimizer": "torch.optim.Adam(fused=True)",
        },
    )
    for shape in shapes:
        result.measurements.append(
            _measure(shape, dtype, inputs, rounds, memory, where, lambda m, s=shape: progress(f"{s.name}: {m}"))
        )
    return result


def _measure(
    shape: Shape,
    dtype: str,
    inputs: str,
    rounds: int,
    memory: bool,
    device: torch.device,
    progress: Callable[[str], None],
) -> Measurement:
    everyone = contestants(DTYPES[dtype], device)
    chosen, train, skipped = _that_fit(shape, DTYPES[dtype], everyone, machine.available_memory(device))
    progress("making the problem")
    problem = Problem(shape, DTYPES[dtype], inputs, device)
    progress("checking against float64")
    checks = gate.run(problem, chosen)
    measurement = Measurement(
        shape=asdict(shape),
        dtype=dtype,
        inputs=inputs,
        nnz=shape.nnz,
        l0=0.0,
        checks=[asdict(check) for check in checks],
        skipped=skipped,
    )
    if not measurement.green:
        return measurement
    measurement.l0 = problem.codes.relu().l0().double().mean().item()
    timed = cases.all_cases(problem, chosen, train)
    samples = timing.interleave(timed, rounds, progress, timing.clock_of(device))
    measurement.rows = _rows(timed, samples)
    if device.type == "cpu":
        # Children measure memory: what this process holds would be in their way.
        del problem
    del timed
    gc.collect()
    for implementation in chosen if memory else []:
        progress(f"peak memory of {implementation.name}")
        if device.type == "cpu":
            _add_memory_of_a_child(measurement, shape, implementation, train)
        else:
            _add_peaks(measurement, implementation, measure_here(problem, implementation, train))
    if device.type == "cpu" and targets.apply(shape, dtype):
        measurement.targets = _targets(measurement)
    return measurement


def _that_fit(
    shape: Shape, dtype: torch.dtype, implementations: Sequence[Implementation], available: int | None
) -> tuple[list[Implementation], bool, list[Skipped]]:
    """Who can run in the memory that is available, whether training can, and who cannot and why."""
    if available is None:
        return list(implementations), True, []
    itemsize = dtype.itemsize
    weights = shape.parameters * itemsize
    scores = shape.n_tokens * shape.d_sae * itemsize
    # Both weights, W_enc in the other dtype (at most twice as wide), and what the GEMMs return.
    base = weights + shape.d_in * shape.d_sae * (6 - itemsize) + 3 * scores
    # Gradients and two moments.
    training = base + 3 * weights
    usable = int(_USABLE * available)
    train = training + min(it.working_set(shape, itemsize) for it in implementations) <= usable
    skipped = []
    if not train:
        skipped.append(Skipped("step", "all", _too_big("training", training, usable)))
    chosen = []
    for implementation in implementations:
        need = (training if train else base) + implementation.working_set(shape, itemsize)
        if need <= usable:
            chosen.append(implementation)
        else:
            skipped.append(Skipped("all", implementation.name, _too_big("it", need, usable)))
    return chosen, train, skipped


def _too_big(what: str, need: int, usable: int) -> str:
    return f"{what} needs about {need / 2**30:.1f} GiB, {usable / 2**30:.1f} GiB may be used here"


def _rows(timed: Sequence[cases.Case], samples: dict[tuple[str, str], timing.Samples]) -> list[Row]:
    gemm, gemm_out = samples[cases.GEMM], samples[cases.GEMM_OUT]
    about = {(phase, case.implementation): case for case in timed for phase in case.work}
    rows = []
    for (phase, implementation), taken in samples.items():
        case = about[phase, implementation]
        counted = case.work[phase]
        rows.append(
            Row(
                phase=phase,
                implementation=implementation,
                precision=case.precision,
                seconds=taken.seconds,
                p20=taken.quantile(0.2),
                p50=taken.quantile(0.5),
                p80=taken.quantile(0.8),
                over_gemm=taken.ratio(gemm),
                over_gemm_out=taken.ratio(gemm_out),
                flops=counted.flops,
                bytes=counted.bytes,
            )
        )
    return sorted(rows, key=lambda row: cases.PHASES.index(row.phase))


def _add_memory_of_a_child(measurement: Measurement, shape: Shape, implementation: Implementation, train: bool) -> None:
    try:
        peaks = peak_memory(shape, measurement.dtype, implementation.name, inputs=measurement.inputs, train=train)
    except Unmeasured as error:
        measurement.skipped.append(Skipped("peak memory", implementation.name, str(error)))
        return
    _add_peaks(measurement, implementation, peaks)


def _add_peaks(measurement: Measurement, implementation: Implementation, peaks: dict[str, int]) -> None:
    for phase, peak in peaks.items():
        row = measurement.row(phase, implementation.name)
        if row is not None:
            row.peak_memory = peak


def _targets(measurement: Measurement) -> list[Target]:
    found = []
    for phase, limit in targets.TIME.items():
        row = measurement.row(phase, targets.IMPLEMENTATION)
        found.append(Target(f"{phase}, time over x @ W_enc", limit, row and row.over_gemm))
    step = measurement.row("step", targets.IMPLEMENTATION)
    share = step.peak_memory / measurement.dense_bytes if step and step.peak_memory is not None else None
    found.append(Target("step, peak memory over one [n_tokens, d_sae] tensor", targets.STEP_MEMORY, share))
    return found
