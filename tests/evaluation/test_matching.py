"""The matching against every matching there is, and where it must be fast."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsae.evaluation.matching import assignment, maximum_weight_matching


def best_total(weight):
    """By trying all: weight [n, m] of pairs, 0 for no edge."""
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    n, m = weight.shape
    return max(sum(weight[i, p[i]] for i in range(n)) for p in permutations(range(m), n))


def of_dense(weight):
    rows, columns = weight.nonzero()
    return maximum_weight_matching(rows, columns, weight[rows, columns], *weight.shape)


@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.1, 1), st.integers(0, 2**32 - 1))
def test_no_matching_weighs_more(n, m, density, seed):
    generator = np.random.default_rng(seed)
    # Multiples of 1/16, so that sums are exact and ties occur.
    weight = generator.integers(1, 17, (n, m)) / 16 * (generator.random((n, m)) < density)
    matched = of_dense(weight)
    used = matched[matched >= 0]
    assert len(set(used)) == len(used)
    pairs = weight[np.flatnonzero(matched >= 0), used]
    assert (pairs > 0).all()
    assert pairs.sum() == best_total(weight)


@given(st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_assignment_costs_the_least(n, more, seed):
    cost = np.random.default_rng(seed).integers(-8, 9, (n, n + more)) / 8
    columns = assignment(cost)
    assert len(set(columns)) == n
    assert cost[np.arange(n), columns].sum() == -best_total(-cost)


def test_the_second_best_pair_may_serve_the_whole():
    weight = np.array([[1.0, 0.95], [0.97, 0.0]])
    assert of_dense(weight).tolist() == [1, 0]


def test_a_chain_is_one_component():
    """Row i may have column i or i + 1: a path through all nodes, whose one best matching takes every second edge."""
    n = 40
    rows, columns = np.repeat(np.arange(n), 2), np.stack([np.arange(n), np.arange(n) + 1], axis=1).ravel()
    weights = np.tile([0.5, 1.0], n)
    assert maximum_weight_matching(rows, columns, weights, n, n + 1).tolist() == list(range(1, n + 1))


@pytest.mark.parametrize("shape", [(0, 0), (3, 2), (0, 5)])
def test_no_edge_no_match(shape):
    none = np.zeros(0, dtype=np.int64)
    assert maximum_weight_matching(none, none, np.zeros(0), *shape).tolist() == [-1] * shape[0]
