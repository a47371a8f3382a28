"""Dynamic time warping of two token sequences (FuseLLM §3.2, eq. 3), exact.

    D[i, j] = cost(i, j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1]),  D[0, 0] = cost(0, 0)

i runs over the source, j over the target; `cost` is the Levenshtein distance of the two tokens. Walking back, ties are
broken in the order diagonal, source-1, target-1.

How it is fast and still exact: the edit distances are computed in a narrow band around the diagonal of equal text only.
Every other cell takes a lower bound that costs nothing (0 for equal tokens, else max(1, difference of lengths)), and
the recurrence runs over the whole grid, one anti-diagonal at a time, in SIMD. Its D never exceeds the true one. If the
path walked back from the end stays inside the band, its cost is true, hence no other path can be cheaper; and where it
met a tie, the true D of the other choice is no less than its bound, so the tie rule would have chosen the same. If the
path leaves the band, the band is widened. Memory is O(band), time O(source · target) at about 0.4 ns a cell.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fusion.alignment.edit import Strings, close_masks, distance, open_masks, pack

log = logging.getLogger(__name__)

BAND = 8  # tokens on each side of the diagonal, at first
CELLS = 1 << 26  # a grid of at most so many is always solved exactly; a larger one if a band of 1/16 of it is enough
PROVABLE = 1 << 30  # cells of the largest grid of which a proof is tried: half a second


class TokenAlignment(NamedTuple):
    """`target_to_source[i]`: the source positions matched with target position i, ascending."""

    cost: float
    target_to_source: list[list[int]]


def align_tokens(source: Sequence[str], target: Sequence[str]) -> TokenAlignment:
    """DTW over the strings (or bytes) as they are given: complete, monotone, of least total edit distance.

    Empty input on either side gives an empty alignment of cost 0.
    """
    known: dict = {}
    s, t = (np.array([known.setdefault(x, len(known)) for x in side], np.int32) for side in (source, target))
    cost, path = warp(s, t, pack(known))
    matched: list[list[int]] = [[] for _ in target]
    for i, j in path.tolist():
        matched[j].append(i)
    return TokenAlignment(float(cost), matched)


def warp(source: NDArray, target: NDArray, strings: Strings, *, band: int = BAND) -> tuple[int, NDArray[np.int32]]:
    """(total cost, path int32[P, 2] of (source, target) positions, ascending); the rows index `strings`.

    Exact for every grid of up to `CELLS` cells (8,192 × 8,192), and up to `PROVABLE` (32,768 × 32,768) unless a band
    of `CELLS` / 16 cells proves nothing. Otherwise the best path inside a band is returned, and a warning says so.
    """
    n, m = len(source), len(target)
    if not n or not m:
        return 0, np.zeros((0, 2), np.int32)
    source, target = np.ascontiguousarray(source, np.int32), np.ascontiguousarray(target, np.int32)
    lengths = strings.lengths
    s_length, t_length = lengths[source], lengths[target]
    # every cell costs at most the longer string, a path has at most n + m cells: float32 counts exactly to 2^24
    most = (n + m) * int(max(s_length.max(), t_length.max()))
    real = np.float32 if most < 1 << 24 else np.float64
    s_real, t_real = s_length.astype(real), t_length.astype(real)
    inside = n * m > PROVABLE
    band = max(band, 64) if inside else band
    while True:
        low, high = _band(s_length, t_length, band)
        starts = np.zeros(n + 1, np.int64)
        np.cumsum(high - low + 1, out=starts[1:])
        costs = _distances(source, target, *strings, low, high, starts)
        total, path = _warp(source, target, s_real, t_real, low, high, starts, costs, inside)
        if inside:
            log.warning("%d × %d tokens: the path is the best within %d cells, not proven the best", n, m, starts[-1])
        if len(path):
            return int(total), path
        inside = n * m > CELLS and starts[-1] > CELLS >> 4
        band = band if inside else 2 * band + 8


@njit(cache=True)
def _band(s_length, t_length, width):
    """Columns low[i]..high[i] of row i: those whose text overlaps row i's, and `width` more on each side."""
    n, m = len(s_length), len(t_length)
    low, high = np.empty(n, np.int64), np.empty(n, np.int64)
    # a token counts one more than its length, so that empty tokens keep the diagonal moving
    scale = (t_length.sum() + m) / (s_length.sum() + n)
    begin, first, first_end = 0.0, 0, t_length[0] + 1.0
    last, last_end = 0, t_length[0] + 1.0
    for i in range(n):
        end = begin + (s_length[i] + 1) * scale
        while first < m - 1 and first_end <= begin:
            first += 1
            first_end += t_length[first] + 1
        while last < m - 1 and last_end < end:
            last += 1
            last_end += t_length[last] + 1
        low[i], high[i] = max(first - width, 0), min(last + width, m - 1)
        begin = end
    low[0], high[n - 1] = 0, m - 1
    for i in range(1, n):  # no gap, whatever rounding did
        low[i] = min(low[i], high[i - 1] + 1)
    return low, high


