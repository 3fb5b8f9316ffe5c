"""Maximum-weight matching of a sparse bipartite graph, exact."""

from collections.abc import Iterator

import numpy as np


def maximum_weight_matching(
    rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, n_rows: int, n_columns: int
) -> np.ndarray:
    """The column of each row, int64 [n_rows], -1 for none, in a matching of the greatest total weight.

    Edge e joins rows[e] to columns[e] with weights[e] > 0; no pair occurs twice. Each connected component is one dense
    assignment problem in which a pair without an edge weighs 0: memory and time are those of the largest component.
    """
    matched = np.full(n_rows, -1, dtype=np.int64)
    for edges in _components(rows, columns, n_rows, n_columns):
        ours, row = np.unique(rows[edges], return_inverse=True)
        theirs, column = np.unique(columns[edges], return_inverse=True)
        weight = np.zeros((len(ours), len(theirs)))
        weight[row, column] = weights[edges]
        if len(ours) <= len(theirs):
            chosen = np.arange(len(ours)), assignment(-weight)
        else:
            chosen = assignment(-weight.T), np.arange(len(theirs))
        real = weight[chosen] > 0
        matched[ours[chosen[0][real]]] = theirs[chosen[1][real]]
    return matched


def assignment(cost: np.ndarray) -> np.ndarray:
    """A column of its own for each row of cost [n, m], n <= m, of the least total cost: int64 [n].

    The Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987; in the form of Crouse 2016, "On
    implementing 2D rectangular assignment algorithms"): n searches of at most n rounds, each of m operations in numpy.
    """
    n, m = cost.shape
    row_price, column_price = np.zeros(n), np.zeros(m)
    column_of, row_of = np.full(n, -1, dtype=np.int64), np.full(m, -1, dtype=np.int64)
    for start in range(n):
        distance, came_from = np.full(m, np.inf), np.full(m, -1, dtype=np.int64)
        reached = np.zeros(m, dtype=bool)
        visited, row, so_far = [], start, 0.0
        while True:
            visited.append(row)
            through_row = so_far + cost[row] - row_price[row] - column_price
            shorter = ~reached & (through_row < distance)
            distance[shorter], came_from[shorter] = through_row[shorter], row
            column = int(np.where(reached, np.inf, distance).argmin())
            so_far = distance[column]
            reached[column] = True
            if row_of[column] < 0:
                break
            row = row_of[column]
        row_price[start] += so_far
        others = visited[1:]
        row_price[others] += so_far - distance[column_of[others]]
        column_price[reached] -= so_far - distance[reached]
        while column >= 0:
            row = came_from[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return column_of


def _components(rows: np.ndarray, columns: np.ndarray, n_rows: int, n_columns: int) -> Iterator[np.ndarray]:
    """The edges of each connected component, as places in `rows` and `columns`."""
    if len(rows) == 0:
        return
    ends = np.stack([rows, columns + n_rows])
    label, previous = np.arange(n_rows + n_columns), None
    while previous is None or (label != previous).any():
        previous = label.copy()
        least = label[ends].min(axis=0)
        for end in ends:
            np.minimum.at(label, end, least)
        # A label is a node of the same component: its own label is as good and may be lower.
        label = label[label]
    of_edge = label[rows]
    order = of_edge.argsort(kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(of_edge[order])) + 1)
