"""MT-Bench end to end against a real local HTTP server that speaks the protocol: well, slowly, badly or not at all."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusion.config import Evaluate, Evaluation, Judge, UserError
from fusion.evaluation import evaluate, mt_bench

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Who is second?", "And last?"]},
    {"question_id": 111, "category": "math", "turns": ["1+1?", "Doubled?"]},
    {"question_id": 131, "category": "extraction", "turns": ["Extract.", "Again."]},
]
SECRET = "sk-very-secret"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("question.jsonl", QUESTIONS)
    reference = [{"question_id": q, "choices": [{"turns": [f"ref{q}a", f"ref{q}b"]}]} for q in (101, 111)]
    write("reference_answer/gpt-4.jsonl", reference)
    single, multi = "Q {question} A {answer}", "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}"
    templates = {
        "single-v1": single, "single-math-v1": f"{single} R {{ref_answer_1}}", "single-v1-multi-turn": multi,
        "single-math-v1-multi-turn": f"{multi} R1 {{ref_answer_1}} R2 {{ref_answer_2}}",
    }  # fmt: skip
    write(
        "judge_prompts.jsonl",
        [
            {"name": n, "type": "single", "system_prompt": f"judge {n}", "prompt_template": t}
            for n, t in templates.items()
        ],
    )
    return tmp_path / "data"


@contextmanager
def server(behave):
    """`behave(number of the call, its JSON) -> (status, body, seconds)`; yields the base URL and what it was asked."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
                number = len(seen)
            status, answer, seconds = behave(number, body)
            time.sleep(seconds)
            payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except BrokenPipeError:
                pass

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", seen
    finally:
        running.shutdown()
        running.server_close()


def says(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def scores(body):
    """9 for a first turn, 4 for a second one."""
    return 4 if "Q2" in body["messages"][1]["content"] else 9


def config(tiny_models, data, tmp_path, url, **options):
    judge = Judge(base_url=url, model="judge", key_variable="JUDGE_KEY", **{"timeout": 5.0, "retries": 3} | options)
    evaluation = Evaluation(
        kind="mt_bench", data=str(data), judge=judge, max_new_tokens=8, batch_size=2, device="cpu", bootstrap=50
    )
    return Evaluate(
        models=[str(tiny_models.path("a"))], evaluation=evaluation, output=str(tmp_path / "out"),
        artifacts=str(tmp_path / "artifacts"),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setattr(mt_bench, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.01))))


def test_end_to_end(tiny_models, data, tmp_path, capfd):
    with server(lambda n, body: (200, says(f"Fine. Rating: [[{scores(body)}]]"), 0)) as (url, seen):
        evaluate(config(tiny_models, data, tmp_path, url))
        calls = len(seen)
        evaluate(config(tiny_models, data, tmp_path, url))
        assert len(seen) == calls == 8  # nothing is asked twice
    results = json.loads((tmp_path / "out/results.json").read_text())
    row = results["rows"]["a"]
    assert [row[c]["value"] for c in ("mt_bench", "turn 1", "turn 2", "math")] == [6.5, 9, 4, 6.5]
    assert list(results["columns"])[:3] == ["mt_bench", "turn 1", "turn 2"]
    assert {r["path"] for r in seen} == {"/v1/chat/completions"}
    assert {r["temperature"] for r in seen} == {0}
    assert {r["key"] for r in seen} == {f"Bearer {SECRET}"}
    asked = {r["messages"][1]["content"] for r in seen}
    assert sum("ref111a" in text for text in asked) == 2  # both turns of the maths question carry its reference
    assert any("Q2 Doubled?" in text and "R2 ref111b" in text for text in asked)
    assert not any("ref" in text for text in asked if "Extract." in text)
    captured = "".join(capfd.readouterr())
    stored = "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    assert SECRET not in captured + stored
    judgements = [json.loads(line) for p in tmp_path.rglob("judgements.jsonl") for line in p.read_text().splitlines()]
    assert len(judgements) == 8
    assert all(j["judgement"].startswith("Fine.") and j["messages"] for j in judgements)


def test_another_judge_grades_the_same_answers(tiny_models, data, tmp_path, monkeypatch):
    with server(lambda n, body: (200, says("[[7]]"), 0)) as (url, seen):
        evaluate(config(tiny_models, data, tmp_path, url))
        monkeypatch.setattr("fusion.evaluation.models.load", lambda *a, **k: pytest.fail("answers were made again"))
        again = config(tiny_models, data, tmp_path, url)
        again.evaluation.judge.model = "another"
        evaluate(again)
        assert [r["model"] for r in seen].count("another") == 8


def test_slow_and_failing_endpoints_are_asked_again(tiny_models, data, tmp_path):
    def behave(number, body):
        if number % 3 == 1:
            return 500, {"error": "overloaded"}, 0
        if number == 2:
            return 200, says("[[1]]"), 2.0  # longer than the time-out
        if number == 3:
            return 200, b"<html>no JSON</html>", 0
        return (429, {}, 0) if number == 5 else (200, says("Rating: [[8]]"), 0)

    with server(behave) as (url, seen):
        evaluate(config(tiny_models, data, tmp_path, url, timeout=0.5, retries=8))
    row = json.loads((tmp_path / "out/results.json").read_text())["rows"]["a"]
    assert row["mt_bench"]["value"] == 8
    assert len(seen) > 10


