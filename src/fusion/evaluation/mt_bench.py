"""MT-Bench (Zheng et al., arXiv 2306.05685): two-turn dialogues, each answer graded 1 to 10 by a judge.

Single-answer grading as in FastChat's llm_judge: temperatures by category, the second turn judged with the whole
dialogue in view, reference answers for mathematics, reasoning and coding, the score read from `[[n]]`. Answers are one
artifact and judgements another, so another judge grades the same answers. Every answer and every judgement is stored
when it is there: a killed run asks only for what is missing.
"""

import json
import logging
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import torch

from fusion.artifact import fingerprint
from fusion.config import Evaluation, Judge, UserError
from fusion.evaluation.bits_per_byte import bar
from fusion.evaluation.cells import Outcome, Task, spread

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
METRICS = ("overall", "turn 1", "turn 2")
SOURCE = "https://raw.githubusercontent.com/lm-sys/FastChat/v0.2.36/fastchat/llm_judge/data/"
FILES = {
    "question.jsonl": "mt_bench/question.jsonl", "judge_prompts.jsonl": "judge_prompts.jsonl",
    "reference_answer/gpt-4.jsonl": "mt_bench/reference_answer/gpt-4.jsonl",
}  # fmt: skip


def plan(config: Evaluation) -> tuple[list[Task], list[str]]:
    """One task: write the answers, then have them judged.

    Raises:
        UserError: files missing or unreadable; a judge without a key.
    """
    questions, prompts, references = read_data(config.data)
    questions = [questions[i] for i in spread(len(questions), config.limit)]
    judge = config.judge
    if not os.environ.get(judge.key_variable):
        need = f"set it to the key of {judge.base_url} (any word, where the endpoint asks for none)"
        raise UserError(f"evaluation.judge: {judge.key_variable} is empty in the environment; {need}")
    data = {"questions": fingerprint(questions), "prompts": fingerprint(prompts), "references": fingerprint(references)}
    grading = Task(
        "mt_bench", {**data, "judge": judge.model, "endpoint": judge.base_url},
        partial(grade, questions, prompts, references, judge),
    )  # fmt: skip
    recipe = {
        "questions": data["questions"], "max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size,
    }  # fmt: skip
    return [Task("mt_bench", recipe, partial(answer, questions, config), grading)], []


def read_data(folder: str) -> tuple[list[dict], dict[str, dict], dict[int, list[str]]]:
    """(questions, judge prompts by name, reference turns by question) from local files or FastChat's repository."""
    root = next((p for p in (Path(folder) / "mt_bench", Path(folder)) if (p / "question.jsonl").is_file()), None)
    if folder and root is None:
        raise UserError(f"evaluation.data={folder}: no mt_bench/question.jsonl in it")

    def rows(name: str) -> list[dict]:
        try:
            text = (root / name).read_text() if root else _fetch(SOURCE + FILES[name])
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except (OSError, ValueError, httpx.HTTPError) as error:
            where = str(root / name) if root else SOURCE + FILES[name]
            raise UserError(
                f"evaluation.data: {where} cannot be read ({error}); MT-Bench needs {', '.join(FILES)}"
            ) from error

    references = {row["question_id"]: row["choices"][0]["turns"] for row in rows("reference_answer/gpt-4.jsonl")}
    return rows("question.jsonl"), {row["name"]: row for row in rows("judge_prompts.jsonl")}, references


def _fetch(url: str) -> str:
    return httpx.get(url, timeout=60, follow_redirects=True).raise_for_status().text


