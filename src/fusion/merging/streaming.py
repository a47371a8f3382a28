"""Tensors in chunks: what a merge method sees of a tensor, whatever its size, and how chunks are spread over threads.

Chunk boundaries are fixed, sums are taken in chunk order: results do not depend on the number of threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.merging.kernels import Array, histogram, selected, ties

CHUNK = 1 << 16  # scalars: with three models and the pivot, a chunk's float32 rows fit into a core's second-level cache
SPAN = 16  # chunks of one task


@dataclass
class Tensor:
    """One tensor of a merge: `load(start, stop)` gives its rows [1+J, n] float32, the pivot first."""

    name: str
    count: int  # scalars
    models: int  # J
    load: Callable[[int, int], Array]
    granularity: str = "matrix"
    unit: Callable[[str, str], np.ndarray] | None = None  # (statistic, layer_statistic) → E_m of this tensor's unit
    workers: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Array, int], Any]) -> list[Any]:
        """`function(rows, start)` of every chunk, in order."""
        starts = range(0, self.count, CHUNK)

        def span(first: int) -> list[Any]:
            return [function(self.load(s, min(s + CHUNK, self.count)), s) for s in starts[first : first + SPAN]]

        spans = range(0, len(starts), SPAN)
        if self.workers is None or len(spans) == 1:
            return [value for first in spans for value in span(first)]
        return [value for values in self.workers.map(span, spans) for value in values]

    def sum(self, function: Callable[[Array, int], np.ndarray]) -> np.ndarray:
        """Σ over chunks of float64 arrays."""
        total: Any = 0.0
        for value in self.map(function):
            total = total + value
        return total

    def unit_statistic(self, statistic: str, layer_statistic: str) -> np.ndarray:
        """[J] float64: mean Δ² (`square`) or |Δ| (`abs`) over this tensor's unit."""
        if self.unit is None:
            raise RuntimeError(f"{self.name}: no statistics in this merge")
        return self.unit(statistic, layer_statistic)

    def top(
        self, scores: Callable[[Array], Array], sizes: Sequence[Callable[[int, int], int]]
    ) -> Callable[[Array, int], Array]:
        """Marks of the k largest scores of the tensor, exactly; equal ones are taken by position.

        `scores(rows)` gives [S, n] ≥ 0, `sizes[s](n, zeros)` the k of score s. Returns (rows, start) → [S, n] float32.
        """
        lines = range(len(sizes))

        def counted(function: Callable[[int, Array], Any]) -> Callable[[Array, int], np.ndarray]:
            return lambda rows, start: np.stack([function(s, line) for s, line in enumerate(scores(rows))])

        high = self.sum(counted(lambda s, line: np.append(histogram(line, -1), ties(line, 0))))
        wanted = [max(0, size(self.count, int(high[s, -1]))) for s, size in enumerate(sizes)]
        upper, left = zip(*(kth(high[s, :-1], wanted[s]) for s in lines), strict=True)
        low = self.sum(counted(lambda s, line: histogram(line, upper[s])))
        lower, allowed = zip(*(kth(low[s], left[s]) for s in lines), strict=True)
        bounds = [upper[s] << 16 | lower[s] for s in lines]
        allowed = [a if bound else 0 for a, bound in zip(allowed, bounds, strict=True)]  # zeros need no mark
        before = np.zeros((1, len(sizes)), np.int64)
        if any(0 < allowed[s] < low[s][lower[s]] for s in lines):  # the tie is cut: count it chunk by chunk
            equal = np.array(self.map(counted(lambda s, line: ties(line, bounds[s]))))
            before = np.concatenate([before, equal[:-1].cumsum(0)])

        def marks(rows: Array, start: int) -> Array:
            row = before[min(start // CHUNK, len(before) - 1)]
            values = scores(rows)
            out = values * 0
            for s in lines:
                out[s] = selected(values[s], bounds[s], int(allowed[s] - row[s]))
            return out

        return marks


def kth(counts: np.ndarray, k: int) -> tuple[int, int]:
    """(bin, rank in it) of the k-th largest of a histogram, k ≥ 1. For k = 0: above every bin that is filled."""
    from_top = counts[::-1].cumsum()
    if k == 0:
        return 32767, 0
    found = int(np.searchsorted(from_top, k))
    found = min(found, len(counts) - 1)
    return len(counts) - 1 - found, int(k - (from_top[found - 1] if found else 0))