def test_nonsense_is_counted_and_left_out(tiny_models, data, tmp_path):
    def behave(number, body):
        text = body["messages"][1]["content"]
        return 200, says("I would rather not." if "Extract." in text else "[[6]]"), 0

    with server(behave) as (url, seen):
        evaluate(config(tiny_models, data, tmp_path, url))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["rows"]["a"]["mt_bench"]["value"] == 6
    assert results["columns"]["mt_bench"]["facts"]["a"]["without_score"] == 2
    assert len(seen) == 6 + 2 * 3


def test_dead_endpoint_then_resumed(tiny_models, data, tmp_path):
    """What was judged stays; the same command asks only for the rest."""
    alive = {"left": 5}

    def behave(number, body):
        alive["left"] -= 1
        return (200, says("[[5]]"), 0) if alive["left"] >= 0 else (503, {}, 0)

    with server(behave) as (url, seen):
        job = config(tiny_models, data, tmp_path, url, retries=2, workers=1)
        with pytest.raises(UserError, match=r"3 of 8 judgements are missing") as caught:
            evaluate(job)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        alive["left"], before = 99, len(seen)
        evaluate(job)
        assert len(seen) - before == 3


@pytest.mark.parametrize("status", [401, 404])
def test_refused_requests_stop_at_once(tiny_models, data, tmp_path, status):
    with server(lambda n, body: (status, {"error": f"bad key {SECRET}"}, 0)) as (url, seen):
        with pytest.raises(UserError, match=f"answered {status}") as caught:
            evaluate(config(tiny_models, data, tmp_path, url, workers=1))
        assert len(seen) <= 2
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_judge_without_a_key(tiny_models, data, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY is empty in the environment"):
        evaluate(config(tiny_models, data, tmp_path, "http://127.0.0.1:9/v1"))
    assert not (tmp_path / "artifacts").exists()


def test_killed_while_answering(tiny_models, data, tmp_path, monkeypatch):
    """Answers come back the same after a kill, sampled ones too."""
    with server(lambda n, body: (200, says("[[5]]"), 0)) as (url, _):
        job = config(tiny_models, data, tmp_path, url)
        evaluate(job)
        first = sorted(next(Path(job.artifacts).rglob("answers.jsonl")).read_text().splitlines())
        job.artifacts, real, calls = str(tmp_path / "second"), mt_bench.reply, []

        def dies(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(mt_bench, "reply", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate(job)
        assert len(next(Path(job.artifacts).rglob("answers.jsonl")).read_text().splitlines()) in (1, 2)
        evaluate(job)
        assert sorted(next(Path(job.artifacts).rglob("answers.jsonl")).read_text().splitlines()) == first


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7), ("[[8.5]]", 8.5), ("[[3]] no, [[4]]", 3), ("[6]", 6), ("7/10", None),
        ("[[eleven]]", None), ("[[0]]", None), ("[[11]]", None), ("", None),
    ],
)  # fmt: skip
def test_rating(text, score):
    assert mt_bench.rating(text) == score


def test_real_questions_and_prompts(shared):
    questions, prompts, references = mt_bench.read_data(str(shared / "data/eval"))
    assert len(questions) == 80
    assert {q["category"] for q in questions} == set(mt_bench.TEMPERATURES)
    for question in questions:
        for turn in (1, 2):
            asked = mt_bench.messages(question, turn, ["A{1}", "B"], prompts, references)
            assert "[[rating]]" in asked[0]["content"] + asked[1]["content"]
            assert "A{1}" in asked[1]["content"]
            has_reference = question["category"] in mt_bench.WITH_REFERENCE and question["question_id"] in references
            assert has_reference == ("reference answer" in asked[1]["content"].lower())


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"no mt_bench/question\.jsonl"):
        mt_bench.read_data(str(tmp_path))


def test_model_without_a_chat_template(tiny_models, data, tmp_path):
    model, tokenizer = tiny_models.load("a")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        mt_bench.answer(QUESTIONS, Evaluation(), model, tokenizer, tmp_path)


def test_replies_are_the_same_alone_and_in_a_batch(tiny_models):
    """Left padding changes nothing; a dialogue longer than the context loses its beginning and says so."""
    model, tokenizer = tiny_models.load("a")
    dialogues = [[{"role": "user", "content": text}] for text in ("Hi.", "Tell me more about it.", "word " * 99)]
    together, cut = mt_bench.reply(model, tokenizer, dialogues, 0.0, 8, 0)
    assert together == [mt_bench.reply(model, tokenizer, [d], 0.0, 8, 0)[0][0] for d in dialogues]
    assert cut == [False, False, True]