class Log:
    """A jsonl file that grows by one whole line a time; a line cut off by a kill is dropped on reading."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys, self.lock, self.rows = path, keys, Lock(), {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                self.rows[tuple(row[k] for k in keys)] = row
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values()))

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows[tuple(row[k] for k in self.keys)] = row
            with open(self.path, "a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- answers ---------------------------------------------------------------------------------------------------------


def answer(questions: list[dict], config: Evaluation, model: Any, tokenizer: Any, folder: Path) -> Outcome:
    """Two turns per question with the model's chat template, batched over questions of one temperature."""
    if not tokenizer.chat_template:
        raise UserError("models: a tokenizer has no chat template, which MT-Bench needs; save one with the tokenizer")
    log = Log(folder / "answers.jsonl", ("question_id",))
    groups: dict[float, list[dict]] = {}
    for question in questions:
        groups.setdefault(TEMPERATURES.get(question["category"], 0.7), []).append(question)
    size = config.batch_size
    batches = [(t, group[i : i + size]) for t, group in groups.items() for i in range(0, len(group), size)]
    left = [(t, batch) for t, batch in batches if any((q["question_id"],) not in log.rows for q in batch)]
    for temperature, batch in bar(left, "MT-Bench answers"):  # a whole batch again: the same seed, the same answers
        dialogues: list[list[dict[str, str]]] = [[] for _ in batch]
        cut = [0 for _ in batch]
        for turn in range(2):
            for dialogue, question in zip(dialogues, batch, strict=True):
                dialogue.append({"role": "user", "content": question["turns"][turn]})
            seed = batch[0]["question_id"] * 2 + turn
            texts, trimmed = reply(model, tokenizer, dialogues, temperature, config.max_new_tokens, seed)
            for i, (dialogue, text) in enumerate(zip(dialogues, texts, strict=True)):
                dialogue.append({"role": "assistant", "content": text})
                cut[i] += trimmed[i]
        for question, dialogue, trimmed in zip(batch, dialogues, cut, strict=True):
            turns = [message["content"] for message in dialogue if message["role"] == "assistant"]
            log.add({"question_id": question["question_id"], "turns": turns, "truncated": trimmed})
    records = [
        {"example": str(q["question_id"]), "category": q["category"], "turns": log.rows[(q["question_id"],)]["turns"]}
        for q in questions
    ]
    return Outcome(records, {}, {"truncated_prompts": sum(row["truncated"] for row in log.rows.values())})


@torch.inference_mode()
def reply(
    model: Any, tokenizer: Any, dialogues: list[list[dict[str, str]]], temperature: float, length: int, seed: int
) -> tuple[list[str], list[bool]]:
    """The next answer of every dialogue, and whether its beginning had to be cut to fit the context.

    At most half the context is generated; it ends at any of the model's end tokens. Temperature 0 is greedy.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    length = min(length, context // 2)
    rows = [tokenizer.apply_chat_template(d, tokenize=False, add_generation_prompt=True) for d in dialogues]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows]
    cut = [len(row) > context - length for row in ids]
    ids = [row[-(context - length) :] for row in ids]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(map(len, ids))
    ids_BT = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    torch.manual_seed(seed)
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    out_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=length,
        pad_token_id=pad,
        **_ends(model, tokenizer),
        **sampling,
    )
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in out_BT], cut


def _ends(model: Any, tokenizer: Any) -> dict[str, list[int]]:
    """Every token that ends an answer: those of the generation config and the tokenizer's end of text."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return {"eos_token_id": sorted(ends)} if ends else {}


# --- judgements ------------------------------------------------------------------------------------------------------


def grade(
    questions: list[dict], prompts: dict[str, dict], references: dict[int, list[str]], judge: Judge,
    cell: Path, _: Any, folder: Path,
) -> Outcome:  # fmt: skip
    """Have every turn of every answer judged; a judgement without a score after all retries counts in the facts."""
    answers = Log(cell / "answers.jsonl", ("question_id",)).rows
    log = Log(folder / "judgements.jsonl", ("question_id", "turn"))
    calls = []
    for question in questions:
        for turn in (1, 2):
            if (log.rows.get((question["question_id"], turn)) or {"failed": True})["failed"]:
                turns = answers[(question["question_id"],)]["turns"]
                calls.append((question, turn, messages(question, turn, turns, prompts, references)))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with httpx.Client(timeout=judge.timeout) as client, ThreadPoolExecutor(judge.workers) as pool:

        def one(call: tuple) -> None:
            question, turn, asked = call
            log.add({
                "question_id": question["question_id"], "turn": turn, "category": question["category"],
                "judge": judge.model, "messages": asked, **ask(client, judge, asked),
            })  # fmt: skip

        try:
            for _done in bar(pool.map(one, calls), "MT-Bench judgements", total=len(calls)):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed := [row for row in log.rows.values() if row["failed"]]:
        raise UserError(
            f"evaluation.judge: {len(failed)} of {2 * len(questions)} judgements are missing "
            f"({failed[0]['judgement'][:120]}); the same command asks for these only"
        )
    return outcome(questions, answers, log.rows)


