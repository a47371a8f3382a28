"""Positions whose prefixes end at the same byte of the text: exact, linear time, no DP.

Only there does the source's p(next | prefix) speak of the same event as the target's. Where the two tokenizers do not
spell the same bytes (one of them is lossy), the common beginning and the common end are still matched by byte; what
lies between is left to the caller.
"""

import numpy as np
from numba import njit

from fusion.alignment.normalise import Vocabulary


def byte_ends(ids: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """(text uint8[bytes], ends int64[T]): the text that a row of ids spells, and where each token ends in it.

    A final eos is an event, not text: it adds no byte. SentencePiece's added space is taken away.
    """
    data, offsets = vocabulary.spelled
    return _spell(
        ids, data, offsets, vocabulary.special, vocabulary.prefix, vocabulary.reprefix, ends_with_eos(ids, vocabulary)
    )


def ends_with_eos(ids: np.ndarray, vocabulary: Vocabulary) -> bool:
    return len(ids) > 0 and vocabulary.roles[int(ids[-1])] == "eos"


def span_positions(
    source: tuple[np.ndarray, np.ndarray], target: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, int, int]:
    """int32[Tt]: the last source position that ends where target position i does, or -1; and the gap [first, last).

    Takes two results of `byte_ends`. The gap is the range of target positions in which the texts differ; it is empty
    when both spell the same bytes.
    """
    return _match(*source, *target)


@njit(cache=True)
def _spell(ids, data, offsets, special, prefix, reprefix, eos):
    total = 0
    for i in ids:
        total += offsets[i + 1] - offsets[i]
    text = np.empty(total, np.uint8)
    ends = np.empty(len(ids), np.int64)
    at, drop = 0, prefix
    for n in range(len(ids)):
        i = ids[n]
        begin, end = offsets[i], offsets[i + 1]
        if special[i]:
            drop = reprefix
            if eos and n == len(ids) - 1:
                begin = end
        else:
            if drop and end > begin and data[begin] == 32:
                begin += 1
            drop = False
        for b in range(begin, end):
            text[at] = data[b]
            at += 1
        ends[n] = at
    return text[:at], ends


@njit(cache=True)
def _match(s_text, s_ends, t_text, t_ends):
    out = np.full(len(t_ends), -1, np.int32)
    shorter = min(len(s_text), len(t_text))
    head = 0
    while head < shorter and s_text[head] == t_text[head]:
        head += 1
    shift = len(s_text) - len(t_text)
    tail = len(t_text)  # where the common end begins, on the target's side
    if head < len(t_text) or head < len(s_text):
        while tail > head and tail + shift > head and s_text[tail + shift - 1] == t_text[tail - 1]:
            tail -= 1
    first, last, j = -1, -1, 0
    for i in range(len(t_ends)):
        end = t_ends[i]
        if end > head:
            if end < tail:
                first, last = (i if first < 0 else first), i + 1
                continue
            end += shift
        while j < len(s_ends) and s_ends[j] < end:
            j += 1
        while j + 1 < len(s_ends) and s_ends[j + 1] == end:
            j += 1
        if j < len(s_ends) and s_ends[j] == end:
            out[i] = j
    if first < 0:
        first = last = 0
    return out, first, last
