"""A folder that is made once: found again by the hash of what made it, whole or not there, safe under kill -9.

Layout: `<root>/<kind>/<hash>/manifest.json` beside the files it names. Work happens in `<hash>.partial`, which a
later process continues; the rename is the commit. A lock makes a second process wait and then use the result.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "manifest.json"


class Missing(LookupError):
    """An artifact that is not there yet, said instead of building it inside `searching`."""


_SEARCHING = ContextVar("searching", default=False)


@contextmanager
def searching() -> Iterator[None]:
    """Inside, an artifact is found or `Missing` is raised; nothing is built."""
    token = _SEARCHING.set(True)
    try:
        yield
    finally:
        _SEARCHING.reset(token)


def must_build(folder: Path) -> bool:
    """Whether `folder` is not there yet.

    Raises:
        Missing: it is not there, inside `searching`.
    """
    there = (folder / MANIFEST).exists()
    if not there and _SEARCHING.get():
        raise Missing(folder)
    return not there


def fingerprint(recipe: Any) -> str:
    """Sixteen hex digits of the canonical JSON of `recipe`."""
    text = json.dumps(recipe, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """`path` holds all of `data` or what it held before, also after a power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def artifact(
    root: Path, kind: str, recipe: dict[str, Any], build: Callable[[Path], dict[str, Any]], together: bool = False
) -> Path:
    """The folder that `recipe` describes, built if it is not there yet.

    `build(partial)` fills the folder `partial` (it may hold finished pieces of a killed run) and returns what the
    manifest should say besides the recipe: counts, figures. Checksums of all files are added here.
    With `together` every rank of torch.distributed takes part in `build` (a training run) and the first one commits;
    otherwise the first process to come builds and the others wait.
    """
    from torch import distributed  # merging uses this file and starts without torch

    folder = Path(root) / kind / fingerprint(recipe)
    together = together and distributed.is_available() and distributed.is_initialized()
    leads = not together or distributed.get_rank() == 0
    must_build(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock") if leads else nullcontext():
        there = [(folder / MANIFEST).exists()]
        if together:
            distributed.broadcast_object_list(there)
        if not there[0]:
            partial = folder.with_name(f"{folder.name}.partial")
            partial.mkdir(exist_ok=True)
            facts = build(partial)
            if leads:
                _commit(partial, folder, {"kind": kind, "recipe": recipe, **facts})
    if together:
        distributed.barrier()
    return folder


def _commit(partial: Path, folder: Path, manifest: dict[str, Any]) -> None:
    files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith("."))
    write_json(partial / MANIFEST, manifest | {"files": {str(p.relative_to(partial)): checksum(p) for p in files}})
    os.replace(partial, folder)
