"""Hugging Face folders of safetensors: memory-mapped on the way in, headers known in advance on the way out.

A checksum here is a tree, so that threads can take it while they read: the xxh3-128 of a file's header followed by
one digest per tensor (in file order), which is the xxh3-128 of the digests of the tensor's chunks.
"""

import json
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fusion.config import UserError
from fusion.merging.kernels import finite, narrow_bfloat16, widen_bfloat16
from fusion.merging.streaming import CHUNK

STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}  # what arithmetic can read
COPIED = {"I8": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "BOOL": 1}  # bytes each
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)(\.index\.json)?$")
OURS = {"README.md", "manifest.json", "merge_manifest.json", "merge_weights.csv", "merge_weights.png"}


class Entry(NamedTuple):
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def width(dtype: str) -> int:
    return np.dtype(STORED[dtype]).itemsize if dtype in STORED else COPIED[dtype]


class Model:
    """A folder of safetensors, opened: every tensor of every file, read where it lies."""

    def __init__(self, where: str, given: str) -> None:
        """`where` names the option for error messages, `given` is a folder or a hub name."""
        self.name = given
        self.path = resolve(where, given)
        self.config = read_json(self.path / "config.json") if (self.path / "config.json").exists() else {}
        self.headers: dict[str, bytes] = {}
        self.entries: dict[str, Entry] = {}
        self.maps: dict[str, mmap.mmap] = {}
        self.chunks: dict[str, list[bytes]] = {}  # chunk digests as they are taken
        self.known: dict[str, bytes] = {}  # digests of whole tensors
        self.digests: dict[str, str] = {}  # of files, where they are known already
        for file in weight_files(where, self.path):
            self._open(where, file)
        self.signature = {file: signature(self.path / file) for file in sorted(self.maps)}

    def _open(self, where: str, file: str) -> None:
        path = self.path / file
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                length = int.from_bytes(stream.read(8), "little")
                header = stream.read(length) if 8 + length <= size else b""
                tensors = json.loads(header)
                self.maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {path} is no whole safetensors file ({error}): get it again") from error
        self.headers[file] = header
        tensors.pop("__metadata__", None)
        for name, value in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (8 + length + offset for offset in value["data_offsets"])
            entry = Entry(file, value["dtype"], tuple(value["shape"]), begin, end)
            if end > size:
                raise UserError(f"{where}: {path} is cut short (tensor {name}): get it again")
            if name in self.entries:
                raise UserError(f"{where}: tensor {name} is in {self.entries[name].file} and in {file}: remove one")
            if entry.dtype not in STORED and entry.dtype not in COPIED:
                raise UserError(f"{where}: tensor {name} of {path} is {entry.dtype}: convert it to bfloat16 first")
            self.entries[name] = entry
            self.chunks[name] = [b""] * -(-entry.count // CHUNK)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Scalars start:stop of a tensor as they are stored (bfloat16 as uint16, what is copied as bytes)."""
        entry = self.entries[name]
        stop = entry.count if stop is None else stop
        size = width(entry.dtype)
        kind = STORED.get(entry.dtype, np.dtype(f"V{size}"))
        return np.frombuffer(self.maps[entry.file], kind, stop - start, entry.begin + start * size)

    def read(self, name: str, start: int, stop: int, out_n: np.ndarray) -> None:
        """Scalars start:stop as float32 into `out_n`; the first to read a chunk takes its digest.

        Raises:
            UserError: the chunk holds an infinity or NaN; names file and tensor.
        """
        entry, values = self.entries[name], self.raw(name, start, stop)
        if entry.dtype == "BF16":
            sound = widen_bfloat16(values, out_n.view(np.uint32))
        else:
            out_n[:] = values
            sound = finite(out_n.view(np.uint32))
        if not sound:
            raise UserError(f"{self.path / entry.file}: tensor {name} holds an infinity or NaN: repair the model")
        if not (chunk := self.chunks[name])[start // CHUNK]:
            chunk[start // CHUNK] = xxhash.xxh3_128_digest(values)

    def forget(self, name: str) -> None:
        """Give the pages of a tensor back, so that resident memory stays small. They stay in the system's cache."""
        entry = self.entries[name]
        begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        self.maps[entry.file].madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def tensor_digest(self, name: str) -> bytes:
        """Of a tensor; its chunks that nobody has read yet are read now."""
        if name not in self.known:
            count, taken = self.entries[name].count, self.chunks[name]
            for i, start in enumerate(range(0, count, CHUNK)):
                if not taken[i]:
                    values = self.raw(name, start, min(start + CHUNK, count))
                    taken[i] = xxhash.xxh3_128_digest(values.view(np.uint8))
            self.known[name] = xxhash.xxh3_128_digest(b"".join(taken))
        return self.known[name]

    def digest(self, file: str) -> str:
        if file not in self.digests:
            names = [name for name, entry in self.entries.items() if entry.file == file]
            tree = xxhash.xxh3_128(self.headers[file])
            for name in names:
                tree.update(self.tensor_digest(name))
            self.digests[file] = tree.hexdigest()
        return self.digests[file]

    @property
    def content(self) -> str:
        """One digest of all weights."""
        return xxhash.xxh3_128_hexdigest("".join(f"{f}:{self.digest(f)};" for f in sorted(self.maps)).encode())

    @property
    def bytes(self) -> int:
        return sum(entry.end - entry.begin for entry in self.entries.values())


def resolve(where: str, given: str) -> Path:
    """A local folder as it is, else the snapshot of a hub repository."""
    if not given:
        raise UserError(f"{where} is empty: set it to a Hugging Face folder or hub name")
    if Path(given).expanduser().is_dir():
        return Path(given).expanduser()
    if given.count("/") > 1 or given.startswith((".", "/", "~")):
        raise UserError(f"{where}={given}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(given, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}={given}: no such folder, and the Hub has none either ({reason})") from error


def weight_files(where: str, folder: Path) -> list[str]:
    """The safetensors files of a model folder, as the index or the standard name says."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
        if missing := [file for file in files if not (folder / file).exists()]:
            raise UserError(f"{where}: {folder} lacks {', '.join(missing)}, which its index names: get it again")
        if files:
            return files
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    files = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    if not files:
        raise UserError(f"{where}: no safetensors in {folder}: save the model with save_pretrained first")
    return files


def signature(file: Path) -> list[int]:
    """Size, times and inode: while they are unchanged, so is the content."""
    s = file.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable JSON ({error})") from error


# --- out -------------------------------------------------------------------------------------------------------------


def layout(entries: Iterable[tuple[str, Entry]], dtype: str, shard_bytes: int) -> tuple[dict[str, bytes], dict]:
    """Headers (length prefix included) of the output files, and where every tensor goes. Deterministic.

    `dtype` replaces the storage type of floating tensors where it is not empty.
    """
    shards: list[list[tuple[str, str, Entry]]] = [[]]
    room = shard_bytes
    for name, entry in entries:
        kind = NAMES[dtype] if dtype and entry.dtype in STORED else entry.dtype
        size = entry.count * width(kind)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, kind, entry))
        room -= size
    headers, places = {}, {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        shard.sort(key=lambda item: -width(item[1]))  # wide ones first: every tensor is aligned
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset, spans = 0, {}
        for name, kind, entry in shard:
            end = offset + entry.count * width(kind)
            table[name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [offset, end]}
            spans[name] = (kind, entry.shape, offset, end)
            offset = end
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        base = len(headers[file])
        places |= {name: Entry(file, k, shape, base + b, base + e) for name, (k, shape, b, e) in spans.items()}
    return headers, places


def stored(values_n: np.ndarray, dtype: str) -> np.ndarray | None:
    """float32 as it is written; None where it does not fit (`float16` ends at 65,504)."""
    if not finite(values_n.view(np.uint32)):
        return None
    if dtype == "BF16":
        out = np.empty(values_n.size, np.uint16)
        narrow_bfloat16(values_n.view(np.uint32), out)
        return out
    with np.errstate(over="ignore"):
        out = values_n.astype(STORED[dtype], copy=False)
    return None if dtype == "F16" and not np.isfinite(out).all() else out


def index(places: dict[str, Entry]) -> dict[str, Any]:
    total = sum(entry.end - entry.begin for entry in places.values())
    return {"metadata": {"total_size": total}, "weight_map": {n: e.file for n, e in sorted(places.items())}}


def side_files(folder: Path) -> list[Path]:
    """What belongs to a model besides its weights: configs, tokenizer, templates, licence."""
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    return [p for p in files if not WEIGHTS.search(p.name) and p.name not in OURS and p.name != "config.json"]
