"""Shards on disk: written atomically by any number of processes, verified, memory-mapped.

    tokens/<hash>/train-00000.safetensors      ids, counted, offsets, text, … of 256 blocks; held_out-*: validation
    source/<hash>/00000.safetensors            a source's top-K on its own token grid
    aligned/<hash>/00000.safetensors           the same on the target's grid

One file per shard, one column per tensor: safetensors is a header and raw little-endian columns, so a column is mapped
without a copy and any other program can read it. A block of T tokens has T − 1 predictions (the last token predicts
nothing that is stored), so a store's row of token t of block b is `offsets[b] − b + t`: the offsets live with the
tokens. Columns of a distribution store: `ids` [N, K] uint16 (uint32 above 65,536 tokens), `logprobs` [N, K] float16,
`ce` [N] float16, `block_ce` [blocks] float32. Where fewer than K entries are kept on purpose (top_p, sample), entries
are ragged: `counts` [N] and flat `ids`, `logprobs`.

A file is verified by checksum before it is read, once for each state of the file: the size and time of the last
verification are remembered in `.verified`. A change that keeps both is found by `--verify` only.

`python -m fusion.store PATH [--verify] [--export FOLDER]` shows, checks or exports what is inside.
"""

import argparse
import errno
import json
import mmap
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from fusion.artifact import MANIFEST, checksum, fingerprint, must_build, read_manifest, write_atomic, write_json
from fusion.config import UserError

STAMPS = ".verified"
_OPEN_MAPS = 256
_RESIDENT = 64 << 20


def shard_name(index: int, part: str = "") -> str:
    return f"{part}-{index:05d}.safetensors" if part else f"{index:05d}.safetensors"


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shard(path: Path, columns: dict[str, np.ndarray], facts: dict[str, float]) -> None:
    """One shard, whole or not there; `facts` are sums over it, added up in the manifest.

    Raises:
        UserError: the disk is full; what was finished before stays usable.
    """
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(column) for name, column in columns.items()}, {"facts": json.dumps(facts)}
    )
    try:
        write_atomic(path, data)
    except OSError as error:
        for leftover in path.parent.glob(f".{path.name}.*"):
            leftover.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path.parent}: no room for {len(data) / 1e6:.1f} MB ({os.strerror(error.errno)}): free space or set "
                "artifacts=FOLDER on another disk; the finished shards are kept"
            ) from error
        raise


def fill(
    root: Path,
    kind: str,
    recipe: dict[str, Any],
    shards: list[str],
    make: Callable[[Path], None],
    summary: Callable[[dict[str, float]], dict[str, Any]],
    first: int = 0,
) -> Path:
    """The store that `recipe` describes, its missing shards made by `make(path)`.

    Any number of processes, of any age, may run this at once: a shard belongs to whoever holds its lock, and the lock
    of a process that dies is free again. So no shard is made twice, none is left out, and the number of ranks may
    change between a kill and the rerun. `first` is where this process starts looking. `summary` turns the added-up
    facts of the shards into what the manifest says.
    """
    folder = Path(root) / kind / fingerprint(recipe)
    partial, locks = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("partial", "locks"))
    locks.parent.mkdir(parents=True, exist_ok=True)
    reopen_damaged(folder)
    must_build(folder)
    order = shards[first % max(1, len(shards)) :] + shards[: first % max(1, len(shards))]
    while not (folder / MANIFEST).exists():
        partial.mkdir(exist_ok=True)
        locks.mkdir(exist_ok=True)
        missing = [name for name in order if not (partial / name).exists()]
        worked = False
        for name in missing:
            with suppress(Timeout), FileLock(locks / name, timeout=0):
                if (folder / MANIFEST).exists():  # another process finished and took the partial folder with it
                    break
                if not (partial / name).exists():
                    for leftover in partial.glob(f".{name}.*"):  # of a process that was killed while writing
                        leftover.unlink(missing_ok=True)
                    make(partial / name)
                    worked = True
        if missing and not worked:
            time.sleep(0.05)
        if not missing:
            with FileLock(f"{folder}.lock"):
                if not (folder / MANIFEST).exists():
                    _commit(partial, folder, {"kind": kind, "recipe": recipe}, shards, summary)
    shutil.rmtree(locks, ignore_errors=True)
    if partial.exists() and not any(partial.iterdir()):  # ours, made after another process had finished
        partial.rmdir()
    return folder


def _commit(
    partial: Path,
    folder: Path,
    manifest: dict[str, Any],
    shards: list[str],
    summary: Callable[[dict[str, float]], dict[str, Any]],
) -> None:
    totals: dict[str, float] = {}
    for name in shards:
        for fact, value in read_facts(partial / name).items():
            totals[fact] = totals.get(fact, 0) + value
    for stray in [p for p in partial.iterdir() if p.is_file() and p.name not in shards]:
        stray.unlink()
    sums = {name: checksum(partial / name) for name in sorted(shards)}
    size = sum((partial / name).stat().st_size for name in shards)
    write_json(partial / MANIFEST, manifest | {"bytes": size} | summary(totals) | {"files": sums})
    _stamp(partial, sums)
    os.replace(partial, folder)


