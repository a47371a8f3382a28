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


@njit(cache=True)
def open_masks(s, masks):
    """Let `masks` stand for the pattern `s`; every `open_masks` is undone by `close_masks`."""
    if len(s) <= WORD:
        for k in range(len(s)):
            masks[s[k]] |= np.uint64(1) << np.uint64(k)


@njit(cache=True)
def close_masks(s, masks):
    for k in range(len(s)):
        masks[s[k]] = np.uint64(0)


@njit(cache=True)
def distance(s, t, masks, spare):
    """Levenshtein distance of `s`, for which `masks` is open, and `t`. `spare`: masks that are all zero."""
    if len(s) == 0 or len(t) == 0:
        return max(len(s), len(t))
    if len(s) <= WORD:
        return _myers(masks, len(s), t)
    if len(t) <= WORD:
        open_masks(t, spare)
        found = _myers(spare, len(t), s)
        close_masks(t, spare)
        return found
    return _plain(s, t)


@njit(cache=True)
def _myers(masks, length, t):
    one, zero = np.uint64(1), np.uint64(0)
    top = np.uint64(length - 1)
    plus, minus, score = ~zero, zero, length
    for c in range(len(t)):
        match = masks[t[c]]
        across = (((match & plus) + plus) ^ plus) | match | minus
        up = minus | ~(across | plus)
        down = plus & across
        score += np.int64((up >> top) & one) - np.int64((down >> top) & one)
        up = (up << one) | one
        plus = (down << one) | ~(across | up)
        minus = up & across
    return score


@njit(cache=True)
def _plain(s, t):
    row = np.arange(len(t) + 1)
    for a in range(len(s)):
        diagonal, row[0] = row[0], a + 1
        for b in range(len(t)):
            above = row[b + 1]
            row[b + 1] = min(min(above, row[b]) + 1, diagonal + (0 if s[a] == t[b] else 1))
            diagonal = above
    return row[len(t)]


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
        s = codes[offsets[sources[n]] : offsets[sources[n] + 1]]
        mark = marks[sources[n]]
        open_masks(s, masks)
        best, at = 1 << 60, -1
        for apart in range(max(longest, len(s)) + 1):
            if apart > best:
                break
            for side in range(2 if apart else 1):
                length = len(s) + apart if side == 0 else len(s) - apart
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
                    found = distance(s, codes[offsets[c] : offsets[c + 1]], masks, spare)
                    if found < best or (found == best and place < at):
                        best, at = found, place
        close_masks(s, masks)
        out[n] = at
    return out
