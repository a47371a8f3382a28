"""Array functions of merging, written once: numba compiles them for numpy arrays, torch runs them on a GPU.

Shape legend: J models · n scalars of a chunk. `rows` [1+J, n] float32 holds the pivot (row 0) and the models.
A chunk fits into a core's cache, so a kernel reads memory once, whatever it computes.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

Array = Any  # np.ndarray, or torch.Tensor on a GPU


def compiled(function: Callable) -> Callable:
    """`function` through numba for numpy arrays, as it stands for tensors: one source for both."""
    fast = numba.njit(nogil=True, cache=True)(function)

    @functools.wraps(function)
    def call(first: Array, *rest: Any) -> Any:
        return fast(first, *rest) if isinstance(first, np.ndarray) else function(first, *rest)

    return call


def by_device(tensor_form: Callable) -> Callable:
    """Like `compiled`, for a loop that tensors need written differently (`tensor_form`)."""

    def decorate(loop: Callable) -> Callable:
        fast = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})(loop)  # sums may be vectorised

        @functools.wraps(loop)
        def call(first: Array, *rest: Any) -> Any:
            return fast(first, *rest) if isinstance(first, np.ndarray) else tensor_form(first, *rest)

        return call

    return decorate


# --- storage formats -------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def widen_bfloat16(bits_n: np.ndarray, out_n: np.ndarray) -> None:
    """bfloat16 is the upper half of a float32. `out_n` is a uint32 view of float32 storage."""
    for i in range(bits_n.size):
        out_n[i] = np.uint32(bits_n[i]) << np.uint32(16)


@numba.njit(nogil=True, cache=True)
def narrow_bfloat16(bits_n: np.ndarray, out_n: np.ndarray) -> None:
    """float32 (as uint32) to bfloat16, to the nearest, ties to even, as torch rounds. NaN never gets here."""
    for i in range(bits_n.size):
        b = bits_n[i]
        out_n[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(nogil=True, cache=True)
def finite(bits_n: np.ndarray) -> bool:
    """No infinity and no NaN: no exponent of all ones. `bits_n` is a uint32 view of float32 values."""
    highest = np.uint32(0)
    for i in range(bits_n.size):
        highest = max(highest, bits_n[i] & np.uint32(0x7FFFFFFF))
    return highest < np.uint32(0x7F800000)


# --- sums, in float64 ------------------------------------------------------------------------------------------------


def _products_tensor(rows: Array) -> Array:
    wide = rows.double()
    return (wide @ wide.T).cpu().numpy()


@by_device(_products_tensor)
def products(rows: Array) -> Array:
    """[1+J, 1+J] float64: the inner products of the rows."""
    k, n = rows.shape
    out = np.zeros((k, k))
    for a in range(k):
        for b in range(a, k):
            total = 0.0
            for i in range(n):
                total += np.float64(rows[a, i]) * np.float64(rows[b, i])
            out[a, b] = out[b, a] = total
    return out


def _sums_tensor(values: Array, square: bool) -> Array:
    wide = values.double()
    return (wide.square() if square else wide.abs()).sum(1).cpu().numpy()


@by_device(_sums_tensor)
def sums(values: Array, square: bool) -> Array:
    """[J] float64: Σ x² or Σ |x| of every row of [J, n]."""
    k, n = values.shape
    out = np.zeros(k)
    for j in range(k):
        total = 0.0
        for i in range(n):
            value = np.float64(values[j, i])
            total += value * value if square else abs(value)
        out[j] = total
    return out


# --- the largest k, exactly, without sorting -------------------------------------------------------------------------
# The bits of a non-negative float32 order like its value. A histogram of their upper half finds the half in which the
# k-th largest lies, one of the lower half finds it: two passes over the data, 65,536 counters.


def _histogram_tensor(scores: Array, upper: int) -> Array:
    import torch

    bits = scores.view(torch.int32)
    picked = bits >> 16 if upper < 0 else (bits & 0xFFFF)[bits >> 16 == upper]
    return torch.bincount(picked, minlength=65536).cpu().numpy()


@by_device(_histogram_tensor)
def histogram(scores: Array, upper: int) -> Array:
    """[65536] counts of the upper halves (`upper` < 0), or of the lower halves of those with this upper half."""
    out = np.zeros(65536, np.int64)
    bits = scores.view(np.int32)
    if upper < 0:
        for i in range(bits.size):
            out[bits[i] >> 16] += 1
    else:
        for i in range(bits.size):
            if bits[i] >> 16 == upper:
                out[bits[i] & 0xFFFF] += 1
    return out


def _ties_tensor(scores: Array, threshold: int) -> int:
    import torch

    return int((scores.view(torch.int32) == threshold).sum())


@by_device(_ties_tensor)
def ties(scores: Array, threshold: int) -> int:
    """How many scores have exactly these bits."""
    total = 0
    bits = scores.view(np.int32)
    for i in range(bits.size):
        total += bits[i] == threshold
    return total


def _selected_tensor(scores: Array, threshold: int, allowance: int) -> Array:
    import torch

    bits = scores.view(torch.int32)
    tied = bits == threshold
    return ((bits > threshold) | (tied & (tied.cumsum(0) <= allowance))).float()


@by_device(_selected_tensor)
def selected(scores: Array, threshold: int, allowance: int) -> Array:
    """[n] float32, 1 above the threshold and for the first `allowance` scores equal to it, else 0."""
    bits = scores.view(np.int32)
    out = np.empty(bits.size, np.float32)
    if allowance <= 0:
        for i in range(bits.size):
            out[i] = bits[i] > threshold
    else:
        for i in range(bits.size):
            tied = bits[i] == threshold
            out[i] = bits[i] > threshold or (tied and allowance > 0)
            allowance -= tied
    return out


# --- randomness that belongs to an element ---------------------------------------------------------------------------


def _bernoulli_tensor(like: Array, key: int, start: int, density: float) -> Array:
    import torch

    return torch.from_numpy(bernoulli(np.empty(like.numel(), np.float32), key, start, density)).to(like.device)


@by_device(_bernoulli_tensor)
def bernoulli(like: Array, key: int, start: int, density: float) -> Array:
    """[n] float32 of 0 and 1: element start+i is 1 with probability `density`, whatever the chunk it is in.

    The draw is a 64-bit mix (Stafford's variant 13 of the murmur finaliser) of (key, index): the same on every
    machine, for any number of threads, chunks and shards.
    """
    out = np.empty(like.size, np.float32)
    bound = np.uint64(min(density * 4294967296.0, 4294967296.0))
    for i in range(like.size):
        h = np.uint64(key) + np.uint64(start + i) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = (h >> np.uint64(32)) < bound
    return out