# --- verification ----------------------------------------------------------------------------------------------------


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _stamp(folder: Path, names: Any) -> None:
    with suppress(OSError):  # a read-only folder is verified again each time
        write_json(folder / STAMPS, {name: _state(folder / name) for name in sorted(names)})


def damaged(folder: Path, thorough: bool = False) -> list[str]:
    """Files of an artifact whose content is not what was written; `thorough` does not trust earlier verifications."""
    files = read_manifest(folder)["files"]
    stamps = {} if thorough or not (folder / STAMPS).exists() else json.loads((folder / STAMPS).read_text())
    bad, fresh = [], {}
    for name, expected in files.items():
        path = folder / name
        known = path.exists() and stamps.get(name) == _state(path)
        if known or (path.exists() and checksum(path) == expected):
            fresh[name] = True
        else:
            bad.append(name)
    if thorough or set(fresh) != set(stamps):
        _stamp(folder, fresh)
    return bad


def reopen_damaged(folder: Path) -> list[str]:
    """If files of a finished artifact are damaged: name them, take them away, and leave the rest as unfinished work."""
    if not (folder / MANIFEST).exists():
        return []
    bad = damaged(folder)
    if bad:
        with FileLock(f"{folder}.lock"):
            if not (folder / MANIFEST).exists():
                return bad
            print(f"{folder}: {', '.join(bad)} damaged (checksum differs), made again")
            for name in bad:
                (folder / name).unlink(missing_ok=True)
            partial = folder.with_name(f"{folder.name}.partial")
            os.replace(folder, partial)
            (partial / MANIFEST).unlink()
    return bad


# --- reading ---------------------------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(JSON header of a safetensors file, where its data begins)."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def read_facts(path: Path) -> dict[str, float]:
    return json.loads(_header(path)[0]["__metadata__"]["facts"])


_DTYPES = {
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "BOOL": "?",
}


class Store:
    """A finished store, read shard by shard. Picklable: every process maps the files itself.

    At most 256 shards are mapped at a time, and pages are given back every 64 MB read, so resident memory does not
    grow with the store.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise UserError(f"{folder}: no finished store (no {MANIFEST}): run precompute.py again")
        self.manifest = read_manifest(self.folder)
        self._forget()

    def _forget(self) -> None:
        self._maps: dict[str, tuple[mmap.mmap, dict[str, np.ndarray]]] = {}
        self._checked: dict[str, Any] | None = None
        self._touched = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def shards(self, part: str = "") -> list[str]:
        return [name for name in sorted(self.manifest["files"]) if name.startswith(part)]

    def shard(self, name: str) -> dict[str, np.ndarray]:
        """The columns of a shard, mapped read-only.

        Raises:
            UserError: the file is not what was written; it is named.
        """
        found = self._maps.pop(name, None)
        if found is None:
            self._verify(name)
            if len(self._maps) >= _OPEN_MAPS:
                self._maps.pop(next(iter(self._maps)))
            found = self._map(name)
        self._maps[name] = found
        return found[1]

    def _verify(self, name: str) -> None:
        path = self.folder / name
        if self._checked is None:
            stamps = self.folder / STAMPS
            self._checked = json.loads(stamps.read_text()) if stamps.exists() else {}
        state = _state(path) if path.exists() else None
        if self._checked.get(name) != state or state is None:
            if state is None or checksum(path) != self.manifest["files"][name]:
                raise UserError(f"{path}: damaged (checksum differs): run precompute.py again, it makes this file anew")
            self._checked[name] = state

    def _map(self, name: str) -> tuple[mmap.mmap, dict[str, np.ndarray]]:
        header, start = _header(self.folder / name)
        with open(self.folder / name, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        columns = {}
        for column, entry in header.items():
            if column != "__metadata__":
                begin, shape = start + entry["data_offsets"][0], entry["shape"]
                flat = np.frombuffer(mapped, _DTYPES[entry["dtype"]], int(np.prod(shape)), begin)
                columns[column] = flat.reshape(shape)
        return mapped, columns

    def read(self, size: int) -> None:
        """Say that `size` bytes were read: now and then, pages that were read are given back."""
        self._touched += size
        if self._touched > _RESIDENT:
            self._touched = 0
            for mapped, _ in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)


def dense(columns: dict[str, np.ndarray], begin: int, end: int, block: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, logprobs) [end − begin, k] of the rows begin:end of a distribution shard, all of them in `block`."""
    if "counts" not in columns:
        return columns["ids"][begin:end], columns["logprobs"][begin:end]
    entries = slice(columns["starts"][block], columns["starts"][block + 1])
    used = np.arange(k) < columns["counts"][begin:end, None]
    ids, logprobs = np.zeros(used.shape, columns["ids"].dtype), np.full(used.shape, -np.inf, np.float16)
    ids[used], logprobs[used] = columns["ids"][entries], columns["logprobs"][entries]
    return ids, logprobs


