"""A cell of the table: one model on one task, measured once, found again by content."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from fusion.artifact import artifact, read_manifest

RECORDS = "examples.parquet"


class Outcome(NamedTuple):
    """What a task found on one model.

    `records`: a dict per example with `example` (its id), `metrics` {metric: its vector} and whatever explains them.
    `metrics`: {metric: {"formula", "higher_is_better"}}, the primary one first; empty when nothing was scored.
    `facts`: what the table should say besides (counts, truncations).
    """

    records: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    facts: dict[str, Any]


class Task(NamedTuple):
    """`recipe`: everything but the model that the outcome depends on. `run(model, tokenizer, folder)`: measure;
    files that belong to the outcome go into `folder`, which may hold finished pieces of a killed run. `then`: a second
    task that works on what the first one wrote (grading, running code); its `run` is given that cell's folder."""

    name: str
    recipe: dict[str, Any]
    run: Callable[[Any, Any, Path], Outcome]
    then: "Task | None" = None


class Cell(NamedTuple):
    """An outcome read back: `vectors[metric]` float64 [N, M], in the order of `examples`."""

    folder: Path
    examples: list[str]
    vectors: dict[str, np.ndarray]
    metrics: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def spread(count: int, limit: int) -> list[int]:
    """`limit` of `count` examples, evenly spread: files are often sorted by answer or by kind."""
    return list(range(count)) if not limit or limit >= count else [i * count // limit for i in range(limit)]


def measure(
    root: Path, task: Task, model: dict[str, Any], load: Callable[[], tuple[Any, Any]], extra: dict[str, Any]
) -> Cell:
    """The cell of `task` on the model that `model` identifies; `load()` is called only when it is not there yet."""

    def build(partial: Path) -> dict[str, Any]:
        outcome = task.run(*load(), partial)
        write_records(partial / RECORDS, outcome.records)
        return {"metrics": outcome.metrics, "order": list(outcome.metrics), "facts": outcome.facts}

    versions = {name: version(name) for name in ("torch", "transformers", "lm_eval")}
    recipe = {"task": task.name, "recipe": task.recipe, "model": model, "versions": versions, **extra}
    folder = artifact(root, "evaluation", recipe, build)
    if task.then is None:
        return read(folder)
    return measure(root, task.then, {"cell": folder.name}, lambda: (folder, None), {})


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Parquet with one row per example; whatever is no string and no vector is kept as JSON."""

    def plain(value: Any) -> Any:
        keep = isinstance(value, (str, np.ndarray)) or value is None
        return value if keep else json.dumps(value, ensure_ascii=False, default=str)

    rows = [{k: v if k == "metrics" else plain(v) for k, v in record.items()} for record in records]
    parquet.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def read(folder: Path) -> Cell:
    manifest = read_manifest(folder)
    names = ["example", "metrics"] if manifest["metrics"] else ["example"]
    rows = parquet.read_table(folder / RECORDS, columns=names).to_pylist()
    metrics = {name: manifest["metrics"][name] for name in manifest["order"]}
    vectors = {name: np.array([row["metrics"][name] for row in rows], dtype=np.float64) for name in metrics}
    return Cell(folder, [row["example"] for row in rows], vectors, metrics, manifest["facts"])


def column(folder: Path, name: str) -> list[Any]:
    """One column of a cell's records."""
    return parquet.read_table(folder / RECORDS, columns=[name])[name].to_pylist()
