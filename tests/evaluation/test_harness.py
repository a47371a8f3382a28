"""lm-eval's tasks on real local files under a real model; two of them against scores computed by hand."""

import itertools
import json
import re
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch

from fusion.config import Evaluate, Evaluation, UserError
from fusion.evaluation import evaluate, harness, local, models
from fusion.evaluation.cells import Task, spread

SUITES = {
    "commonsense": ["arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa"],
    "bbh": ["bbh_cot_fewshot"],
    "generation": ["triviaqa", "drop", "lambada_openai", "translation_de-en", "scibench"],
    "code": ["humaneval", "multipl_e"],
}


def settings(shared, tasks, limit, **options):
    return Evaluation(
        kind="harness", tasks=tasks, data=str(shared / "data/eval"), limit=limit, device="cpu", bootstrap=100, **options
    )


def run(shared, tmp_path, tasks, limit=20, **options):
    config = Evaluate(
        models=[str(shared / "data/models/stories260K")], evaluation=settings(shared, tasks, limit, **options),
        output=str(tmp_path / "out"), artifacts=str(tmp_path / "artifacts"),
    )  # fmt: skip
    evaluate(config)
    results = json.loads((tmp_path / "out/results.json").read_text())
    return results, parquet.read_table(tmp_path / "out/examples.parquet").to_pylist()


@pytest.fixture(scope="module")
def stories(shared):
    return models.load(shared / "data/models/stories260K", dtype="auto", device="cpu")


@pytest.mark.parametrize("suite", SUITES)
def test_every_task_of_a_suite_reads_its_local_files(shared, suite):
    tasks, skipped = harness.plan(settings(shared, SUITES[suite], 3))
    assert len(tasks) == {"commonsense": 4, "bbh": 27, "generation": 5, "code": 19}[suite]
    assert all(isinstance(task, Task) for task in tasks)
    if suite == "commonsense":
        assert skipped == [f"arc_easy: no arc/ARC-Easy-Test.jsonl or arc/ARC-Easy-Dev.jsonl in {shared / 'data/eval'}"]


@pytest.mark.slow
def test_commonsense_near_chance_and_complete(shared, tmp_path):
    results, records = run(shared, tmp_path, SUITES["commonsense"][1:], limit=24)
    row = results["rows"]["stories260K"]
    for task, chance in {"arc_challenge": 25, "boolq": 50, "hellaswag": 25, "openbookqa": 25}.items():
        assert results["columns"][task]["examples"] == 24
        assert abs(row[task]["value"] - chance) < 30
        assert len({r["example"] for r in records if r["task"] == task}) == 24
    assert {c["metric"] for c in results["columns"].values()} >= {"acc_norm", "acc"}


