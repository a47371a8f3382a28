"""A source's distributions on the target's grid: which position goes where, and under which ids.

Distribution t speaks of token t + 1. A target position that matches no single source position, or whose candidates all
have no target id, takes the fallback: certainty of the gold next token (FuseChat v2; FuseLLM's release put it on token
t itself), or nothing. The last position has no next token, hence no fallback.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fusion.alignment.dtw import warp
from fusion.alignment.edit import pack
from fusion.alignment.normalise import read_vocabulary
from fusion.alignment.spans import byte_ends, ends_with_eos, span_positions
from fusion.alignment.statistics import Statistics
from fusion.alignment.vocabulary import build_map, match_keys
from fusion.config import Alignment, UserError

log = logging.getLogger(__name__)
NONE, ALIGNED, ONE_HOT = 0, 1, 2


class Projection(NamedTuple):
    """K entries per target position, largest first; empty: id 0, −inf. `kind`: NONE, ALIGNED or ONE_HOT."""

    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    kind: NDArray[np.uint8]


class Aligner:
    """One (source, target) pair of tokenizers, one criterion. Holds arrays only: picklable, cheap to send to workers.

    `source_width` and `target_width` are the widths of the models' logits where they are larger than the tokenizers.
    Maps that take long are kept below `cache`. criterion=ms needs `statistics` before positions and projections can be
    asked for; `count` gathers them in one pass.
    """

    def __init__(
        self,
        source_tokenizer: Any,
        target_tokenizer: Any,
        config: Alignment,
        *,
        statistics: Statistics | None = None,
        cache: Path | None = None,
        source_width: int | None = None,
        target_width: int | None = None,
    ):
        self.config = config
        self.source = read_vocabulary(source_tokenizer, source_width)
        self.target = read_vocabulary(target_tokenizer, target_width)
        self.statistics = Statistics() if statistics is None else statistics
        self.map: NDArray[np.int32] | None = None
        counting = config.criterion == "ms" and statistics is None
        if not counting:
            self.map = build_map(
                self.source, self.target, target_tokenizer, config.criterion, config.normalise, statistics, cache
            )
        match = match_keys(self.source, self.target, config.normalise)
        if config.normalise == "reference":  # the marker counts for equality, not for the distance
            marker = self.target.marker or self.source.marker
            self._match, _ = _intern(match)
            self._cost, strings = _intern([[k and k.replace(marker, "") for k in keys] for keys in match])
            self._first = self._cost  # unused: the marker is gone already
        else:  # the space before the first word is the tokenizer's, not the text's
            bare = [
                [k[1:] if v.prefix and k and k[:1] == b" " else k for k in keys]
                for v, keys in zip((self.source, self.target), match, strict=True)
            ]
            numbers, strings = _intern([*match, *bare])
            self._match, self._first = numbers[:2], numbers[2:]
            self._cost = self._match
        self._strings = pack(strings)
        self.lossy = 0

    def positions(self, source_ids: NDArray, target_ids: NDArray) -> NDArray[np.int32]:
        """int32[Tt]: the source position whose distribution target position i takes, −1: none.

        Both rows of ids tokenise the same text.
        """
        source_ids, target_ids = self._known(source_ids, target_ids)
        if self.config.criterion == "span":
            return self._spans(source_ids, target_ids)
        if self.map is None:
            raise UserError("alignment.criterion=ms needs mapping statistics: count them over the corpus first")
        _, path = self._path(source_ids, target_ids)
        return self._unique(path, source_ids, target_ids)

    def count(self, source_ids: NDArray, target_ids: NDArray) -> None:
        """Add one text's aligned pairs of tokens to `statistics`."""
        source_ids, target_ids = self._known(source_ids, target_ids)
        _, path = self._path(source_ids, target_ids)
        self.statistics.add(source_ids[path[:, 0]], target_ids[path[:, 1]])

    def project(self, positions: NDArray, ids: NDArray, logprobs: NDArray, target_ids: NDArray) -> Projection:
        """Distributions `ids`, `logprobs` [Ts, K] of the source under the target's ids, at the target's positions."""
        if self.map is None:
            raise UserError("alignment.criterion=ms needs mapping statistics: count them over the corpus first")
        return Projection(
            *_project(
                np.asarray(positions),
                np.asarray(ids),
                np.asarray(logprobs, dtype=np.float32),
                np.asarray(target_ids),
                self.map,
                self.config.collision == "sum",
                self.config.fallback == "next_token",
            )
        )

    def path(self, source_ids: NDArray, target_ids: NDArray) -> tuple[int, NDArray[np.int32]]:
        """(total edit distance, DTW path [P, 2] of (source, target) positions) of one text."""
        return self._path(*self._known(source_ids, target_ids))

    def _known(self, *rows: NDArray) -> list[NDArray[np.int64]]:
        out = []
        for side, vocabulary, row in zip(("source", "target"), (self.source, self.target), rows, strict=True):
            ids = np.asarray(row, np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < len(vocabulary):
                raise UserError(
                    f"the {side}'s tokens reach id {ids.max()}, its vocabulary only {len(vocabulary)}: is the "
                    f"tokenizer the model's own? (if its logits are wider, give {side}_width)"
                )
            out.append(ids)
        return out

    def _path(self, source_ids: NDArray, target_ids: NDArray) -> tuple[int, NDArray[np.int32]]:
        return warp(*self._rows(self._cost, source_ids, target_ids), self._strings)

    def _rows(self, keys: list[NDArray], source_ids: NDArray, target_ids: NDArray) -> list[NDArray[np.int32]]:
        rows = [k[ids] for k, ids in zip(keys, (source_ids, target_ids), strict=True)]
        for row, first, ids in zip(rows, self._first, (source_ids, target_ids), strict=True):
            if len(row) and self.config.normalise == "bytes":
                row[0] = first[ids[0]]
        return rows

    def _unique(self, path: NDArray[np.int32], source_ids: NDArray, target_ids: NDArray) -> NDArray[np.int32]:
        """Where target position i lies on one j of the path and the two tokens match."""
        out = np.full(len(target_ids), -1, np.int32)
        if not len(path):
            return out
        single = np.bincount(path[:, 1], minlength=len(target_ids)) == 1
        j, i = path[single[path[:, 1]]].T
        s, t = self._rows(self._match, source_ids, target_ids)
        same = s[j] == t[i]
        if self.config.criterion != "em":
            same |= self.map[source_ids[j]] == target_ids[i]
        if self.config.normalise == "reference" and len(i) and i[0] == 0:
            # the release writes the marker before a first word that lacks it, then compares and looks up that
            first, token = self.target.tokens[target_ids[0]], self.source.tokens[source_ids[j[0]]]
            marks = self.target.marker, self.source.marker
            if all(marks) and first.startswith(marks[0]) and not token.startswith(marks[1]):
                written = self.source.tokens.index(marks[1] + token) if marks[1] + token in self.source.tokens else -1
                mapped = self.config.criterion != "em" and written >= 0 and self.map[written] == target_ids[0]
                same[0] = first == marks[0] + token or mapped
        out[i[same]] = j[same]
        return out

    def _spans(self, source_ids: NDArray, target_ids: NDArray) -> NDArray[np.int32]:
        out = np.full(len(target_ids), -1, np.int32)
        ends_s, ends_t = ends_with_eos(source_ids, self.source), ends_with_eos(target_ids, self.target)
        s, t = source_ids[: len(source_ids) - ends_s], target_ids[: len(target_ids) - ends_t]
        at, first, last = span_positions(byte_ends(s, self.source), byte_ends(t, self.target))
        if last > first:
            self._warn()
            _, path = self._path(s, t)
            at[first:last] = self._unique(path, s, t)[first:last]
        out[: len(t)] = at
        if ends_s and ends_t:
            out[-1] = len(source_ids) - 1
        return out

    def _warn(self) -> None:
        self.lossy += 1
        if self.lossy == 1:
            log.warning("a text is spelled differently by the two tokenizers (one is lossy): its middle goes by DTW")


def _intern(rows: list[list]) -> tuple[list[NDArray[np.int32]], list]:
    """(a number for every entry, equal for equal entries; the entries by number, none as empty)."""
    known: dict = {}
    numbers = [np.array([known.setdefault(k, len(known)) for k in row], np.int32) for row in rows]
    return numbers, [() if k is None else k for k in known]


@njit(cache=True)
def _project(positions, ids, logprobs, target_ids, mapping, add, one_hot):
    T, K = len(target_ids), ids.shape[1]
    out_ids = np.zeros((T, K), np.uint32)
    out = np.full((T, K), -np.inf, np.float32)
    kind = np.zeros(T, np.uint8)
    for i in range(T):
        j, n = positions[i], 0
        if j >= 0:
            for k in range(K):
                logprob, s = logprobs[j, k], ids[j, k]
                if not logprob > -np.inf or s >= len(mapping):
                    continue
                t = mapping[s]
                if t < 0:
                    continue
                at = 0
                while at < n and out_ids[i, at] != t:
                    at += 1
                if at == n:
                    out_ids[i, at] = t
                    out[i, at] = logprob
                    n += 1
                else:
                    a, b = max(out[i, at], logprob), min(out[i, at], logprob)
                    out[i, at] = a + np.log1p(np.exp(b - a)) if add else a
                while at > 0 and out[i, at - 1] < out[i, at]:  # largest first
                    out[i, at], out[i, at - 1] = out[i, at - 1], out[i, at]
                    out_ids[i, at], out_ids[i, at - 1] = out_ids[i, at - 1], out_ids[i, at]
                    at -= 1
        if n:
            kind[i] = 1
        elif one_hot and i + 1 < T:
            out_ids[i, 0] = target_ids[i + 1]
            out[i, 0] = 0.0
            kind[i] = 2
    return out_ids, out, kind
