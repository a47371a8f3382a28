"""Evaluation data from local files, in the schema of the Hub's data sets, so that lm-eval's own tasks read them.

A reader yields rows from the files that a YAML of conf/evaluation/local names for a split. SciBench, which lm-eval
does not have, finds its prompt and its score here too.
"""

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def jsonl(files: list[Path]) -> Iterator[Row]:
    for file in files:
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def arc(files: list[Path]) -> Iterator[Row]:
    """AI2's files: the question and its choices are nested, choices one by one."""
    for row in jsonl(files):
        choices = row["question"]["choices"]
        lists = {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}
        yield {"id": row["id"], "question": row["question"]["stem"], "choices": lists, "answerKey": row["answerKey"]}


def boolq(files: list[Path]) -> Iterator[Row]:
    for row in jsonl(files):
        yield {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}


def hellaswag(files: list[Path]) -> Iterator[Row]:
    """Rows as lm-eval's process_docs leaves them; the context is one field here and has no activity label."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    for file in files:
        for row in json.loads(file.read_text())["test"]:
            endings = [preprocess(row["choices"][letter]) for letter in sorted(row["choices"])]
            gold = sorted(row["choices"]).index(row["answer"])
            yield {"query": preprocess(row["question"]), "choices": endings, "gold": gold, "label": str(gold)}


def openbookqa(files: list[Path]) -> Iterator[Row]:
    """AI2's tables: the choices stand in one cell as (A) … (B) …"""
    for file in files:
        with open(file, encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                parts = re.split(r"\(([A-Z])\)", row["Choices"])[1:]
                lists = {"label": parts[::2], "text": [text.strip() for text in parts[1::2]]}
                stem, answer = row["Question Stem"], row["Answer Key"].strip()
                yield {"id": row["ID"], "question_stem": stem, "choices": lists, "answerKey": answer}


def bbh(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield from json.loads(file.read_text())["examples"]


def triviaqa(files: list[Path]) -> Iterator[Row]:
    for row in jsonl(files):
        yield {"question": row["question"], "answer": {"aliases": row["golden_answers"]}}


def drop(files: list[Path]) -> Iterator[Row]:
    """One gold answer a question, as a span: lm-eval treats numbers and spans alike."""
    nothing = {"number": [], "date": [], "spans": []}
    for row in jsonl(files):
        answer = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [row["answer"]]}
        fields = {"query_id": str(row["id"]), "passage": row["context"], "question": row["question"]}
        yield {**fields, "answer": answer, "validated_answers": nothing}


def german_english(files: list[Path]) -> Iterator[Row]:
    """Files NAME.de; line by line beside NAME.en."""
    for file in files:
        with open(file, encoding="utf-8") as german, open(file.with_suffix(".en"), encoding="utf-8") as english:
            for de, en in zip(german, english, strict=True):
                yield {"translation": {"de": de.strip(), "en": en.strip()}}


def scibench(files: list[Path]) -> Iterator[Row]:
    for file in files:
        for row in json.loads(file.read_text()):
            yield {key: row[key] for key in ("problem_text", "answer_number", "unit", "source", "problemid")}


def scibench_prompt(row: Row) -> str:
    unit = row["unit"].strip()
    given = f" The unit of the answer is {unit}." if unit else ""
    return (
        f"Problem: {row['problem_text'].strip()}{given}\n"
        "Solve it step by step and put the final number into \\boxed{}.\nSolution:"
    )


def scibench_score(row: Row, responses: list[str]) -> dict[str, float]:
    """Right when the boxed number, else the last number, is within 5 % of the answer (SciBench's tolerance)."""
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", responses[0])
    found, gold = number(boxed[-1] if boxed else responses[0]), number(row["answer_number"])
    return {"acc": float(found is not None and gold is not None and math.isclose(found, gold, rel_tol=0.05))}


def number(text: str) -> float | None:
    """The last number of a text: 1,234.5 · -3e-4 · 6.02 \\times 10^{23}."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("−", "-").replace("$", ""))
    power = r"(?:\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?)?"
    found = re.findall(rf"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?){power}", text)
    return float(found[-1][0]) * 10.0 ** int(found[-1][1] or 0) if found else None