def messages(
    question: dict, turn: int, turns: list[str], prompts: dict[str, dict], references: dict[int, list[str]]
) -> list[dict[str, str]]:
    """What the judge is asked: FastChat's single-answer prompt of this turn, with the reference where there is one."""
    reference = references.get(question["question_id"]) if question["category"] in WITH_REFERENCE else None
    name = f"single-{'math-' if reference else ''}v1{'-multi-turn' if turn == 2 else ''}"
    fields = {
        "question": question["turns"][0], "answer": turns[0], "question_1": question["turns"][0], "answer_1": turns[0],
        "question_2": question["turns"][1], "answer_2": turns[1],
    }  # fmt: skip
    fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference or [], 1)}
    prompt = prompts[name]
    content = prompt["prompt_template"].format(**fields)
    return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": content}]


def rating(text: str) -> float | None:
    """The score in `[[n]]`, else in `[n]`, if it is a number from 1 to 10."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    score = float(found[1]) if found else None
    return score if score is not None and 1 <= score <= 10 else None


def ask(client: httpx.Client, judge: Judge, asked: list[dict[str, str]]) -> dict[str, Any]:
    """What the judge said: `score` (None where it gave none), `judgement`, `attempts`, `failed` (it never answered).

    Whatever may pass is tried again with exponential back-off: a full or failing endpoint, a time-out, an answer that
    is no answer or has no score.

    Raises:
        UserError: the endpoint refuses the key or the request. The key is in no message and no log.
    """
    said, failed = "", True
    key = os.environ[judge.key_variable]
    for attempt in range(1, judge.retries + 1):
        wait = min(60.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
        try:
            response = client.post(
                f"{judge.base_url.rstrip('/')}/chat/completions",
                headers={"Authorization": f"Bearer {key}"},
                json={"model": judge.model, "messages": asked, "temperature": 0, "max_tokens": 2048},
            )
            if response.status_code in (400, 401, 403, 404):
                why = " ".join(response.text.replace(key, "…").split())[:200]
                raise UserError(
                    f"evaluation.judge: {judge.base_url} answered {response.status_code} ({why}); check "
                    f"evaluation.judge.base_url, evaluation.judge.model and the key in {judge.key_variable}"
                )
            response.raise_for_status()
            said, failed = str(response.json()["choices"][0]["message"]["content"] or ""), False
            if (score := rating(said)) is not None:
                return {"score": score, "judgement": said, "attempts": attempt, "failed": False}
            wait = 0.0  # it answers, only not with a score
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            said, failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", True
            after = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
            wait = min(60.0, float(after)) if re.fullmatch(r"\d+(\.\d+)?", after) else wait
        if attempt < judge.retries:
            time.sleep(wait)
    return {"score": None, "judgement": said, "attempts": judge.retries, "failed": failed}


def outcome(questions: list[dict], answers: dict, judged: dict) -> Outcome:
    """Records and means: both turns together, turn 1, turn 2, each category. A judgement without a score is in none."""
    records, metrics = [], {name: {"formula": "ratio", "higher_is_better": True, "column": True} for name in METRICS}
    categories = list(dict.fromkeys(q["category"] for q in questions))
    metrics |= {name: dict(metrics["overall"]) for name in categories}
    unscored = 0
    for question in questions:
        rows = [judged[(question["question_id"], turn)] for turn in (1, 2)]
        scores = [row["score"] for row in rows]
        unscored += sum(score is None for score in scores)
        pairs = [[score or 0.0, float(score is not None)] for score in scores]
        both = [pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]]
        vectors = {"overall": both, "turn 1": pairs[0], "turn 2": pairs[1]}
        vectors |= {name: both if name == question["category"] else [0.0, 0.0] for name in categories}
        records.append({
            "example": str(question["question_id"]), "metrics": vectors, "category": question["category"],
            "turns": answers[(question["question_id"],)]["turns"], "judgements": [row["judgement"] for row in rows],
        })  # fmt: skip
    return Outcome(records, metrics, {"judge": next(iter(judged.values()))["judge"], "without_score": unscored})