# --- what is inside --------------------------------------------------------------------------------------------------


def stores(path: Path) -> list[Path]:
    """Finished stores at or below `path`: one store, one kind of them, or a whole artifacts folder."""
    if (path / MANIFEST).exists():
        return [path]
    found = [m.parent for kind in ("tokens", "source", "aligned") for m in path.glob(f"**/{kind}/*/{MANIFEST}")]
    found += [m.parent for m in path.glob(f"*/{MANIFEST}") if m.parent not in found]
    if not found:
        raise UserError(f"{path}: no finished store here (no {MANIFEST})")
    return sorted(found)


def show(folders: list[Path]) -> None:
    """A table of the stores: what they hold and what made them."""
    table = Table(title="stores")
    for column in ("store", "made of", "positions", "K", "bytes/position", "coverage", "CE", "kept mass"):
        table.add_column(column)
    for folder in folders:
        m = read_manifest(folder)
        made = m["recipe"].get("source", m["recipe"])
        model = made.get("model", {})
        where = made.get("tokens", made).get("corpus", {})
        what = [f"{k} {str(v)[:40]}" for k, v in model.items() if v] or [f"corpus {str(where)[:60]}"]
        if "alignment" in m["recipe"]:
            what.append(f"alignment {m['recipe']['alignment']['criterion']}")
        size = sum((folder / name).stat().st_size for name in m["files"])
        positions = m.get("tokens", m.get("positions", 0))
        figures = [f"{m[f]:.3f}" if f in m else "" for f in ("coverage", "cross_entropy", "kept_mass")]
        cells = f"{positions:,}", str(m.get("k", "")), f"{size / max(1, positions):.2f}"
        table.add_row(f"{folder.parent.name}/{folder.name}", ", ".join(what), *cells, *figures)
    Console().print(table)


def export(folder: Path, output: Path) -> None:
    """A folder of parquet files, a row per block, that `datasets.load_dataset` reads and the Hub can host.

    Lists have the store's own types; a tokens store gives ids, counted and text, a distribution store ids and logprobs
    (entries of all positions one after the other, `counts` of them at each), ce and block_ce.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = Store(folder)
    output.mkdir(parents=True, exist_ok=True)
    for name in store.shards():
        columns = store.shard(name)
        blocks = len(columns["bytes"] if "text" in columns else columns["block_ce"])
        table = pa.table(_rows(columns, blocks, store.manifest))
        part, _, number = name.removesuffix(".safetensors").rpartition("-")
        pq.write_table(table, output / f"{part or 'train'}-{number}.parquet", compression="zstd")
    print(f"{folder}: {len(store.shards())} files in {output}")


def _rows(columns: dict[str, np.ndarray], blocks: int, manifest: dict[str, Any]) -> dict[str, Any]:
    import pyarrow as pa

    def lists(values: np.ndarray, offsets: np.ndarray) -> Any:
        kind = pa.bool_() if values.dtype == bool else pa.from_numpy_dtype(values.dtype)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, kind))

    if "text" in columns:
        text = columns["text"].tobytes()
        at = columns["text_offsets"]
        texts = [text[at[b] : at[b + 1]].decode() for b in range(blocks)]
        return {name: lists(columns[name], columns["offsets"]) for name in ("ids", "counted")} | {"text": texts}
    rows, k = columns["offsets"], manifest["k"]
    entries = columns["starts"] if "counts" in columns else rows * k
    counts = columns["counts"] if "counts" in columns else np.full(rows[-1], k, np.uint16)
    return {
        "ids": lists(columns["ids"].reshape(-1), entries),
        "logprobs": lists(columns["logprobs"].reshape(-1), entries),
        "counts": lists(counts, rows),
        "ce": lists(columns["ce"], rows),
        "block_ce": columns["block_ce"],
    }


def main() -> int:
    parser = argparse.ArgumentParser("python -m fusion.store", description="What is inside a store of distributions.")
    parser.add_argument("path", type=Path, help="a store, or a folder of stores")
    parser.add_argument("--verify", action="store_true", help="check every checksum; exit code 1 if one differs")
    parser.add_argument(
        "--export", nargs="?", const="parquet", metavar="parquet", help="write a folder of parquet files"
    )
    parser.add_argument("-o", "--output", type=Path, help="folder of the export; default: STORE-parquet")
    options = parser.parse_args()
    try:
        folders = stores(options.path)
        show(folders)
        bad = [folder / name for folder in folders if options.verify for name in damaged(folder, thorough=True)]
        for path in bad:
            print(f"{path}: damaged, the next run makes it anew")
        if options.verify and not bad:
            print(f"every checksum of {len(folders)} stores is right")
        for folder in folders if options.export else []:
            if options.export != "parquet":
                raise UserError(f"--export {options.export}: only parquet")
            beside = folder.with_name(f"{folder.name}-parquet")
            export(
                folder,
                options.output / folder.name if options.output and len(folders) > 1 else options.output or beside,
            )
        return 1 if bad else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
