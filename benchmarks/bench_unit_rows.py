"""normalize_rows_ and project_rows_ beside the same in PyTorch, in place."""

import pytest
import torch

from fastsae import ops
from fastsae.bench import checks, work


@pytest.fixture
def rows(problem):
    """A copy: rows that stay of unit norm however often they are normalised."""
    checks.unit_rows(problem)
    return problem.sae.W_dec.detach().clone()


@pytest.fixture
def grad(rows):
    return torch.randn(rows.shape).to(rows.dtype)


def bench_normalize_rows(measure, problem, rows):
    measure(lambda: ops.normalize_rows_(rows), work.normalize_rows(problem.shape, rows.element_size()))


def bench_normalize_rows_torch(measure, problem, rows):
    measure(lambda: rows.div_(rows.norm(dim=1, keepdim=True)), work.normalize_rows(problem.shape, rows.element_size()))


def bench_project_rows(measure, problem, rows, grad):
    measure(lambda: ops.project_rows_(grad, rows), work.project_rows(problem.shape, rows.element_size()))


def bench_project_rows_torch(measure, problem, rows, grad):
    def project():
        return grad.addcmul_(rows, torch.linalg.vecdot(grad, rows)[:, None], value=-1)

    measure(project, work.project_rows(problem.shape, rows.element_size()))
