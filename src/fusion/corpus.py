"""Texts and dialogues become blocks: the target's token ids, which of them count as labels, and the text itself.

Decisions:
- The embedded corpus is the Python installation: three domains that share little (code without docstrings, the
  English of the docstrings and help topics, the Unicode and encoding tables). Nothing is downloaded.
- A document belongs to a split by the hash of the file it comes from, so held-out text never shares a file with
  text that was trained on.
"""

import ast
import hashlib
import html.entities
import inspect
import os
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

from fusion.config import UserError, nearest

DOMAINS = ("code", "docs", "tables")
SPLITS = {"train": 3_000_000, "fusion": 300_000, "held_out": 80_000}
"""Characters of each split, per domain, at most."""

_LIBRARY = Path(os.__file__).parent
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
_DOCUMENT = 3_000


@lru_cache
def _stdlib(domain: str, split: str) -> tuple[str, ...]:
    budget, documents = SPLITS[split], []
    for digest, read in sorted(_files(domain), key=lambda file: file[0]):
        share = int(digest[-8:], 16) / 2**32
        if split != ("held_out" if share < 0.1 else "fusion" if share < 0.25 else "train"):
            continue
        room = min(budget, SPLITS[split] // 20)
        for document in _pieces(read()):
            if len(document) > room:
                break
            documents.append(document)
            room, budget = room - len(document), budget - len(document)
        if budget < _DOCUMENT:
            break
    return tuple(documents)


def stdlib(domain: str, split: str) -> list[str]:
    """Documents of one domain of the embedded corpus: the same list on every call with one Python version.

    `split` is train (to grow models on), fusion (the corpus of the fusion itself) or held_out (measured on). No file
    gives more than a twentieth of a split.
    """
    if domain not in DOMAINS:
        raise UserError(f"the embedded corpus has no domain {domain!r}{nearest(domain, list(DOMAINS))}")
    return list(_stdlib(domain, split))


def _files(domain: str) -> list[tuple[str, Callable[[], str]]]:
    """(hash, text when called) of every file of a domain: parsing them all takes ten seconds, few are asked for."""
    if domain == "tables":
        names = sorted(html.entities.html5)
        parts = [(f"unicode {start:x}", partial(_unicode, start)) for start in range(0, 0x20000, 256)]
        parts += [(f"html {n}", partial(_entities, names[n : n + 128])) for n in range(0, len(names), 128)]
        codecs = sorted((_LIBRARY / "encodings").glob("*.py"))
        parts += [(f"codec {path.stem}", partial(_charmap, path)) for path in codecs]
        return [(hashlib.sha256(name.encode()).hexdigest(), read) for name, read in parts]
    paths = (path for path in sorted(_LIBRARY.rglob("*.py")) if not _LEFT_OUT & {*path.relative_to(_LIBRARY).parts})
    sources = [path.read_bytes() for path in paths if not path.name.startswith("_sysconfigdata")]
    extract = _code if domain == "code" else _docstrings
    files = [(hashlib.sha256(source).hexdigest(), partial(extract, source)) for source in sources]
    if domain == "docs":
        from pydoc_data.topics import topics

        files += [(hashlib.sha256(text.encode()).hexdigest(), partial(str, text)) for text in topics.values()]
    return files


def _documented(source: bytes) -> Iterator[tuple[str, ast.Expr]]:
    """(name, docstring node) of everything documented in a Python file, in the order of the file."""
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0)):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield getattr(node, "name", ""), first


def _code(source: bytes) -> str:
    lines = source.decode("utf-8", "replace").splitlines(keepends=True)
    for _, node in _documented(source):
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines)


def _docstrings(source: bytes) -> str:
    texts = ((name, inspect.cleandoc(node.value.value)) for name, node in _documented(source))
    return "\n\n".join(f"{name}\n\n{text}" if name else text for name, text in texts if len(text) > 40)


def _unicode(start: int) -> str:
    """256 code points: the character, its number, name, category, direction and decomposition."""
    rows = []
    for code in range(start, start + 256):
        char = chr(code)
        name = unicodedata.name(char, "")
        if name and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "NUSHU")):
            facts = (unicodedata.category(char), unicodedata.bidirectional(char), unicodedata.decomposition(char))
            rows.append(f"{char}\tU+{code:04X}\t{name}\t{' '.join(fact for fact in facts if fact)}\n")
    return "".join(rows)


def _entities(names: list[str]) -> str:
    entity = html.entities.html5
    return "".join(f"&{n}\t{entity[n]}\t{' '.join(f'U+{ord(c):04X}' for c in entity[n])}\n" for n in names)


def _charmap(path: Path) -> str:
    """The table of a one-byte encoding, as the standard library writes it."""
    _, found, table = path.read_text("utf-8", "replace").partition("\ndecoding_table = (\n")
    return f"{path.stem}\n{table}".partition("### Encoding table")[0] if found else ""


def _pieces(text: str, size: int = _DOCUMENT) -> Iterator[str]:
    """The text in pieces of about `size` characters, cut at blank lines where there are any, else at lines."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if len(piece) + len(line) > size or (not line.strip() and len(piece) > size // 2):
            if len(piece.strip()) > 200:
                yield piece.strip("\n") + "\n"
            piece = ""
        piece += line
    if len(piece.strip()) > 200:
        yield piece.strip("\n") + "\n"
