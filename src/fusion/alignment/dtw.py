"""Dynamic time warping of two token sequences (FuseLLM §3.2, eq. 3), exact.

    D[i, j] = cost(i, j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1]),  D[0, 0] = cost(0, 0)

i runs over the source, j over the target; `cost` is the Levenshtein distance of the two tokens. Walking back, ties are
broken in the order diagonal, source-1, target-1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist


class TokenAlignment(NamedTuple):
    """`target_to_source[i]`: the source positions matched with target position i, ascending."""

    cost: float
    target_to_source: list[list[int]]


def align_tokens(source: Sequence[str], target: Sequence[str]) -> TokenAlignment:
    """DTW over the strings (or bytes) as they are given: complete, monotone, of least total edit distance.

    Empty input on either side gives an empty alignment of cost 0.
    """
    known: dict = {}
    s, t = (np.array([known.setdefault(x, len(known)) for x in side], np.int64) for side in (source, target))
    cost, path = warp(s, t, list(known))
    matched: list[list[int]] = [[] for _ in target]
    for i, j in path:
        matched[j].append(int(i))
    return TokenAlignment(float(cost), matched)


def warp(source: np.ndarray, target: np.ndarray, strings: Sequence) -> tuple[int, np.ndarray]:
    """(total cost, path int32[P, 2] of (source, target) positions in ascending order); rows index `strings`."""
    if not len(source) or not len(target):
        return 0, np.zeros((0, 2), np.int32)
    kinds_s, s = np.unique(source, return_inverse=True)
    kinds_t, t = np.unique(target, return_inverse=True)
    costs = cdist(
        [strings[k] for k in kinds_s], [strings[k] for k in kinds_t], scorer=Levenshtein.distance, dtype=np.int32
    )
    return _full(s, t, costs)


@njit(cache=True)
def _full(s, t, costs):
    n, m = len(s), len(t)
    moves = np.zeros((n, m), np.uint8)
    row = np.zeros(m, np.int64)
    for i in range(n):
        diagonal = row[0]
        row[0] = (row[0] if i else 0) + costs[s[i], t[0]]
        moves[i, 0] = 1
        for j in range(1, m):
            up = row[j]
            if i == 0:
                best, move = row[j - 1], 2
            else:
                best, move = diagonal, 0
                if up < best:
                    best, move = up, 1
                if row[j - 1] < best:
                    best, move = row[j - 1], 2
            diagonal = up
            row[j] = best + costs[s[i], t[j]]
            moves[i, j] = move
    path = np.zeros((n + m - 1, 2), np.int32)
    i, j, k = n - 1, m - 1, n + m - 2
    path[k, 0], path[k, 1] = i, j
    while i > 0 or j > 0:
        move = moves[i, j]
        if move != 2:
            i -= 1
        if move != 1:
            j -= 1
        k -= 1
        path[k, 0], path[k, 1] = i, j
    return row[m - 1], path[k:]
