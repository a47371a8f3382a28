"""fuse.py: every arm of the comparison trained, merged, measured, and told in one report."""

import csv
import io
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fusion.artifact import MANIFEST, Missing, fingerprint, read_manifest, searching, write_atomic, write_json
from fusion.config import Evaluate, Logger, Merge, Run, UserError
from fusion.launch import quiet
from fusion.stages import distributions, grown, refuse_foreign, resolve, train_target

TEXT_ONLY, FUSELLM, TARGET = "text only", "FuseLLM", "target as it was"
PAIR, MERGED = "FuseChat pair", "FuseChat merge"


@dataclass
class Row:
    """A model of the comparison: what the table calls it, its kind, its seed (None: trained by no seed), its folder."""

    name: str
    group: str
    seed: int | None
    path: str


def fuse(config: Run) -> dict[str, Any]:
    """The main job. Returns the figures of the report; whatever was computed before is found again."""
    if config.plan:
        from fusion.plan import print_plan

        return print_plan(config)
    output = Path(config.output or Path(config.artifacts) / "results")
    refuse_foreign(output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / MANIFEST, {"kind": "results", "recipe": asdict(config)})
    models = [config.target, *config.sources.values()]
    several("growing", [(grown, llm, config) for llm in models if llm.grow.architecture], config)
    config = resolve(config)
    by_source = [(distributions, replace(config, sources={n: llm})) for n, llm in config.sources.items()]
    several("running the sources", by_source, config)
    stores = distributions(config)
    runs = list(arms(config))
    several("training", [(train_target, run) for *_, run in runs], config)
    rows = [Row(TARGET, "target", None, config.target.path)]
    rows += [Row(name, "source", None, llm.path) for name, llm in config.sources.items()]
    rows += [Row(name, group, run.seed, str(train_target(run))) for name, group, run in runs]
    rows += list(merged(config, rows))
    measured = measure(config, rows, output)
    if config.evaluation.kind != "bits_per_byte":
        return measured | {"output": str(output)}
    return report(config, rows, measured, stores, output)


# --- training --------------------------------------------------------------------------------------------------------


def arms(config: Run) -> Iterator[tuple[str, str, Run]]:
    """(row, group, config) of every training run."""
    for seed in config.seeds:
        run = replace(config, seed=seed)
        if "text_only" in config.arms:
            yield TEXT_ONLY, "text only", replace(run, objective=replace(run.objective, lambda_clm=1.0))
        if "fusellm" in config.arms:
            yield FUSELLM, "fused", run
        if "fusechat" in config.arms:
            for name, source in config.sources.items():
                yield f"pivot + {name}", PAIR, replace(run, sources={name: source})


def several(what: str, tasks: list[tuple], config: Run) -> None:
    """Run tasks (function, arguments) whose results are artifacts, a few processes at a time, under one bar.

    The caller finds the results in the cache. On a CPU one thread a process is the fast way to use the cores; devices
    other than a CPU, and several ranks, do one task after the other.
    """
    tasks = [task for task in tasks if not found(*task)]
    alone = config.trainer.strategy == "single" and config.trainer.accelerator == "cpu"
    jobs = min(config.jobs or (os.cpu_count() or 1 if alone else 1), len(tasks))
    if jobs < 2:
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=end_with_parent) as pool,
        Progress(*columns, disable=not config.trainer.progress) as progress,
    ):
        bar = progress.add_task(what, total=len(tasks))
        waiting = [pool.submit(quietly, *task) for task in tasks]
        try:
            for done in as_completed(waiting):
                done.result()
                progress.advance(bar)
        except BaseException:
            for process in list(pool._processes.values()):
                process.kill()  # whatever they made so far is continued by the next run
            raise


def found(function: Callable, *arguments: Any) -> bool:
    """Whether everything that a task would compute is there already."""
    try:
        with searching():
            function(*arguments)
    except Missing:
        return False
    return True


