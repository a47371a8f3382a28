"""lm-eval's tasks: from the Hub, or the same tasks on local files.

The library builds the prompts, calls the model and scores; this file finds the tasks, gives them their data, and turns
the library's samples into records whose metrics are sums over examples (see statistics.py).

Decisions: prompts that do not fit the context lose their beginning (as in lm-eval), generations are capped at half the
context, and both are counted in the facts. Greedy decoding unless a task says otherwise; it stops at the model's own
end tokens and at the task's stop strings.
"""

import fnmatch
import logging
import random
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fusion.artifact import fingerprint
from fusion.config import Evaluation, UserError, nearest
from fusion.evaluation import code
from fusion.evaluation.cells import Outcome, Task, spread

CONF = Path(__file__).parents[3] / "conf" / "evaluation"
PRIMARY = ("acc_norm", "exact_match", "f1", "acc", "bleu")  # the one the papers report, where a task has several

# `import evaluate` inside lm-eval means Hugging Face's package, not the script beside which Python started.
sys.path[:] = [p for p in sys.path if not (Path(p or ".") / "evaluate.py").is_file()]


def plan(config: Evaluation) -> tuple[list[Task], list[str]]:
    """(tasks, what of them cannot be measured and why). Data are read here: a task is identified by its examples.

    Raises:
        UserError: an unknown task (with the nearest names), a folder without data, a Hub that does not answer.
    """
    if not config.tasks:
        raise UserError(
            "evaluation.tasks is empty: give lm-eval task names, or evaluation=bbh|commonsense|generation|code"
        )
    if config.data and not Path(config.data).is_dir():
        raise UserError(f"evaluation.data={config.data}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(tuple(config.tasks))
    found, skipped = _local(manager, config) if config.data else (_from_hub(manager, config.tasks), [])
    if not found:
        raise UserError(f"evaluation.data={config.data}: nothing to measure ({'; '.join(skipped)})")
    languages = {name: language(task) for name, task in found.items() if language(task)}
    if config.allow_code_execution and languages:
        code.require_sandbox()
    if kept := [n for n, lang in languages.items() if not (config.allow_code_execution and code.runnable(lang))]:
        skipped.append(
            f"pass@1 of {', '.join(kept)}: their completions are under completions/, for MultiPL-E's container"
        )
    return [_task(name, task, config) for name, task in found.items()], skipped


# --- finding tasks ---------------------------------------------------------------------------------------------------


@cache
def task_manager(names: tuple[str, ...]) -> Any:
    """lm-eval's TaskManager over the folders that `names` live in; reading all 14,000 of its files takes a minute."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    guesses = {folder for name in names for folder in _folders(root, name)}
    manager = _manager(guesses)
    if not all(name in manager.task_index for name in names):
        known = _scan(root)
        unknown = [n for n in names if n not in manager.task_index and n not in known]
        if unknown:
            near = closest(unknown[0], [*known, *manager.task_index])
            raise UserError(f"evaluation.tasks: {unknown[0]} is no task of lm-eval{near}")
        guesses |= {root / folder for name in names for folder in known.get(name, ())}
        manager = _manager(guesses)
    return manager


def _manager(folders: set[Path]) -> Any:
    """A TaskManager over these folders and conf/evaluation/tasks, which wins (.yml, so that Hydra lists no group)."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager(include_path=sorted(folders), include_defaults=False)
    for path in sorted((CONF / "tasks").glob("*.yml")):
        settings = load_yaml(path, resolve_func=False)
        manager.task_index.pop(settings.get("group") or settings["task"], None)
        TaskIndex.process_cfg(settings, path, manager.task_index)
    return manager


def closest(name: str, known: list[str]) -> str:
    """Up to three near names, or a word on where names are found."""
    import difflib

    close = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(close)}?)" if close else " (names: lm_eval ls tasks)"


def _folders(root: Path, name: str) -> list[Path]:
    """Where a task of this name usually is: arc_challenge in arc, boolq in super_glue/boolq."""
    parts = re.split(r"[_-]", name)
    prefixes = {"_".join(parts[:i]) for i in range(1, len(parts) + 1)} | {name}
    return [root / p for p in sorted(prefixes) if p and (root / p).is_dir()] + sorted(root.glob(f"*/{name}"))


@cache
def _scan(root: Path) -> dict[str, set[str]]:
    """{task, group or tag: top folders that mention it}, by reading lines instead of parsing files."""
    one = re.compile(r"""^[ \t]*(?:-[ \t]*)?["']?(?:task|group|tag)["']?:[ \t]*["']?([^\s"'\[\]{},#]+)""", re.MULTILINE)
    many = re.compile(r"^(?:tag|group):[ \t]*\n((?:[ \t]*-.*\n?)+)", re.MULTILINE)
    known: dict[str, set[str]] = {}
    for path in root.glob("**/*.yaml"):
        text = path.read_text(errors="replace")
        listed = [line.strip(" \t-\"'") for block in many.findall(text) for line in block.splitlines()]
        for name in {*one.findall(text), *listed}:
            known.setdefault(name, set()).add(path.relative_to(root).parts[0])
    return known


