"""Tensors in chunks: what a merge method sees of a tensor, whatever its size, and how chunks are spread over threads.

Chunk boundaries are fixed, sums are taken in chunk order: results do not depend on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.merging.kernels import Array, histogram, selected, ties

CHUNK = 1 << 16  # scalars: with three models and the pivot, a chunk's float32 rows fit into a core's second-level cache
SPAN = 16  # chunks of one task
AHEAD = 16  # tasks of a tensor that are under way or wait for their turn


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

    def spans(self, task: Callable[[Iterable[tuple[Array, int]]], Any]) -> Iterator[Any]:
        """`task(chunks)` of every span in order, where chunks yields (rows, start); a bounded number runs ahead."""
        starts = range(0, self.count, CHUNK)

        def one(first: int) -> Any:
            return task((self.load(s, min(s + CHUNK, self.count)), s) for s in starts[first : first + SPAN])

        firsts = range(0, len(starts), SPAN)
        if self.workers is None or len(firsts) == 1:
            yield from map(one, firsts)
            return
        waiting: deque[Future] = deque()
        for first in firsts:
            waiting.append(self.workers.submit(one, first))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def map(self, function: Callable[[Array, int], Any]) -> list[Any]:
        """`function(rows, start)` of every chunk, in order."""
        spans = self.spans(lambda chunks: [function(rows, start) for rows, start in chunks])
        return [value for values in spans for value in values]

    def sum(self, function: Callable[[Array, int], np.ndarray]) -> np.ndarray:
        """Σ over chunks of float64 arrays."""
        return sum(self.spans(lambda chunks: sum(function(rows, start) for rows, start in chunks)), np.float64(0))

    def unit_statistic(self, statistic: str, layer_statistic: str) -> np.ndarray:
        """[J] float64: mean Δ² (`square`) or |Δ| (`abs`) over this tensor's unit."""
        if self.unit is None:
            raise RuntimeError(f"{self.name}: no statistics in this merge")
        return self.unit(statistic, layer_statistic)

    def top(
        self, scores: Callable[[Array], list[Array]], sizes: Sequence[Callable[[int, int], int]], zeros: bool = False
    ) -> Callable[[Array, int], Array]:
        """Marks of the k largest scores of the tensor, exactly; equal ones are taken by position.

        `scores(rows)` gives S times [n] ≥ 0, `sizes[s](n, zeros)` the k of score s; scores of 0 are counted if `zeros`
        (else −1 is given). Returns (rows, start) → [S, n] float32 of 0 and 1.
        """
        lines = range(len(sizes))

        def histograms(uppers: Sequence[int]) -> np.ndarray:
            def task(chunks: Iterable[tuple[Array, int]]) -> np.ndarray:
                out = np.zeros((len(sizes), 65536), np.int64)
                for rows, _ in chunks:
                    for s, line in enumerate(scores(rows)):
                        histogram(line, uppers[s], out[s])
                return out

            return sum(self.spans(task))

        def equal(values: Sequence[int]) -> list[list[int]]:
            return self.map(lambda rows, start: [ties(line, values[s]) for s, line in enumerate(scores(rows))])

        none = np.sum(equal([0] * len(sizes)), axis=0) if zeros else [-1] * len(sizes)
        high = histograms([-1] * len(sizes))
        wanted = [max(0, size(self.count, int(z))) for size, z in zip(sizes, none, strict=True)]
        upper, left = zip(*(kth(high[s], wanted[s]) for s in lines), strict=True)
        low = histograms(upper)
        lower, allowed = zip(*(kth(low[s], left[s]) for s in lines), strict=True)
        bounds = [upper[s] << 16 | lower[s] for s in lines]
        allowed = [a if bound else 0 for a, bound in zip(allowed, bounds, strict=True)]  # zeros need no mark
        before = np.zeros((1, len(sizes)), np.int64)
        if any(0 < allowed[s] < low[s][lower[s]] for s in lines):  # the tie is cut: count it chunk by chunk
            before = np.concatenate([before, np.array(equal(bounds))[:-1].cumsum(0)])

        def marks(rows: Array, start: int) -> Array:
            row = before[min(start // CHUNK, len(before) - 1)]
            allowances = [int(a - b) for a, b in zip(allowed, row, strict=True)]
            return stack([selected(v, *limit) for v, *limit in zip(scores(rows), bounds, allowances, strict=True)])

        return marks


def stack(arrays: list[Array]) -> Array:
    if isinstance(arrays[0], np.ndarray):
        return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
    import torch

    return torch.stack(arrays)


def kth(counts: np.ndarray, k: int) -> tuple[int, int]:
    """(bin, rank in it) of the k-th largest of a histogram, k ≥ 1. For k = 0: above every bin that is filled."""
    from_top = counts[::-1].cumsum()
    if k == 0:
        return 32767, 0
    found = int(np.searchsorted(from_top, k))
    found = min(found, len(counts) - 1)
    return len(counts) - 1 - found, int(k - (from_top[found - 1] if found else 0))
