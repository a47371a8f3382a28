"""Checking a merge afterwards: every checksum, and a random sample of chunks merged again from the inputs."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fusion.artifact import checksum
from fusion.config import Merge, UserError
from fusion.merging.files import Model, stored
from fusion.merging.job import Job, prepare
from fusion.merging.run import MANIFEST, Streams, source_width
from fusion.merging.streaming import CHUNK

SAMPLE = 4  # chunks of a tensor that are merged again


def verify(folder: str | Path, tensors: int = 8, seed: int | None = None) -> list[str]:
    """What is wrong with a merged folder, one line each; empty when everything agrees.

    Raises:
        UserError: the folder holds no merge, or its inputs are not there any more.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no {MANIFEST} ({error}): point to a folder that merge.py wrote") from error
    problems = [p for f, facts in manifest["outputs"].items() if (p := file_problem(folder, f, facts))]
    if any(problem.endswith(("missing", "bytes")) for problem in problems):
        return problems
    problems += weights_problems(Model("output", str(folder)), "", manifest["outputs"])
    job = again(manifest, folder)
    for model, facts in zip(job.inputs, manifest["inputs"], strict=True):
        problems += weights_problems(
            model, f"input {model.path}/", {f: {"xxh3_tree": d} for f, d in facts["files"].items()}
        )
    return problems or sample_problems(job, folder, tensors, random.Random(seed))


def file_problem(folder: Path, file: str, facts: dict[str, Any]) -> str:
    path = folder / file
    if not path.exists():
        return f"{file} is missing"
    if path.stat().st_size != facts["bytes"]:
        return f"{file} has {path.stat().st_size} bytes, not {facts['bytes']} bytes"
    return f"{file} changed" if "sha256" in facts and checksum(path) != facts["sha256"] else ""


def weights_problems(model: Model, prefix: str, files: dict[str, dict[str, Any]]) -> list[str]:
    """Files of a model whose checksum is another than the one given, read again by all cores."""
    model.digests.clear()
    with ThreadPoolExecutor() as pool:
        list(pool.map(model.tensor_digest, model.entries))
    known = {file: facts["xxh3_tree"] for file, facts in files.items() if "xxh3_tree" in facts}
    return [f"{prefix}{f} changed" for f, d in known.items() if f not in model.maps or model.digest(f) != d]


def again(manifest: dict[str, Any], folder: Path) -> Job:
    """The merge that a manifest describes, prepared once more."""
    recipe = manifest["recipe"]
    base, *models = [entry["path"] for entry in manifest["inputs"]]
    keys = {k: recipe[k] for k in ("granularity", "dtype", "conflicts", "shard_gb")}
    merge = {"method": recipe["method"], **recipe["options"]}
    return prepare(Merge(base=base, models=models, output=str(folder), merge=merge, **keys))


def sample_problems(job: Job, folder: Path, tensors: int, draw: random.Random) -> list[str]:
    """Merge up to SAMPLE chunks of some tensors again and compare the bytes."""
    problems = []
    names = [n for n in job.places if n not in job.kept]
    streams = Streams(job, folder)
    with ThreadPoolExecutor(streams.threads) as streams.workers:
        for name in draw.sample(names, min(tensors, len(names))):
            place, tensor = job.places[name], streams.tensor(name, job.models)
            rule = job.method(tensor, **job.options)
            starts = range(0, tensor.count, CHUNK)
            for start in draw.sample(starts, min(SAMPLE, len(starts))):
                stop = min(start + CHUNK, tensor.count)
                result = rule.apply(tensor.load(start, stop), start)
                values = result[0] if isinstance(result, tuple) else result
                expected = stored(np.ascontiguousarray(values), place.dtype)
                width = source_width(place)
                with open(folder / place.file, "rb") as file:
                    found = os.pread(file.fileno(), (stop - start) * width, place.begin + start * width)
                if expected is None or found != expected.tobytes():
                    problems.append(f"{name} scalars {start}:{stop} are not what the inputs give")
    return problems
