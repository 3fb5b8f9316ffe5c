"""transpose beside a stable sort of the indices."""

from fastsae import ops
from fastsae.bench import checks, work


def bench_transpose(measure, problem):
    checks.transpose(problem)
    measure(lambda: ops.transpose(problem.codes), work.transpose(problem.shape))


def bench_argsort(measure, problem):
    flat = problem.codes.indices.reshape(-1)
    measure(lambda: flat.argsort(stable=True), work.transpose(problem.shape))
