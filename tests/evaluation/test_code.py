"""Completions for the MultiPL-E container by default; run in the sandbox only when it is allowed."""

import json
import shutil
import sys

import pytest

from fusion.config import Evaluate, Evaluation, UserError
from fusion.evaluation import code, evaluate, harness, sandbox

ROW = {
    "task_id": "HumanEval/0", "prompt": "def double(x):\n", "entry_point": "double",
    "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}  # fmt: skip
needs_sandbox = pytest.mark.skipif(bool(sandbox.refusal()), reason="this kernel cannot close the sandbox")


def judge(completion, language="py"):
    return code.verdict(code.problem(ROW, language, completion, ["\ndef"]))


@needs_sandbox
@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("    return 2 * x\n", True),
        ("    return x\n", False),
        ("    while True: pass\n", False),
        ("    return x +\n", False),
        ("    import os; os._exit(0)\n", False),
        ("    raise SystemExit(0)\n", False),
        ("    import os\n    while True: os.fork()\n", False),
        ("    return bytearray(1 << 40)\n", False),
    ],
)
def test_verdicts(completion, passed, monkeypatch):
    monkeypatch.setattr(sandbox.run, "__kwdefaults__", sandbox.run.__kwdefaults__ | {"seconds": 1.0})
    assert judge(completion)["metrics"]["pass@1"] == [float(passed), 1.0]


def test_container_format(tmp_path):
    one = code.problem(ROW, "py", "    return 2 * x\n", ["\ndef"])
    code.write([one], tmp_path)
    stored = json.loads((tmp_path / "HumanEval_0.json").read_text())
    assert {"name", "language", "prompt", "tests", "completions", "stop_tokens"} <= set(stored)
    program = stored["prompt"] + stored["completions"][0] + "\n" + stored["tests"]  # as the container joins them
    exec(compile(program, "program", "exec"), {})


def config(shared, tmp_path, tasks, **options):
    evaluation = Evaluation(
        kind="harness", tasks=tasks, data=str(shared / "data/eval"), limit=4, device="cpu", max_new_tokens=16, **options
    )
    return Evaluate(
        models=[str(shared / "data/models/stories260K")], evaluation=evaluation, output=str(tmp_path / "out"),
        artifacts=str(tmp_path / "artifacts"),
    )  # fmt: skip


@pytest.mark.slow
def test_by_default_nothing_runs(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda *a, **k: pytest.fail("code was run"))
    evaluate(config(shared, tmp_path, ["humaneval", "multipl_e_cpp", "multipl_e_rs"]))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["rows"]["stories260K"]["humaneval"] is None
    assert "MultiPL-E" in results["skipped"][0]
    for task, language in {"humaneval": "py", "multipl_e_cpp": "cpp", "multipl_e_rs": "rs"}.items():
        files = sorted((tmp_path / "out/completions/stories260K" / task).glob("*.json"))
        assert len(files) == 4
        stored = json.loads(files[0].read_text())
        assert stored["language"] == language
        assert not any(stop in stored["completions"][0] for stop in stored["stop_tokens"])


@needs_sandbox
def test_allowed_code_runs_without_generating_again(shared, tmp_path, monkeypatch):
    evaluate(config(shared, tmp_path, ["humaneval", "multipl_e_cpp"]))
    monkeypatch.setattr("fusion.evaluation.models.load", lambda *a, **k: pytest.fail("generated again"))
    evaluate(config(shared, tmp_path, ["humaneval", "multipl_e_cpp"], allow_code_execution=True))
    results = json.loads((tmp_path / "out/results.json").read_text())
    cell = results["rows"]["stories260K"]["humaneval"]
    assert cell["value"] == 0.0
    assert results["columns"]["humaneval"]["facts"]["stories260K"]["executed"] == 4
    assert results["rows"]["stories260K"]["multipl_e_cpp"] is None  # compiled: left to the container


@needs_sandbox
def test_reference_solutions_pass(shared):
    rows = [json.loads(line) for line in (shared / "data/eval/humaneval/HumanEval.jsonl").open()][::20]
    for row in rows:
        found = code.verdict(code.problem(row, "py", row["canonical_solution"], []))
        assert found["metrics"]["pass@1"][0] == 1.0, (row["task_id"], found["how"], found["output"])


@needs_sandbox
@pytest.mark.skipif(not shutil.which("perl"), reason="no perl")
def test_another_language():
    row = {"name": "p", "prompt": "sub double { my($x) = @_;\n", "tests": "double(2) == 4 or die;\n"}
    assert code.verdict(code.problem(row, "pl", "return 2 * $x; }\n", []))["metrics"]["pass@1"][0] == 1.0
    assert code.verdict(code.problem(row, "pl", "return $x; }\n", []))["metrics"]["pass@1"][0] == 0.0
    assert (
        code.verdict(code.problem(row, "pl", "unlink '/etc/hostname' or die; }\n", []))["metrics"]["pass@1"][0] == 0.0
    )


def test_no_sandbox_no_execution(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "refusal", lambda: "landlock: Function not implemented")
    with pytest.raises(UserError, match="cannot close the sandbox") as caught:
        harness.plan(config(shared, tmp_path, ["humaneval"], allow_code_execution=True).evaluation)
    assert "\n" not in str(caught.value)


def test_interpreters_are_looked_for():
    assert code.runnable("py")
    assert not code.runnable("cpp")
    assert code.RUNNERS["py"][0][0] == sys.executable
