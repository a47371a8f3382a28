"""Loops over chunks: numba compiles them for numpy arrays, a tensor form stands beside each for the GPU.

Shape legend: J models · n scalars of a chunk. `rows` [1+J, n] float32 holds the pivot (row 0) and the models.
A chunk fits into a core's cache, so a kernel reads memory once, whatever it computes.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

Array = Any  # np.ndarray, or torch.Tensor on a GPU


def by_device(tensor_form: Callable, exact: bool = False) -> Callable:
    """A loop over numpy arrays, compiled; tensors on a GPU go to `tensor_form`, which computes the same.

    Unless `exact`, sums may be taken in another order, which lets them be vectorised.
    """

    def decorate(loop: Callable) -> Callable:
        fast = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=set() if exact else {"reassoc", "nsz"})(
            loop
        )

        @functools.wraps(loop)
        def call(first: Array, *rest: Any) -> Any:
            return fast(first, *rest) if isinstance(first, np.ndarray) else tensor_form(first, *rest)

        return call

    return decorate


# --- storage formats -------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def widen_bfloat16(bits_n: np.ndarray, out_n: np.ndarray) -> bool:
    """bfloat16 is the upper half of a float32. `out_n` is a uint32 view of float32 storage. True: all are finite."""
    highest = np.uint32(0)
    for i in range(bits_n.size):
        wide = np.uint32(bits_n[i]) << np.uint32(16)
        out_n[i] = wide
        highest = max(highest, wide & np.uint32(0x7FFFFFFF))
    return highest < np.uint32(0x7F800000)


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


def _histogram_tensor(scores: Array, upper: int, out: np.ndarray) -> None:
    import torch

    bits = scores.view(torch.int32)
    picked = bits >> 16 if upper < 0 else (bits & 0xFFFF)[bits >> 16 == upper]
    out += torch.bincount(picked, minlength=65536).cpu().numpy()


@by_device(_histogram_tensor)
def histogram(scores: Array, upper: int, out: np.ndarray) -> None:
    """Add to `out` [65536] the counts of upper halves (`upper` < 0), or of lower halves under this upper half."""
    bits = scores.view(np.int32)
    if upper < 0:
        for i in range(bits.size):
            out[bits[i] >> 16] += 1
    else:
        for i in range(bits.size):
            if bits[i] >> 16 == upper:
                out[bits[i] & 0xFFFF] += 1


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
    for i in range(bits.size):
        out[i] = bits[i] > threshold
    if allowance > 0:
        for i in range(bits.size):
            if bits[i] == threshold:
                out[i] = 1
                allowance -= 1
                if allowance == 0:
                    break
    return out


# --- randomness that belongs to an element ---------------------------------------------------------------------------


def _bernoulli_tensor(like: Array, key: int, start: int, density: float, value: float) -> Array:
    import torch

    return torch.from_numpy(bernoulli(np.empty(like.numel(), np.float32), key, start, density, value)).to(like.device)


@by_device(_bernoulli_tensor)
def bernoulli(like: Array, key: int, start: int, density: float, value: float) -> Array:
    """[n] float32: element start+i is `value` with probability `density`, else 0, whatever the chunk it is in.

    The draw is a 64-bit mix (Stafford's variant 13 of the murmur finaliser) of (key, index): the same on every
    machine, for any number of threads, chunks and shards.
    """
    out = np.empty(like.size, np.float32)
    bound = np.uint64(min(density * 4294967296.0, 4294967296.0))
    for i in range(like.size):
        h = np.uint64(key) + np.uint64(start + i) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = value if (h >> np.uint64(32)) < bound else np.float32(0)
    return out


# --- arithmetic ------------------------------------------------------------------------------------------------------
# Everything that is subtracted from an origin is +0 where nothing moved: x − (+0) is x to the bit, also for x = −0.


def _toward_tensor(rows: Array, weights: Array, anchor: int, scale: float) -> Array:
    moved = sum((rows[anchor] - rows[1 + j]) * float(w) for j, w in enumerate(weights))
    return rows[anchor] * float(scale) - (moved + 0.0)


@by_device(_toward_tensor, exact=True)
def toward(rows: Array, weights: Array, anchor: int, scale: float) -> Array:
    """[n]: scale·a − Σ_j w_j (a − θ_j) for a = rows[anchor], weights [J]."""
    n = rows.shape[1]
    out = np.zeros(n, np.float32)
    for j in range(weights.size):
        for i in range(n):
            out[i] += (rows[anchor, i] - rows[1 + j, i]) * weights[j]
    for i in range(n):
        out[i] = rows[anchor, i] * scale - out[i]
    return out


def _thinned_tensor(rows: Array, weights: Array, keep: Array) -> Array:
    return rows[0] - ((rows[0] - rows[1:]) * keep * rows.new_tensor(weights)[:, None]).sum(0)


@by_device(_thinned_tensor, exact=True)
def thinned(rows: Array, weights: Array, keep: Array) -> Array:
    """[n]: θ_0 + Σ_j w_j keep_j Δ_j, weights [J], keep [J, n]."""
    n = rows.shape[1]
    out = np.zeros(n, np.float32)
    for j in range(weights.size):
        for i in range(n):
            out[i] += (rows[0, i] - rows[1 + j, i]) * keep[j, i] * weights[j]
    for i in range(n):
        out[i] = rows[0, i] - out[i]
    return out


def _deltas_tensor(rows: Array, keep: Array | None) -> Array:
    deltas = rows[1:] - rows[0]
    return deltas if keep is None else deltas * keep


@by_device(_deltas_tensor, exact=True)
def deltas(rows: Array, keep: Array | None) -> Array:
    """[J, n]: Δ, or keep·Δ with keep [J, n] or [1, n]."""
    out = np.empty((rows.shape[0] - 1, rows.shape[1]), np.float32)
    for j in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[j, i] = rows[1 + j, i] - rows[0, i]
        if keep is not None:
            line = min(j, keep.shape[0] - 1)
            for i in range(out.shape[1]):
                out[j, i] *= keep[line, i]
    return out


def _magnitude_tensor(rows: Array, model: int) -> Array:
    return (rows[1 + model] - rows[0]).abs()


@by_device(_magnitude_tensor, exact=True)
def magnitude(rows: Array, model: int) -> Array:
    """[n]: |Δ| of one model."""
    out = np.empty(rows.shape[1], np.float32)
    for i in range(out.size):
        out[i] = abs(rows[1 + model, i] - rows[0, i])
    return out


def _spread_tensor(rows: Array) -> Array:
    moved = rows[1:] - rows[0]
    return (moved - moved.mean(0)).square().mean(0)


@by_device(_spread_tensor, exact=True)
def spread(rows: Array) -> Array:
    """[n]: population variance of the deltas over the models."""
    count, n = np.float32(rows.shape[0] - 1), rows.shape[1]
    mean, out = np.zeros(n, np.float32), np.zeros(n, np.float32)
    for j in range(1, rows.shape[0]):
        for i in range(n):
            mean[i] += (rows[j, i] - rows[0, i]) / count
    for j in range(1, rows.shape[0]):
        for i in range(n):
            away = rows[j, i] - rows[0, i] - mean[i]
            out[i] += away * away / count
    return out


def _elect_tensor(
    base: Array, moved: Array, weights: Array, ballot: int, normalize: bool, scale: float, floor: float
) -> Array:
    weighted = moved * moved.new_tensor(weights)[:, None]
    tally = (moved, weighted, weighted.sign())[ballot].sum(0)
    agrees = ((weighted > 0) & (tally >= 0)) | ((weighted < 0) & (tally < 0))
    out = -(weighted * agrees).sum(0)
    if normalize:
        total = (agrees * moved.new_tensor(weights)[:, None]).sum(0)
        out = out / total.where(total != 0, total + 1).clamp(min=float(floor))
    return base - (out * float(scale) + 0.0)


@by_device(_elect_tensor, exact=True)
def elect(base: Array, moved: Array, weights: Array, ballot: int, normalize: bool, scale: float, floor: float) -> Array:
    """[n]: θ_0 + λ Σ w T E / Σ w E with T = `moved` [J, n] and E the scalars whose sign agrees with the vote.

    `ballot`: 0 the sign of Σ T, 1 of Σ w T, 2 of Σ sign(w T); a sum of 0 counts as positive.
    """
    n, zero = base.size, np.float32(0)
    tally, total, out = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
    for j in range(weights.size):
        w = weights[j]
        if ballot == 0:
            for i in range(n):
                tally[i] += moved[j, i]
        elif ballot == 1:
            for i in range(n):
                tally[i] += moved[j, i] * w
        else:
            for i in range(n):
                tally[i] += np.float32(moved[j, i] * w > 0) - np.float32(moved[j, i] * w < 0)
    for j in range(weights.size):
        w = weights[j]
        for i in range(n):
            part = moved[j, i] * w
            agrees = (part > 0) & (tally[i] >= 0) | (part < 0) & (tally[i] < 0)
            out[i] -= part if agrees else zero
            total[i] += w if agrees else zero
    for i in range(n):
        divisor = np.float32(1)
        if normalize and total[i] != 0:
            divisor = max(total[i], floor) if floor > 0 else total[i]
        out[i] = base[i] - (out[i] / divisor * scale + zero)
    return out


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _added(values: np.ndarray) -> float:
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i])
    return total


def _by_parameter_tensor(rows: Array, square: bool, softmax: bool) -> tuple[Array, np.ndarray]:
    sizes = (rows[1:] - rows[0]).abs()
    if softmax:
        shares = (sizes.square() if square else sizes).softmax(0)
    else:
        shares = sizes / sizes.amax(0).where(sizes.amax(0) > 0, sizes.new_ones(()))
        shares = shares.square() if square else shares
        total = shares.sum(0)
        shares = (shares + (total == 0)) / (total + (total == 0) * float(len(shares)))
    return rows[0] - ((rows[0] - rows[1:]) * shares).sum(0), shares.double().sum(1).cpu().numpy()


@by_device(_by_parameter_tensor, exact=True)
def by_parameter(rows: Array, square: bool, softmax: bool) -> tuple[Array, Array]:
    """([n], [J]): Σ_j W_j θ_j with a weight per scalar, and the sums of these weights in float64.

    |Δ| is scaled by its largest before it is squared: the square of a small bfloat16 movement may underflow.
    """
    count, n = rows.shape[0] - 1, rows.shape[1]
    top, total, out = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)
    shares, tally = np.empty((count, n), np.float32), np.zeros(count)
    for j in range(count):
        for i in range(n):
            size = abs(rows[1 + j, i] - rows[0, i])
            shares[j, i] = size * size if square and softmax else size
            top[i] = max(top[i], shares[j, i])
    for j in range(count):
        if softmax:
            for i in range(n):
                shares[j, i] = np.exp(shares[j, i] - top[i])
                total[i] += shares[j, i]
        else:
            for i in range(n):
                share = shares[j, i] / top[i] if top[i] > 0 else np.float32(0)
                shares[j, i] = share * share if square else share
                total[i] += shares[j, i]
    for i in range(n):
        total[i] = np.float32(1) / total[i] if total[i] > 0 else np.float32(0)
    even = np.float32(1) / np.float32(count)
    for j in range(count):
        for i in range(n):
            shares[j, i] = shares[j, i] * total[i] if total[i] > 0 else even
            out[i] += (rows[0, i] - rows[1 + j, i]) * shares[j, i]
        tally[j] = _added(shares[j])
    for i in range(n):
        out[i] = rows[0, i] - out[i]
    return out, tally
