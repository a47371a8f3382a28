"""evaluate.py: models × tasks → one table."""

import math
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from fusion.artifact import fingerprint
from fusion.config import Evaluate, UserError, nearest
from fusion.evaluation import bits_per_byte, models, tables
from fusion.evaluation.cells import RECORDS, Cell, Outcome, Task, column, measure
from fusion.evaluation.statistics import draws, interval, value


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Measure, print and write the table; returns its figures (`score`: mean or only column of the last model).

    Raises:
        UserError: before any model is loaded, and before anything is written to `output`.
    """
    if config.compare:
        return tables.compare([Path(p) for p in config.compare], Path(config.output))
    if not config.models:
        raise UserError("models is empty: give Hugging Face folders or hub names, e.g. 'models=[A,B]'")
    names = models.labels(config.models)
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"models: {twice} is given twice; give each model once")
    baseline = names[_index(config.baseline or config.models[0], config.models, names)]
    tasks, skipped = planner(config.evaluation.kind)(config.evaluation)
    folders = {name: models.resolve(path) for name, path in zip(names, config.models, strict=True)}
    members = [models.resolve(path, "evaluation.ensemble") for path in config.evaluation.ensemble]
    if config.plan:
        print("\n".join(f"{name}: {', '.join(task.name for task in tasks)}" for name in names))
        return {}
    rows = {name: _row(config, folder, tasks) for name, folder in folders.items()}
    if members:
        name = "ensemble of " + " + ".join(models.labels(config.evaluation.ensemble))
        rows[name] = _ensemble(config, [_row(config, folder, tasks) for folder in members], tasks)
    results = summarize(rows, baseline, resamples=config.evaluation.bootstrap, seed=config.seed)
    results |= {
        "kind": config.evaluation.kind,
        "skipped": skipped,
        "command": " ".join(sys.argv),
        "versions": versions(),
    }
    what = config.evaluation.tasks if config.evaluation.kind == "harness" else [config.evaluation.kind]
    results["title"] = f"{', '.join(what)} against {baseline}"
    results["models"] = dict(zip(names, config.models, strict=True))
    output = Path(config.output)
    write_examples(output, rows)
    tables.write(results, output)
    if config.logger.wandb:
        tables.to_wandb(results, output)
    flat = {f"{n}/{c}": cell["value"] for n, r in results["rows"].items() for c, cell in r.items() if cell}
    last = results["rows"][names[-1]]
    summary = last.get("mean") or next((cell for cell in last.values() if cell), None)
    return flat | ({"score": summary["value"]} if summary else {})


def planner(kind: str) -> Callable[..., tuple[list[Task], list[str]]]:
    """What makes tasks of a config; imported on demand, lm-eval takes seconds."""
    if kind == "bits_per_byte":
        return bits_per_byte.plan
    if kind == "mt_bench":
        from fusion.evaluation import mt_bench

        return mt_bench.plan
    from fusion.evaluation import harness

    return harness.plan


def _index(wanted: str, paths: list[str], names: list[str]) -> int:
    for known in (paths, names):
        if wanted in known:
            return known.index(wanted)
    raise UserError(f"baseline={wanted} is none of the models{nearest(wanted, names)}")


def _row(config: Evaluate, folder: Path, tasks: list[Task]) -> dict[str, Cell]:
    """Every task on one model, loaded at most once and only if a cell is missing."""
    options, loaded = config.evaluation, []

    def load() -> tuple[Any, Any]:
        if not loaded:
            loaded.append(models.load(folder, dtype=options.dtype, device=options.device))
        return loaded[0]

    identity, extra = models.content(folder), {"dtype": options.dtype, "device": models.device_of(options.device)}
    return {task.name: measure(Path(config.artifacts), task, identity, load, extra) for task in tasks}


def _ensemble(config: Evaluate, members: list[dict[str, Cell]], tasks: list[Task]) -> dict[str, Cell]:
    """Cells of the probability average, from the members' log-probabilities: no forward pass."""
    if config.evaluation.kind != "bits_per_byte":
        raise UserError("evaluation.ensemble works with evaluation=bits_per_byte only: empty it")
    row = {}
    for task in tasks:
        cells = [one[task.name] for one in members]
        if len({cell.facts["vocabulary"] for cell in cells}) > 1:
            raise UserError("evaluation.ensemble: its models have different tokenizers; give models of one tokenizer")

        def run(*_: Any, cells: list[Cell] = cells) -> Outcome:
            logprobs = [[np.array(x, np.float32) for x in column(cell.folder, "logprobs")] for cell in cells]
            sizes = cells[0].vectors["bits_per_byte"][:, 1]
            found = bits_per_byte.score(bits_per_byte.ensemble(logprobs), sizes.astype(int).tolist(), [0] * len(sizes))
            return Outcome(bits_per_byte.records(found), bits_per_byte.METRICS, cells[0].facts)

        identity = {"ensemble": fingerprint(sorted(str(cell.folder.name) for cell in cells))}
        row[task.name] = measure(Path(config.artifacts), task._replace(run=run), identity, lambda: (None, None), {})
    return row


