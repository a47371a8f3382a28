"""Which target token a source token stands for: maps source id → target id (FuseLLM §3.2, FuseChat §3.2).

- em: the same bytes (or the same role), or none.
- mined: the same, else the target token at the least Levenshtein distance over bytes; ties go to the lowest id.
- ms: the target token it was aligned with most often over the corpus; ties by edit distance, then the lowest id. A
  token that was never seen falls back on em.
- span (`prefix`): the first token of the target's own tokenization of the source token's bytes: that the text goes on
  with s implies that it goes on with this one.

Where several target ids spell the same bytes (a piece and a fallback byte), only the one the tokenizer itself uses
counts. Special tokens map by role and never by spelling.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from safetensors.numpy import load_file, save_file

from fusion.alignment.edit import nearest, pack
from fusion.alignment.normalise import Vocabulary, encode, read_vocabulary
from fusion.alignment.statistics import Statistics
from fusion.artifact import artifact
from fusion.config import UserError

VERSION = 1  # of the maps: a change of rule gives a new artifact


def vocabulary_map(
    source_tokenizer: Any,
    target_tokenizer: Any,
    criterion: str,
    *,
    normalise: str = "bytes",
    statistics: Statistics | None = None,
    cache: Path | None = None,
    source_width: int | None = None,
    target_width: int | None = None,
) -> torch.Tensor:
    """int64[V_source]: target id of every source id; −1: no target token.

    Raises:
        UserError: unknown criterion, `ms` without statistics, or a tokenizer without a vocabulary.
    """
    source = read_vocabulary(source_tokenizer, source_width)
    target = read_vocabulary(target_tokenizer, target_width)
    made = build_map(source, target, target_tokenizer, criterion, normalise, statistics, cache)
    return torch.from_numpy(made.astype(np.int64))


def build_map(
    source: Vocabulary,
    target: Vocabulary,
    target_tokenizer: Any,
    criterion: str,
    normalise: str,
    statistics: Statistics | None = None,
    cache: Path | None = None,
) -> NDArray[np.int32]:
    s, t = match_keys(source, target, normalise)
    exact = em(s, t, target, normalise)
    if criterion == "em":
        return exact
    if criterion == "ms":
        if statistics is None:
            raise UserError("alignment.criterion=ms needs mapping statistics: count them over the corpus first")
        return ms(exact, s, t, statistics)
    if criterion not in ("mined", "span", "prefix"):
        raise UserError(f"alignment.criterion={criterion}: not one of em, mined, ms, span")

    def make() -> NDArray[np.int32]:
        return mined(exact, s, t) if criterion == "mined" else prefix(exact, source, target, target_tokenizer)

    if cache is None:
        return make()
    recipe = {
        "version": VERSION,
        "criterion": criterion,
        "normalise": normalise,
        "source": _digest(s),
        "target": _digest(t),
    }

    def build(folder: Path) -> dict[str, Any]:
        made = make()
        save_file({"map": made}, folder / "map.safetensors")
        return {"source_tokens": len(s), "target_tokens": len(t), "mapped": int((made >= 0).sum())}

    return load_file(artifact(cache, "vocabulary_map", recipe, build) / "map.safetensors")["map"]


def match_keys(source: Vocabulary, target: Vocabulary, normalise: str) -> tuple[list, list]:
    """What tokens compare by, per id: bytes and roles, or the reference code's strings with the target's marker."""
    if normalise == "bytes":
        return source.keys, target.keys
    marker = target.marker or source.marker
    return source.reference(marker), target.reference(marker)


def em(s: list, t: list, target: Vocabulary, normalise: str) -> NDArray[np.int32]:
    if normalise == "bytes":
        first = target.canonical()
    else:
        first = {}
        for i, key in enumerate(t):
            if key is not None:
                first.setdefault(key, i)
    return np.array([-1 if key is None else first.get(key, -1) for key in s], np.int32)


def mined(exact: NDArray[np.int32], s: list, t: list) -> NDArray[np.int32]:
    first: dict = {}
    for i, key in enumerate(t):
        if key is not None and not _role(key):
            first.setdefault(key, i)
    rest = np.array([i for i in np.flatnonzero(exact < 0) if s[i] is not None and not _role(s[i])], np.int64)
    found = nearest(
        np.arange(len(rest)), np.arange(len(rest), len(rest) + len(first)), pack([*(s[i] for i in rest), *first])
    )
    out = exact.copy()
    if first:
        out[rest] = np.fromiter(first.values(), np.int32)[found]
    return out


def ms(exact: NDArray[np.int32], s: list, t: list, statistics: Statistics) -> NDArray[np.int32]:
    out = exact.copy()
    sources, targets, counts = statistics.rows()
    distance = np.array(
        [Levenshtein.distance(s[a], t[b]) for a, b in zip(sources.tolist(), targets.tolist(), strict=True)], np.int64
    )
    order = np.lexsort((targets, distance, -counts, sources))
    sources, targets = sources[order], targets[order]
    first = np.ones(len(sources), np.bool_)
    first[1:] = sources[1:] != sources[:-1]
    out[sources[first]] = targets[first]
    return out


def prefix(exact: NDArray[np.int32], source: Vocabulary, target: Vocabulary, tokenizer: Any) -> NDArray[np.int32]:
    out = np.where(source.special, exact, -1).astype(np.int32)
    known = target.canonical()
    longest = max((len(k) for k in known), default=0)
    waiting: list[tuple[int, bytes, str]] = []
    for i, piece in enumerate(source.text):
        if piece:
            whole = piece.decode("utf-8", "ignore") if piece[0] < 0x80 or _starts(piece) else ""
            waiting.append((i, piece, whole))
    # a sentinel before the text keeps SentencePiece from putting a space there; one that merges with it is changed
    for sentinel in ("", "\n", "a", "0", "."):
        ahead = sentinel.encode()
        again = []
        rows = encode(tokenizer, [sentinel + _unspaced(w, target, sentinel) for _, _, w in waiting])
        for (i, piece, whole), row in zip(waiting, rows, strict=True):
            token = _first_after(row, ahead, whole.encode(), target, bool(sentinel))
            if whole and token >= 0:
                out[i] = token
            else:
                again.append((i, piece, whole))
        waiting = again
    for i, piece, _ in waiting:
        starts = (known[piece[:n]] for n in range(min(len(piece), longest), 0, -1) if piece[:n] in known)
        out[i] = next(starts, -1)
    return out


def _unspaced(text: str, target: Vocabulary, sentinel: str) -> str:
    return text[1:] if target.prefix and not sentinel and text.startswith(" ") else text


def _first_after(row: list[int], ahead: bytes, text: bytes, target: Vocabulary, sentinel: bool) -> int:
    """The first token of `row` after the bytes `ahead`, or −1 where no token begins there or its bytes are others."""
    so_far = b""
    skip = b" " + ahead if target.prefix and sentinel else ahead
    for token in row:
        piece = target.text[token]
        if piece is None:
            return -1
        if so_far == skip and piece:
            return token if text.startswith(piece) or piece.startswith(text) else -1
        so_far += piece
    return -1


def _starts(piece: bytes) -> bool:
    """The piece begins with a whole character."""
    try:
        piece[: 2 if piece[0] < 0xE0 else 3 if piece[0] < 0xF0 else 4].decode()
    except UnicodeDecodeError:
        return False
    return True


def _digest(keys: list) -> str:
    whole = hashlib.sha256()
    for key in keys:
        whole.update(
            b"\xff\xff" if key is None else key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")
        )
        whole.update(b"\xff\xfe")
    return whole.hexdigest()[:16]


def _role(key: bytes | str) -> bool:
    return isinstance(key, bytes) and key[:1] == b"\xff" and len(key) > 1
