"""Mapping statistics (FuseChat §3.2): how often each source token was aligned with each target token, sparse."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file


class Statistics:
    """Counts of (source id, target id). Adding pairs is cheap; `a + b` merges ranks and shards, in any order."""

    def __init__(self, pairs: NDArray[np.uint64] | None = None, counts: NDArray[np.int64] | None = None):
        self._pairs = np.zeros(0, np.uint64) if pairs is None else pairs
        self._counts = np.zeros(0, np.int64) if counts is None else counts
        self._new: list[NDArray[np.uint64]] = []
        self._waiting = 0

    def add(self, sources: NDArray, targets: NDArray) -> None:
        """Count aligned pairs of ids, two arrays of one length."""
        self._new.append((sources.astype(np.uint64) << np.uint64(32)) | targets.astype(np.uint64))
        self._waiting += len(sources)
        if self._waiting > 1 << 20:
            self._compact()

    def _compact(self) -> None:
        if self._new:
            pairs, counts = np.unique(np.concatenate(self._new), return_counts=True)
            self._new, self._waiting = [], 0
            self._pairs, self._counts = _merge(self._pairs, self._counts, pairs, counts.astype(np.int64))

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(source ids, target ids, counts), sorted by source, then target."""
        self._compact()
        low = np.uint64(0xFFFFFFFF)
        return (self._pairs >> np.uint64(32)).astype(np.int64), (self._pairs & low).astype(np.int64), self._counts

    def __add__(self, other: "Statistics") -> "Statistics":
        self._compact()
        other._compact()
        return Statistics(*_merge(self._pairs, self._counts, other._pairs, other._counts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statistics) and all(
            np.array_equal(a, b) for a, b in zip(self.rows(), other.rows(), strict=True)
        )

    __hash__ = None

    def __len__(self) -> int:
        self._compact()
        return len(self._pairs)

    def save(self, path: Path) -> None:
        self._compact()
        save_file({"pairs": self._pairs, "counts": self._counts}, path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        held = load_file(path)
        return cls(held["pairs"], held["counts"])


def _merge(pairs_a, counts_a, pairs_b, counts_b):
    pairs, where = np.unique(np.concatenate([pairs_a, pairs_b]), return_inverse=True)
    counts = np.zeros(len(pairs), np.int64)
    np.add.at(counts, where, np.concatenate([counts_a, counts_b]))
    return pairs, counts