def summarize(rows: dict[str, dict[str, Cell]], baseline: str, *, resamples: int, seed: int) -> dict[str, Any]:
    """The table's numbers: value, 95 % interval, relative change against the baseline, whether it is significant.

    A difference is significant where the middle 95 % of its paired bootstrap leaves out zero.
    """
    columns, sums = _columns(rows, baseline), {}
    spreads: dict[str, dict[str, tuple[float, np.ndarray | None]]] = {name: {} for name in rows}
    for title, kind in columns.items():
        for name, row in rows.items():
            if kind["metric"]:
                sums[title, name] = row[kind["task"]].vectors[kind["metric"]]
                spreads[name][title] = _spread(sums[title, name], kind["formula"], resamples, seed, title)
    main = [title for title, kind in columns.items() if kind["metric"] and title == kind["task"]]
    formulas = {columns[t]["formula"] for t in main}
    alike = len({columns[t]["higher_is_better"] for t in main}) == 1
    if len(main) > 1 and alike and (len(formulas) == 1 or formulas <= {"percent", "bleu"}):
        kind = {k: columns[main[0]][k] for k in ("formula", "higher_is_better")}
        columns["mean"] = {"task": None, "metric": "mean of the columns", **kind}
        for found in spreads.values():
            points, several = zip(*(found[t] for t in main), strict=True)
            found["mean"] = float(np.mean(points)), None if several[0] is None else np.mean(several, axis=0)
        if formulas == {"ratio"}:
            columns["weighted"] = {"task": None, "metric": "all bytes together", **kind}
            for name, found in spreads.items():
                whole = np.concatenate([sums[title, name] for title in main])
                found["weighted"] = _spread(whole, "ratio", resamples, seed, "weighted")
    table = {
        name: {c: _cell(found[c], spreads[baseline][c]) if c in found else None for c in columns}
        for name, found in spreads.items()
    }
    for name, row in rows.items():
        for title in main:
            cell = row[title]
            if table[name][title] is None:
                continue
            table[name][title]["metrics"] = {m: value(cell.vectors[m], f["formula"]) for m, f in cell.metrics.items()}
    return {"baseline": baseline, "columns": columns, "rows": table, "bootstrap": resamples, "seed": seed}


def _columns(rows: dict[str, dict[str, Cell]], baseline: str) -> dict[str, dict[str, Any]]:
    """A column per task, its first metric; more where a task asks for it (MT-Bench's turns and categories)."""
    columns: dict[str, dict[str, Any]] = {}
    for task, first in rows[baseline].items():
        cells = {name: row[task] for name, row in rows.items()}
        if any(cell.examples != first.examples for cell in cells.values()):
            raise AssertionError(f"{task}: the models were measured on different examples")
        facts = {"examples": len(first.examples), "facts": {name: cell.facts for name, cell in cells.items()}}
        metrics = list(first.metrics)
        main = metrics[0] if metrics else None
        columns[task] = {"task": task, "metric": main, **first.metrics.get(main, {}), **facts}
        for metric in metrics[1:]:
            if first.metrics[metric].get("column"):
                columns[metric] = {"task": task, "metric": metric, **first.metrics[metric]}
    return columns


def _spread(vectors: np.ndarray, formula: str, resamples: int, seed: int, task: str) -> tuple[float, np.ndarray | None]:
    return value(vectors, formula), draws(vectors, formula, resamples, seed, task) if resamples else None


def _cell(own: tuple[float, np.ndarray | None], base: tuple[float, np.ndarray | None]) -> dict[str, Any] | None:
    (point, spread), (base_point, base_spread) = own, base
    if math.isnan(point):  # nothing was scored: a category of which the judge rated no answer
        return None
    cell: dict[str, Any] = {"value": point, "change": 100 * (point - base_point) / base_point if base_point else None}
    if spread is not None and base_spread is not None:
        low, high = interval(spread - base_spread)
        cell |= {"interval": interval(spread), "difference": (low, high), "significant": bool(low > 0 or high < 0)}
    return cell


def write_examples(output: Path, rows: dict[str, dict[str, Cell]]) -> None:
    """`examples.parquet`: every example of every cell; completions of the code tasks beside it."""
    output.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for name, row in rows.items():
        for task, cell in row.items():
            for record in parquet.read_table(cell.folder / RECORDS).to_pylist():
                metrics = list((record.pop("metrics", None) or {}).items())
                record.pop("logprobs", None)
                records.append({"model": name, "task": task, **record, "metrics": metrics})
            if (cell.folder / "completions").is_dir():
                folder = output / "completions" / name.replace("/", "_")
                shutil.copytree(cell.folder / "completions", folder, dirs_exist_ok=True)
    texts = dict.fromkeys(k for record in records for k in record if k != "metrics")
    vectors = pa.map_(pa.string(), pa.list_(pa.float64()))
    schema = pa.schema([*((k, pa.string()) for k in texts), ("metrics", vectors)])
    beside = output / f".{RECORDS}"
    parquet.write_table(pa.Table.from_pylist(records, schema), beside, compression="zstd")
    beside.replace(output / RECORDS)


def versions() -> dict[str, str]:
    names = ("fusion", "torch", "transformers", "datasets", "lm_eval", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
