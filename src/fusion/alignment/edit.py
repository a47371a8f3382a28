"""Levenshtein distance in compiled loops: bit-parallel (Myers 1999, in Hyyrö's form) up to 64 characters."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

WORD = 64


class Strings(NamedTuple):
    """String k is `codes[offsets[k] : offsets[k + 1]]`; the codes run from 0 to `alphabet` - 1."""

    codes: NDArray[np.int32]
    offsets: NDArray[np.int64]
    alphabet: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


def pack(strings: Iterable[str | bytes]) -> Strings:
    """Strings or bytes as arrays; equal characters get equal codes. Distances count characters, or bytes."""
    alphabet: dict = {}
    codes: list[int] = []
    ends = [0]
    for string in strings:
        codes += [alphabet.setdefault(c, len(alphabet)) for c in string]
        ends.append(len(codes))
    return Strings(np.array(codes, np.int32), np.array(ends, np.int64), max(len(alphabet), 1))


# The loops below take (codes, begin, end), not slices: a slice costs more than a short token's distance.


@njit(cache=True, inline="always")
def open_masks(masks, codes, begin, end):
    """Let `masks` stand for the pattern `codes[begin:end]`; `close_masks` undoes it."""
    if end - begin <= WORD:
        for k in range(begin, end):
            masks[codes[k]] |= np.uint64(1) << np.uint64(k - begin)


@njit(cache=True, inline="always")
def close_masks(masks, codes, begin, end):
    for k in range(begin, end):
        masks[codes[k]] = np.uint64(0)


@njit(cache=True, inline="always")
def distance(codes, s, s_end, t, t_end, masks, spare):
    """Levenshtein distance of two strings; `masks` is open for the first, `spare` are masks that are all zero."""
    if 0 < s_end - s <= WORD and t_end > t:
        return _myers(masks, s_end - s, codes, t, t_end)
    return _other(codes, s, s_end, t, t_end, spare)


@njit(cache=True)
def _other(codes, s, s_end, t, t_end, spare):
    if s == s_end or t == t_end:
        return max(s_end - s, t_end - t)
    if t_end - t <= WORD:
        open_masks(spare, codes, t, t_end)
        found = _myers(spare, t_end - t, codes, s, s_end)
        close_masks(spare, codes, t, t_end)
        return found
    row = np.arange(t_end - t + 1)
    for a in range(s, s_end):
        diagonal, row[0] = row[0], a - s + 1
        for b in range(t_end - t):
            above = row[b + 1]
            row[b + 1] = min(min(above, row[b]) + 1, diagonal + (0 if codes[a] == codes[t + b] else 1))
            diagonal = above
    return row[-1]


@njit(cache=True, inline="always")
def _myers(masks, length, codes, begin, end):
    one, zero = np.uint64(1), np.uint64(0)
    top = np.uint64(length - 1)
    plus, minus, score = ~zero, zero, length
    for c in range(begin, end):
        match = masks[codes[c]]
        across = (((match & plus) + plus) ^ plus) | match | minus
        up = minus | ~(across | plus)
        down = plus & across
        score += np.int64((up >> top) & one) - np.int64((down >> top) & one)
        up = (up << one) | one
        plus = (down << one) | ~(across | up)
        minus = up & across
    return score


@njit(cache=True)
def _signatures(codes, offsets, alphabet):
    """uint64 per string: a bit for every (character, occurrence), folded onto 64."""
    out = np.zeros(len(offsets) - 1, np.uint64)
    seen = np.zeros(alphabet, np.int64)
    for n in range(len(out)):
        for k in range(offsets[n], offsets[n + 1]):
            c = codes[k]
            out[n] |= np.uint64(1) << np.uint64((c * 37 + seen[c] * 11) % 64)
            seen[c] += 1
        for k in range(offsets[n], offsets[n + 1]):
            seen[codes[k]] = 0
    return out


@njit(cache=True)
def _ones(x):
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


def nearest(sources: NDArray, candidates: NDArray, strings: Strings) -> NDArray[np.int32]:
    """For each string in `sources` the place in `candidates` of the nearest one, the first of several; exact.

    Candidates are tried by difference of length, which bounds the distance from below, and skipped where a count of
    characters that only one of the two has proves them farther than the best so far. Memory: O(strings).
    """
    lengths = strings.lengths[candidates]
    order = np.argsort(lengths, kind="stable")
    longest = int(lengths.max(initial=0))
    buckets = np.searchsorted(lengths[order], np.arange(longest + 2))
    marks = _signatures(*strings)
    return _nearest(np.asarray(sources, np.int64), np.asarray(candidates, np.int64), order, buckets, marks, *strings)


@njit(cache=True)
def _nearest(sources, candidates, order, buckets, marks, codes, offsets, alphabet):
    out = np.full(len(sources), -1, np.int32)
    if len(candidates) == 0:
        return out
    longest = len(buckets) - 2
    masks, spare = np.zeros(alphabet, np.uint64), np.zeros(alphabet, np.uint64)
    marks_by_length = marks[candidates[order]]
    for n in range(len(sources)):
        s, s_end = offsets[sources[n]], offsets[sources[n] + 1]
        size, mark = s_end - s, marks[sources[n]]
        open_masks(masks, codes, s, s_end)
        best, at = 1 << 60, -1
        for apart in range(max(longest, size) + 1):
            if apart > best:
                break
            for side in range(2 if apart else 1):
                length = size + apart if side == 0 else size - apart
                if length < 0 or length > longest:
                    continue
                for k in range(buckets[length], buckets[length + 1]):
                    other = marks_by_length[k]
                    least = max(_ones(mark & ~other), _ones(other & ~mark))
                    if least > best:
                        continue
                    place = order[k]
                    if least == best and place > at:
                        continue
                    c = candidates[place]
                    found = distance(codes, s, s_end, offsets[c], offsets[c + 1], masks, spare)
                    if found < best or (found == best and place < at):
                        best, at = found, place
        close_masks(masks, codes, s, s_end)
        out[n] = at
    return out