@njit(cache=True)
def _distances(source, target, codes, offsets, alphabet, low, high, starts):
    """uint16: Levenshtein distance of every cell of the band."""
    out = np.empty(starts[-1], np.uint16)
    masks, spare = np.zeros(alphabet, np.uint64), np.zeros(alphabet, np.uint64)
    for i in range(len(source)):
        s, s_end = offsets[source[i]], offsets[source[i] + 1]
        open_masks(masks, codes, s, s_end)
        for j in range(low[i], high[i] + 1):
            found = 0
            if source[i] != target[j]:
                found = distance(codes, s, s_end, offsets[target[j]], offsets[target[j] + 1], masks, spare)
            out[starts[i] + j - low[i]] = found
        close_masks(masks, codes, s, s_end)
    return out


@njit(cache=True)
def _warp(source, target, s_length, t_length, low, high, starts, costs, inside):
    """(D of the last cell, path); the path is empty where it would leave the band. `inside`: nothing outside exists."""
    n, m = len(source), len(target)
    inf = s_length.dtype.type(np.inf)
    one, zero = s_length.dtype.type(1), s_length.dtype.type(0)
    t_back, t_length_back = target[::-1].copy(), t_length[::-1].copy()
    moves = np.empty(starts[-1], np.uint8)
    # three anti-diagonals, indexed by i + 1
    before = np.full(n + 1, inf, s_length.dtype)
    last = np.full(n + 1, inf, s_length.dtype)
    now = np.full(n + 1, inf, s_length.dtype)
    first_in, end_in = 0, 0
    for d in range(n + m - 1):
        first, end = max(0, d - m + 1), min(n, d + 1)
        while end_in < n and end_in + low[end_in] <= d:
            end_in += 1
        while first_in < n and first_in + high[first_in] < d:
            first_in += 1
        if not inside:
            for part in range(2):
                a, b = (first, min(first_in, end)) if part == 0 else (max(end_in, first), end)
                if b > a:
                    shift = m - 1 - d
                    _outside(
                        source[a:b],
                        t_back[a + shift : b + shift],
                        s_length[a:b],
                        t_length_back[a + shift : b + shift],
                        before[a:b],
                        last[a:b],
                        last[a + 1 : b + 1],
                        now[a + 1 : b + 1],
                        one,
                        zero,
                    )
        for i in range(max(first, first_in), min(end, end_in)):
            cell = starts[i] + d - i - low[i]
            best, move = before[i], 0
            if last[i] < best:
                best, move = last[i], 1
            if last[i + 1] < best:
                best, move = last[i + 1], 2
            if d == 0:
                best = zero
            now[i + 1] = best + s_length.dtype.type(costs[cell])
            moves[cell] = move
        if inside:  # cells beside the band hold an older anti-diagonal
            if max(first, first_in) >= 1:
                now[max(first, first_in)] = inf
            if min(end, end_in) + 1 <= n:
                now[min(end, end_in) + 1] = inf
        if first == 0:
            now[0] = inf
        elif first < n:
            now[first] = inf
        before, last, now = last, now, before
    total = last[n]
    path = np.empty((n + m - 1, 2), np.int32)
    i, j, k = n - 1, m - 1, n + m - 2
    path[k, 0], path[k, 1] = i, j
    while i > 0 or j > 0:
        move = moves[starts[i] + j - low[i]]
        if move != 2:
            i -= 1
        if move != 1:
            j -= 1
        if i < 0 or j < low[i] or j > high[i]:
            return total, path[:0]
        k -= 1
        path[k, 0], path[k, 1] = i, j
    return total, path[k:]


@njit(cache=True)
def _outside(source, target, s_length, t_length, before, last_up, last_left, now, one, zero):
    for k in range(len(now)):
        apart = abs(s_length[k] - t_length[k])
        apart = apart if apart > one else one
        apart = zero if source[k] == target[k] else apart
        best = before[k] if before[k] < last_up[k] else last_up[k]
        best = best if best < last_left[k] else last_left[k]
        now[k] = apart + best