def end_with_parent() -> None:
    """A killed main process leaves nobody behind who goes on computing."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def quietly(function: Callable, *arguments: Any) -> None:
    """A task in a process of its own: one thread, nothing shown."""
    import torch

    quiet()
    torch.set_num_threads(1)
    *first, config = arguments
    with redirect_stdout(io.StringIO()):
        function(*first, replace(config, trainer=replace(config.trainer, threads=1, progress=False), logger=Logger()))


def merged(config: Run, rows: list[Row]) -> Iterator[Row]:
    """The pairwise targets of each seed, merged in every way that `merges` names."""
    from fusion.merging import merge

    for seed in config.seeds:
        models = [row.path for row in rows if row.group == PAIR and row.seed == seed]
        if len(models) < 2:
            continue
        for name, method in config.merges.items():
            recipe = [config.target.path, models, method, config.granularity]
            folder = Path(config.artifacts) / "merged" / fingerprint(recipe)
            merge(Merge(config.target.path, models, str(folder), method, config.granularity))
            yield Row(f"{name} merge", MERGED, seed, str(folder))


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(config: Run, rows: list[Row], output: Path) -> dict[str, Any]:
    """Every row on every task; with bits per byte and no texts given, on the corpus's held-out documents."""
    from fusion.evaluation import evaluate

    options = config.evaluation
    if options.kind == "bits_per_byte" and not options.texts:
        options = replace(options, texts=[str(p) for p in held_out(config, output / "held_out")], field="text")
    named = [link(row, output / "models") for row in rows]
    baseline = next((path for path, row in zip(named, rows, strict=True) if row.name == TEXT_ONLY), named[0])
    folder = output / "evaluation"
    evaluate(Evaluate(named, baseline, [], str(folder), options, config.artifacts, config.logger, config.seed))
    measured = json.loads((folder / "results.json").read_text())
    paths = {path: label for label, path in measured["models"].items()}
    return measured | {"labels": [paths[path] for path in named]}


def link(row: Row, folder: Path) -> str:
    """A readable name for a row's model folder, inside the results; a hub name stays what it is."""
    if not Path(row.path).is_dir():
        return row.path
    folder.mkdir(parents=True, exist_ok=True)
    seed = "" if row.seed is None else f"-seed{row.seed}"
    name = folder / f"{row.name.replace(' ', '_')}{seed}"
    name.unlink(missing_ok=True)
    name.symlink_to(Path(row.path).resolve())
    return str(name)


def held_out(config: Run, folder: Path) -> list[Path]:
    """Held-out documents as jsonl files: one a domain of the embedded corpus, one of any other corpus."""
    from fusion import corpus

    folder.mkdir(parents=True, exist_ok=True)
    if config.corpus.source == "stdlib":
        names = config.corpus.domains or list(corpus.DOMAINS)
        texts = {name: corpus.stdlib(name, "held_out") for name in names}
    else:
        kept = (d for part, d in corpus.documents(config.corpus, Counter()) if part == "held_out")
        texts = {"held_out": [d if isinstance(d, str) else "\n".join(m["content"] for m in d.messages) for d in kept]}
    for name, documents in texts.items():
        if not documents:
            raise UserError("nothing is held out to measure on: set corpus.held_out, or evaluation.texts")
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        write_atomic(folder / f"{name}.jsonl", "".join(lines).encode())
    return [folder / f"{name}.jsonl" for name in texts]


# --- telling ---------------------------------------------------------------------------------------------------------