def _from_hub(manager: Any, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            hint = "give local files with evaluation.data=DIR"
            raise UserError(f"evaluation.tasks: {name}: the Hub did not give its data ({reason}); {hint}") from error
    return found


def _leaves(manager: Any, name: str) -> list[str]:
    """The tasks of a group or tag, in their order."""
    entry = manager.task_index[name]
    if entry.kind.name == "GROUP":
        members = [m if isinstance(m, str) else m["task"] for m in entry.cfg["task"]]
        return [leaf for member in members for leaf in _leaves(manager, member)]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


def _local(manager: Any, config: Evaluation) -> tuple[dict[str, Any], list[str]]:
    """lm-eval's tasks with the data of conf/evaluation/local's readers; tasks whose files are absent are named."""
    from lm_eval.tasks._yaml_loader import load_yaml

    readers = [load_yaml(path) for path in sorted((CONF / "local").glob("*.yml"))]
    found, skipped = {}, []
    for name in dict.fromkeys(leaf for given in config.tasks for leaf in _leaves(manager, given)):
        reader = next((r for r in readers if fnmatch.fnmatch(name, r["task"])), None)
        if reader is None:
            known = [r["task"] for r in readers]
            raise UserError(f"evaluation.tasks: {name} has no reader for local files{nearest(name, known)}")
        stock = load_yaml(manager.task_index[name].yaml_path)
        pattern = reader["dataset_kwargs"]
        files = {
            s: sorted(Path(config.data).glob(p.format(name=stock.get("dataset_name")))) for s, p in pattern.items()
        }
        files = {split: paths for split, paths in files.items() if paths}
        if stock.get("test_split") not in files and stock.get("validation_split") not in files:
            wanted = " or ".join(p.format(name=stock.get("dataset_name")) for p in pattern.values())
            skipped.append(f"{name}: no {wanted} in {config.data}")
            continue
        missing = {f"{s}_split": None for s in ("training", "validation", "test")
                   if stock.get(f"{s}_split") not in files}  # fmt: skip
        settings = {**stock, **reader, **missing, "task": name, "dataset_kwargs": None}
        settings["custom_dataset"] = _dataset(reader["custom_dataset"], files)
        settings.pop("tag", None)
        found |= manager.load([settings])["tasks"]
    return found, skipped


def _dataset(read: Callable, files: dict[str, list[Path]]) -> Callable[..., Any]:
    def build(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        try:
            return DatasetDict({split: Dataset.from_list(list(read(paths))) for split, paths in files.items()})
        except (KeyError, ValueError, OSError) as error:
            names = ", ".join(str(p) for paths in files.values() for p in paths[:3])
            raise UserError(f"evaluation.data: {names} cannot be read ({type(error).__name__}: {error})") from error

    return build


# --- measuring -------------------------------------------------------------------------------------------------------


def language(task: Any) -> str | None:
    """The programming language a code task asks for; its completions are scored by running them."""
    return (task.config.metadata or {}).get("language")


def _task(name: str, task: Any, config: Evaluation) -> Task:
    rows = list(task.eval_docs)
    chosen = spread(len(rows), config.limit)
    rows = [rows[i] for i in chosen]
    if language(task) and not task.config.generation_kwargs.get("until"):
        task.config.generation_kwargs["until"] = rows[0]["stop_tokens"]
    settings = {
        k: v for k, v in task.config.to_dict().items() if k not in ("metadata", "custom_dataset", "dataset_kwargs")
    }
    recipe = {
        "task": re.sub(r" at 0x[0-9a-f]+", "", str(settings)), "rows": fingerprint(repr(rows)),
        "fewshot": config.fewshot, "max_new_tokens": config.max_new_tokens,
    }  # fmt: skip
    lang = language(task)
    then = code.execution(lang, name) if lang and config.allow_code_execution and code.runnable(lang) else None
    run = partial(measure, task, chosen if config.limit else None, config)
    return Task(name, recipe, run, then)


def measure(
    task: Any, chosen: list[int] | None, config: Evaluation, model: Any, tokenizer: Any, folder: Path
) -> Outcome:
    """Run one task of lm-eval on a loaded model: the `chosen` examples, or all."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # lengths: see _facts
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", wrapped.max_gen_toks)
    room = min(wanted, config.max_new_tokens, wrapped.max_length // 2)
    if generates := task.config.output_type == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": room}, update=True)
    if config.fewshot >= 0 and task.config.num_fewshot != 0:
        task.set_config("num_fewshot", config.fewshot)
    elif task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(1234)
    if language(task):
        task.override_metric("bypass")
    random.seed(0)
    torch.manual_seed(1234)  # lm-eval's seeds; greedy tasks do not depend on them
    some = {task.task_name: chosen} if chosen else None
    results = evaluate(lm=wrapped, task_dict={"tasks": {task.task_name: task}}, samples=some, bootstrap_iters=0)
    name = task.task_name
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    facts = _facts(samples, wrapped, room if generates else 0)
    if lang := language(task):
        stops = task.config.generation_kwargs["until"]
        problems = [code.problem(s["doc"], lang, _first(s["filtered_resps"]), stops) for s in samples]
        code.write(problems, folder / "completions" / name)
        records = [{"example": p["name"], "prompt": p["prompt"], "response": p["completions"][0]} for p in problems]
        return Outcome(records, {}, facts | {"completions": len(problems), "language": lang})
    metrics, vectors = _metrics(task, samples)
    records = []
    for sample in samples:
        number = str(sample["doc_id"])
        if vectors[number]:
            records.append({"example": number, "metrics": vectors.pop(number), **_words(sample)})
            vectors[number] = {}
    return Outcome(records, metrics, facts)


def _first(value: Any) -> str:
    while isinstance(value, (list, tuple)):
        value = value[0]
    return value


def _words(sample: dict[str, Any]) -> dict[str, Any]:
    arguments = sample["arguments"]
    calls = list(arguments.values()) if isinstance(arguments, dict) else arguments
    first = next(iter(calls[0].values())) if isinstance(calls[0], dict) else calls[0][0]
    return {
        "prompt": first,
        "response": sample["filtered_resps"],
        "gold": sample["doc"].get("answers") or sample["target"],
    }


def _facts(samples: list[dict[str, Any]], wrapped: Any, room: int) -> dict[str, Any]:
    """How many prompts lost their beginning, and the cap on what was generated."""
    longest, cut, seen = wrapped.max_length - room, 0, set()
    for sample in samples:
        arguments = sample["arguments"]
        calls = list(arguments.values()) if isinstance(arguments, dict) else arguments
        texts = [list(call.values()) if isinstance(call, dict) else list(call) for call in calls]
        sizes = [len(wrapped.tok_encode("".join(x for x in text if isinstance(x, str)))) for text in texts]
        cut += sample["doc_id"] not in seen and max(sizes) > longest + (0 if room else 1)
        seen.add(sample["doc_id"])
    return {"context": wrapped.max_length, "truncated_prompts": cut} | ({"max_new_tokens": room} if room else {})


def _metrics(task: Any, samples: list[dict[str, Any]]) -> tuple[dict[str, dict], dict[str, dict[str, list[float]]]]:
    """(metrics, the primary one first; {example: {metric: vector}}). A metric that is no sum over examples is left out.

    Where a task has several answer filters, the first one names the metric alone, the others carry their name.
    """
    from lm_eval.api.metrics import bleu, mean, perplexity, weighted_mean, weighted_perplexity

    kinds = {mean: "percent", perplexity: "exp", bleu: "bleu", weighted_perplexity: "exp", weighted_mean: "ratio"}
    aggregation, better = task.aggregation(), task.higher_is_better()
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    metrics: dict[str, dict] = {}
    vectors: dict[str, dict[str, list[float]]] = {str(s["doc_id"]): {} for s in samples}
    for sample in samples:
        for metric, how in aggregation.items():
            kind = kinds.get(how)
            if kind is None or metric not in sample:
                continue
            name = metric if sample["filter"] == filters[0] else f"{metric} ({sample['filter']})"
            vectors[str(sample["doc_id"])][name] = _vector(kind, sample[metric])
            metrics[name] = {"formula": kind, "higher_is_better": bool(better.get(metric, True))}
    first = next((name for name in PRIMARY if name in metrics), next(iter(metrics), None))
    if first is None:
        raise UserError(
            f"evaluation.tasks: {task.task_name} has no metric that is a sum over examples ({', '.join(aggregation)})"
        )
    return {first: metrics[first]} | metrics, vectors


def _vector(kind: str, found: Any) -> list[float]:
    """The numbers whose sum over examples gives the metric."""
    if kind == "bleu":
        from sacrebleu.metrics import BLEU

        gold, answer = found
        score = BLEU(effective_order=True).sentence_score(_first(answer), [_first(gold)])
        return [*score.counts, *score.totals, score.sys_len, score.ref_len]
    if isinstance(found, (list, tuple)):
        value, weight = found
        return [-value if kind == "exp" else value, weight]
    return [-float(found) if kind == "exp" else float(found), 1.0]
