"""A tiny shape and a result of it, without measuring anything."""

import pytest

from fastsae.bench import result as results
from fastsae.bench.shapes import Shape


@pytest.fixture
def tiny():
    return Shape("tiny", 32, 640, 6, 96, "tests")


def row(phase, implementation, ratio, **more):
    seconds = [0.01 * ratio * factor for factor in (0.9, 1.0, 1.1)]
    about = {"precision": "float32", "p20": seconds[0], "p50": seconds[1], "p80": seconds[2]}
    return results.Row(phase, implementation, seconds=seconds, over_gemm=ratio, over_gemm_out=ratio, **about, **more)


@pytest.fixture
def measurement(tiny):
    rows = [
        row("gemm", "x @ W_enc", 1.0, flops=10**9),
        row("encode", "fastsae", 0.8, flops=10**9, peak_memory=2**20),
        row("decode", "fastsae", 0.05, bytes=10**6),
        row("step", "fastsae", 1.4, flops=10**9, peak_memory=3 * 2**20),
        row("step", "dense", 6.5, flops=6 * 10**9),
    ]
    return results.Measurement(
        shape={"name": "tiny", "d_in": 32, "d_sae": 640, "k": 6, "n_tokens": 96, "source": "tests"},
        dtype="float32",
        inputs="mixture",
        nnz=576,
        l0=6.0,
        checks=[{"name": "decode", "passed": True, "detail": "64 tokens"}],
        rows=rows,
        skipped=[results.Skipped("all", "topk + embedding_bag", "it needs about 9.0 GiB, 1.0 GiB may be used here")],
        targets=[results.Target("encode, time over x @ W_enc", 1.1, 0.8), results.Target("step", 1.6, 1.7)],
    )


@pytest.fixture
def result(measurement):
    return results.Result(
        date="2026-11-22T12:00:00+00:00",
        machine={
            "cpu": "Some CPU",
            "cores": 2,
            "flags": ["avx2"],
            "memory_bytes": 2**34,
            "load_average": 0.1,
            "isa": "avx2",
            "screen": "float32",
        },
        versions={"fastsae": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "os": "Linux"},
        commit={"hash": "0123456789abcdef", "dirty": True},
        settings={"rounds": 3, "threads": 2},
        measurements=[measurement],
    )
