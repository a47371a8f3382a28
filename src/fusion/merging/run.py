"""The merge itself: inputs checked, tensors streamed from disk to disk, the result renamed into place when whole."""

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from fusion.artifact import checksum, write_json
from fusion.config import Merge, UserError
from fusion.merging import report
from fusion.merging.files import Entry, Model, index, side_files, stored
from fusion.merging.job import Job, prepare
from fusion.merging.kernels import deltas, sums
from fusion.merging.statistics import Movements
from fusion.merging.streaming import CHUNK, Tensor
from fusion.merging.units import unit_of

MANIFEST = "merge_manifest.json"
FLUSH = 1 << 27  # bytes written between two requests to the disk
DRIVERS = 3  # tensors in flight, so that the last chunks of one do not leave threads idle


def merge(config: Merge) -> Path:
    """Merge `models` into `output` as the config says; the folder, found again when it is there already.

    Raises:
        UserError: inputs that do not fit together, non-finite weights, a folder that holds something else.
    """
    job = prepare(config)
    output = Path(config.output).expanduser()
    if config.plan:
        report.print_plan(job)
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = json.loads(json.dumps(job.recipe))
    with FileLock(output.with_name(f".{output.name}.lock")):
        if finished(output, recipe):
            return output
        if output.exists() and (not output.is_dir() or any(output.iterdir())) and not config.overwrite:
            raise UserError(f"output={config.output} holds something else: set overwrite=true, or another output")
        partial = output.with_name(f"{output.name}.partial")
        if partial.exists() and read_recipe(partial) != recipe:
            shutil.rmtree(partial)  # what is left of another merge: never mixed with this one
        partial.mkdir(exist_ok=True)
        write_json(partial / "recipe.json", recipe)
        Streams(job, partial).run()
        old = output.with_name(f"{output.name}.old")
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(output, old)
        os.replace(partial, output)
        sync_folder(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    return output


def finished(output: Path, recipe: dict[str, Any]) -> bool:
    """`output` is the whole result of this recipe."""
    try:
        manifest = json.loads((output / MANIFEST).read_text())
        sizes = {file: facts["bytes"] for file, facts in manifest["outputs"].items()}
        return manifest["recipe"] == recipe and all((output / f).stat().st_size == s for f, s in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_recipe(partial: Path) -> dict[str, Any] | None:
    try:
        return json.loads((partial / "recipe.json").read_text())
    except (OSError, ValueError):
        return None


class Streams:
    """One merge under way: threads, output files, and the journal that lets a killed run continue."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.threads = job.config.threads or len(os.sched_getaffinity(0))
        self.movements = Movements(job.pivot, job.models)
        self.local = threading.local()
        self.lock = threading.Lock()
        self.journal = folder / "journal.jsonl"
        self.device = None if job.config.device == "cpu" else job.config.device
        self.table: dict[str, dict[str, Any]] = {}
        self.unflushed = 0

    def run(self) -> None:
        """Fill the folder: every tensor, then what belongs beside them."""
        self.files = {file: self.open(file, header) for file, header in self.job.headers.items()}
        try:
            self.resume()
            todo = [name for name in self.job.pivot.entries if name not in self.table]
            with (
                ThreadPoolExecutor(self.threads) as self.workers,
                ThreadPoolExecutor(min(DRIVERS, self.threads)) as drivers,
                ThreadPoolExecutor(1) as self.flusher,
                open(self.journal, "a") as self.log,
            ):
                waiting = [drivers.submit(self.one, name) for name in todo]
                try:
                    for future in waiting:
                        future.result()
                except BaseException:
                    for future in waiting:
                        future.cancel()
                    raise
            self.movements.save()
            table = {name: self.table[name] for name in self.job.pivot.entries}
            with ThreadPoolExecutor(1) as last:
                durable = last.submit(lambda: [os.fsync(file) for file in self.files.values()])
                finish(self.job, self.folder, table)  # tables, picture and card while the disk works
                durable.result()
        finally:
            for file in self.files.values():
                os.close(file)

    def open(self, file: str, header: bytes) -> int:
        """An output file at its final size, its header in place."""
        handle = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644)
        size = max([e.end for e in self.job.places.values() if e.file == file], default=len(header))
        try:
            if os.fstat(handle).st_size != size:
                os.ftruncate(handle, 0)
                os.posix_fallocate(handle, 0, size)
        except OSError as error:
            raise UserError(f"output={self.job.config.output}: no room for {size / 1e9:.1f} GB ({error})") from error
        os.pwrite(handle, header, 0)
        return handle

    def resume(self) -> None:
        """Take over the tensors a killed run finished, those whose bytes are what its journal says."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
                name, place = entry["tensor"], self.job.places[entry["tensor"]]
            except (ValueError, KeyError):
                continue  # the line that was being written
            if digest_at(self.files[place.file], place) == entry["digest"]:
                self.table[name] = {"digest": entry["digest"], "weights": entry["weights"]}
                for model, digest in zip(self.job.inputs, entry["inputs"], strict=True):
                    if digest:
                        model.known[name] = bytes.fromhex(digest)

    def load(self, name: str, models: list[Model]) -> Callable[[int, int], Any]:
        """(start, stop) → rows [1+J, n] float32 on the device, the pivot first."""

        def rows(start: int, stop: int) -> Any:
            shape = (1 + len(models), stop - start)
            space = self.local.__dict__.setdefault(shape, None)
            if space is None:
                space = self.local.__dict__[shape] = np.empty(shape, np.float32)
            for row, model in zip(space, [self.job.pivot, *models], strict=True):
                model.read(name, start, stop, row)
            if self.device is None:
                return space
            import torch

            return torch.from_numpy(space).to(self.device)

        return rows

    def tensor(self, name: str, models: list[Model]) -> Tensor:
        return Tensor(
            name,
            self.job.pivot.entries[name].count,
            len(models),
            self.load(name, models),
            self.job.config.granularity,
            lambda statistic, layer_statistic: self.unit_statistic(name, statistic, layer_statistic),
            self.workers,
        )

    def unit_statistic(self, name: str, statistic: str, layer_statistic: str) -> np.ndarray:
        granularity, entries = self.job.config.granularity, self.job.pivot.entries
        unit = unit_of(name, granularity)
        members = [n for n in entries if n not in self.job.kept and unit_of(n, granularity) == unit]
        counts = {n: entries[n].count for n in members}

        def measure(member: str, models: list[Model]) -> np.ndarray:
            square = statistic == "square"
            return self.tensor(member, models).sum(lambda rows, start: sums(deltas(rows, None), square))

        return self.movements.unit(statistic, unit, counts, layer_statistic, measure)

    def one(self, name: str) -> None:
        """Merge one tensor and enter it in the journal."""
        place = self.job.places[name]
        if name in self.job.kept:
            digests, weights = self.copy(name, place), None
        else:
            tensor = self.tensor(name, self.job.models)
            rule = self.job.method(tensor, **self.job.options)
            results = tensor.map(lambda rows, start: self.write(name, place, start, rule.apply(rows, start)))
            digests = [digest for digest, _ in results]
            weights = rule.weights
            if weights is None:
                weights = (np.sum([tally for _, tally in results], axis=0) / max(1, place.count)).tolist()
        digest = xxhash.xxh3_128_hexdigest(b"".join(digests))
        inputs = [m.tensor_digest(name).hex() if name in m.entries and not m.digests else "" for m in self.job.inputs]
        entry = {"tensor": name, "digest": digest, "weights": weights, "inputs": inputs}
        with self.lock:
            self.table[name] = {"digest": digest, "weights": weights}
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
            self.unflushed += place.end - place.begin
            if self.unflushed > FLUSH:
                self.unflushed = 0
                self.flusher.submit(os.fdatasync, self.files[place.file])  # the disk works while we compute
        for model in self.job.inputs:
            if name in model.entries:
                model.forget(name)

    def copy(self, name: str, place: Entry) -> list[bytes]:
        """The pivot's tensor as it is (in the output's dtype, where it is floating)."""
        source, digests = self.job.pivot.entries[name], []
        for start in range(0, source.count, CHUNK):
            stop = min(start + CHUNK, source.count)
            raw = self.job.pivot.raw(name, start, stop)
            if source.dtype != place.dtype:
                values = np.empty(stop - start, np.float32)
                self.job.pivot.read(name, start, stop, values)
                digests.append(self.write(name, place, start, values)[0])
                continue
            data = raw.view(np.uint8)
            os.pwrite(self.files[place.file], data, place.begin + start * source_width(place))
            digests.append(xxhash.xxh3_128_digest(data))
        return digests

    def write(self, name: str, place: Entry, start: int, result: Any) -> tuple[bytes, Any]:
        """A merged chunk to its place in the output. Returns its digest and the sum of per-scalar weights."""
        values, tally = result if isinstance(result, tuple) else (result, None)
        if not isinstance(values, np.ndarray):
            values, tally = values.cpu().numpy(), None if tally is None else tally.cpu().numpy()
        out = stored(np.ascontiguousarray(values), place.dtype)
        if out is None:
            raise UserError(f"tensor {name} of the result does not fit into {place.dtype}: set dtype=bfloat16")
        os.pwrite(self.files[place.file], out, place.begin + start * source_width(place))
        return xxhash.xxh3_128_digest(out), tally


def source_width(place: Entry) -> int:
    return (place.end - place.begin) // max(1, place.count)


def digest_at(file: int, place: Entry) -> str:
    """Digest of a tensor as it stands in an output file."""
    size, digests = source_width(place) * CHUNK, []
    for begin in range(place.begin, place.end, max(1, size)):
        digests.append(xxhash.xxh3_128_digest(os.pread(file, min(size, place.end - begin), begin)))
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def tree_digest(header: bytes, places: dict[str, Entry], file: str, table: dict[str, dict[str, Any]]) -> str:
    """The checksum of an output file (see files.py), from the digests of its tensors."""
    tree = xxhash.xxh3_128(header[8:])
    ours = sorted((p.begin, p.end, n) for n, p in places.items() if p.file == file)
    for *_, name in ours:
        tree.update(bytes.fromhex(table[name]["digest"]))
    return tree.hexdigest()


def finish(job: Job, folder: Path, table: dict[str, dict[str, Any]]) -> None:
    """Everything beside the weights: index, configs, tokenizer, card, weights table, manifest."""
    recipe = read_recipe(folder)
    for path in side_files(job.pivot.path):
        shutil.copyfile(path, folder / path.name)
    if len(job.headers) > 1:
        write_json(folder / "model.safetensors.index.json", index(job.places))
    if job.pivot.config:
        write_json(folder / "config.json", job.pivot.config | dtype_keys(job))
    report.write_weights(job, folder, table)
    report.write_card(job, folder, table)
    (folder / "recipe.json").unlink(missing_ok=True)
    (folder / "journal.jsonl").unlink(missing_ok=True)
    outputs = {}
    for path in sorted(p for p in folder.iterdir() if p.name != MANIFEST):
        facts: dict[str, Any] = {"bytes": path.stat().st_size}
        if path.name in job.headers:
            facts["xxh3_tree"] = tree_digest(job.headers[path.name], job.places, path.name, table)
        else:
            facts["sha256"] = checksum(path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        outputs[path.name] = facts
    write_json(folder / MANIFEST, report.manifest(job, table, recipe, outputs))
    sync_folder(folder)


def dtype_keys(job: Job) -> dict[str, str]:
    """The dtype entries of config.json, where `dtype` changes them."""
    if not job.config.dtype:
        return {}
    keys = [k for k in ("dtype", "torch_dtype") if k in job.pivot.config] or ["dtype"]
    return dict.fromkeys(keys, job.config.dtype)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def stage(config: Merge) -> dict[str, Any]:
    """`merge` as a job of launch.py: under -m every job has its own folder below `output`; returns figures."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized() and HydraConfig.get().mode.name == "MULTIRUN":
        job = HydraConfig.get().job
        config = dataclasses.replace(config, output=str(Path(config.output) / (job.override_dirname or str(job.num))))
    begun = time.perf_counter()
    output = merge(config)
    if config.plan:
        return {"plan": report.plan(prepare(config))}
    seconds = time.perf_counter() - begun
    print(f"{output} ({seconds:.1f} s)")
    return {"output": str(output), "seconds": seconds, "anonymous_mb": anonymous_mb()}


def anonymous_mb() -> float:
    """Anonymous resident memory of this process now, in MB: what is not backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon")), 0.0)