def report(config: Run, rows: list[Row], measured: dict[str, Any], stores: Any, output: Path) -> dict[str, Any]:
    """results.json, report.md, report.html and pictures; returns the averages."""
    from fusion.evaluation.report import write_report

    domains = [name for name, column in measured["columns"].items() if name not in ("mean", "weighted")]
    table: dict[str, dict[str, Any]] = {}
    for row, label in zip(rows, measured["labels"], strict=True):
        cells = {domain: measured["rows"][label][domain]["value"] for domain in domains}
        entry = table.setdefault(row.name, {"name": row.name, "group": row.group, "seeds": {}})
        entry["seeds"][str(config.seeds[0] if row.seed is None else row.seed)] = cells
    told = {row.name: row for row in reversed(rows)}  # the first seed of each row
    curves = {name: curve(Path(row.path)) for name, row in told.items() if (Path(row.path) / "metrics.csv").exists()}
    trained = [name for name, row in told.items() if row.group not in ("source", "target")]
    results = {
        "title": "Knowledge fusion: bits per byte on held-out text",
        "baseline": TEXT_ONLY if TEXT_ONLY in table else TARGET,
        "domains": domains,
        "rows": list(table.values()),
        "curves": {name: c for name, c in curves.items() if name in trained and "clm" in c},
        "won": {FUSELLM: shares(Path(told[FUSELLM].path))} if FUSELLM in told else {},
        "coverage": {name: read_manifest(f)["coverage"] for name, f in stores.distributions.items()},
        "varm": weights(told),
        "facts": facts(config, stores),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "hydra-core")},
        "commands": [" ".join(sys.argv)],
    }
    written = write_report(results, output)
    averages = {row["name"]: row["average"] for row in written["rows"]}
    fused = [row for row in written["rows"] if row["group"] not in ("source", "target", "text only")]
    best = min(fused, key=lambda row: row["average"], default=None)
    print(f"the report: {output / 'report.html'}")
    return {"score": best and best["average"], **averages, "output": str(output)}


def read_curve(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("train/loss")]


def curve(folder: Path) -> dict[str, list[float]]:
    """Steps and losses of a training run."""
    rows = read_curve(folder)
    found = {"step": [int(row["step"]) for row in rows], "total": [float(row["train/loss"]) for row in rows]}
    found["clm"] = [float(row["train/clm"]) for row in rows]
    if any(float(row["train/fusion"]) for row in rows):
        found["kl"] = [float(row["train/fusion"]) for row in rows]
    return found


def shares(folder: Path) -> dict[str, float]:
    """Share of the training sequences each source's distribution was used for, over the logged steps."""
    rows, prefix = read_curve(folder), "train/share/"
    names = [column.removeprefix(prefix) for column in rows[0] if column.startswith(prefix)] if rows else []
    return {name: mean(float(row[prefix + name] or 0) for row in rows) for name in names}


def weights(told: dict[str, Row]) -> dict[str, Any]:
    """The weights of the first VaRM merge, unit by unit."""
    row = told.get("varm merge")
    if row is None:
        return {}
    with open(Path(row.path) / "merge_weights.csv", newline="") as file:
        lines = list(csv.reader(file))[1:]
    models = [name.removeprefix("pivot + ") for name, r in told.items() if r.group == PAIR]
    units = {line[1]: [float(x) for x in line[3:]] for line in lines if line[3]}
    return {"title": "VaRM weights", "units": list(units), "models": models, "weights": list(units.values())}


def facts(config: Run, stores: Any) -> dict[str, Any]:
    tokens = read_manifest(stores.tokens)
    trainer, steps = config.trainer, config.trainer.steps or "one epoch each"
    return {
        "corpus": f"{config.corpus.source} {config.corpus.path}".strip(),
        "target tokens": tokens.get("tokens"),
        "objective": f"λ = {config.objective.lambda_clm}, {config.objective.divergence}",
        "fusion": config.fusion["function"],
        "alignment": config.alignment.criterion,
        "batch": f"{trainer.global_batch} blocks of at most {config.corpus.block_size} tokens",
        "steps": steps if trainer.epochs == 1 or trainer.steps else f"{trainer.epochs} epochs",
        "learning rate": config.optimizer.lr,
        "seeds": ", ".join(map(str, config.seeds)),
    }