def test_openbookqa_by_hand(shared, stories, tmp_path):
    """Length-normalised accuracy of ten questions, from the definition: argmax of log p(choice | stem) / characters."""
    results, records = run(shared, tmp_path, ["openbookqa"], limit=10)
    model, tokenizer = stories
    lines = (shared / "data/eval/openbookqa/test.tsv").read_text().splitlines()[1::50]  # 10 of 500
    right = {"acc": [], "acc_norm": []}
    for line in lines:
        _, stem, choices, _, answer = line.split("\t")
        texts = [c.strip() for c in re.split(r"\([A-D]\)", choices)[1:]]
        scores = []
        for text in texts:
            context = tokenizer(stem)["input_ids"]
            whole = tokenizer(f"{stem} {text}")["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logprobs[t - 1, whole[t]].item() for t in range(len(context), len(whole))))
        gold = "ABCD".index(answer)
        right["acc"].append(scores.index(max(scores)) == gold)
        normed = [s / len(t) for s, t in zip(scores, texts, strict=True)]
        right["acc_norm"].append(normed.index(max(normed)) == gold)
    for metric, by_hand in right.items():
        found = [dict(r["metrics"])[metric][0] for r in sorted(records, key=lambda r: int(r["example"]))]
        assert found == by_hand
        assert results["rows"]["stories260K"]["openbookqa"]["metrics"][metric] == 10 * sum(by_hand)


def test_lambada_by_hand(shared, stories, tmp_path):
    """Accuracy and perplexity of the last word of ten passages."""
    results, records = run(shared, tmp_path, ["lambada_openai"], limit=10)
    model, tokenizer = stories
    rows = [json.loads(line) for line in (shared / "data/eval/lambada/lambada_test.jsonl").open()]
    rows = [rows[i] for i in spread(len(rows), 10)]
    right, total = [], 0.0
    for row in rows:
        context, _, word = row["text"].rpartition(" ")
        head, whole = tokenizer(context)["input_ids"], tokenizer(f"{context} {word}")["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([whole[-513:]])).logits[0].log_softmax(-1)
        start = len(logprobs) - (len(whole) - len(head))
        gold = whole[-(len(whole) - len(head)) :]
        total += sum(logprobs[start - 1 + i, token].item() for i, token in enumerate(gold))
        right.append(logprobs[start - 1 : -1].argmax(-1).tolist() == gold)
    cell = results["rows"]["stories260K"]["lambada_openai"]
    assert [dict(r["metrics"])["acc"][0] for r in sorted(records, key=lambda r: int(r["example"]))] == right
    assert cell["value"] == 10 * sum(right)
    assert cell["metrics"]["perplexity"] == pytest.approx(torch.tensor(-total / 10).exp().item(), rel=1e-3)


@pytest.mark.slow
def test_generation_and_truncation(shared, tmp_path):
    """Prompts longer than the context lose their beginning; the facts say how many, and the cap."""
    tasks = ["drop", "translation_de-en", "scibench", "triviaqa", "bbh_cot_fewshot_snarks"]
    results, records = run(shared, tmp_path, tasks, limit=4, max_new_tokens=24)
    for task in tasks:
        assert results["columns"][task]["examples"] == 4
        facts = results["columns"][task]["facts"]["stories260K"]
        assert (facts["context"], facts["max_new_tokens"]) == (512, 24)
    assert results["columns"]["bbh_cot_fewshot_snarks"]["facts"]["stories260K"]["truncated_prompts"] == 4
    assert results["columns"]["translation_de-en"]["metric"] == "bleu"
    assert all(r["prompt"] and r["response"] for r in records)
    translated = next(r for r in records if r["task"] == "translation_de-en")
    assert len(dict(translated["metrics"])["bleu"]) == 10
    assert "\n" not in json.loads(translated["response"])[0].strip("\n")  # the task's stop string


def test_unknown_task_names_the_nearest(shared):
    with pytest.raises(UserError, match=r"hellaswg is no task of lm-eval \(did you mean .*hellaswag"):
        harness.plan(settings(shared, ["hellaswg"], 3))


def test_task_without_a_local_reader(shared):
    with pytest.raises(UserError, match="gsm8k has no reader for local files"):
        harness.plan(settings(shared, ["gsm8k"], 3))


def test_folder_without_data(shared, tmp_path):
    with pytest.raises(UserError, match="nothing to measure"):
        harness.plan(Evaluation(kind="harness", tasks=["boolq"], data=str(tmp_path)))
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/x.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match=r"boolq/x\.jsonl cannot be read"):
        harness.plan(Evaluation(kind="harness", tasks=["boolq"], data=str(tmp_path)))


def test_hub_without_network(monkeypatch):
    """The same task by its name asks the Hub; a Hub that does not answer is one line."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'aps/super_glue' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match="boolq: the Hub did not give its data") as caught:
        harness.plan(Evaluation(kind="harness", tasks=["boolq"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the answer is 42.", 42.0), ("-3.5e-4 J", -3.5e-4), ("6.02 \\times 10^{23}", 6.02e23), ("+65.49", 65.49),
        ("1,234.5", 1234.5), ("none", None), ("$x = .5$", 0.5),
    ],
)  # fmt: skip
def test_last_number(text, found):
    assert local.number(text) == (pytest.approx(found) if found is not None else None)


def test_scibench_score():
    row = {"answer_number": " 50.7"}
    assert local.scibench_score(row, ["so \\boxed{50.0} atm, not 7"]) == {"acc": 1.0}
    assert local.scibench_score(row, ["it is 50.7 atm"]) == {"acc": 1.0}
    assert local.scibench_score(row, ["\\boxed{40}"]) == {"acc": 0.0}
    assert local.scibench_score(row, [""]) == {"acc": 0.0}


def test_readers_name_every_task_of_the_suites():
    named = {path.stem for path in (Path(harness.CONF) / "local").glob("*.yml")}
    assert {task.split("_cot")[0] for task in itertools.chain(*SUITES.values())} <= named
