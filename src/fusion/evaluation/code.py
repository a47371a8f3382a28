"""Code that models write: kept in the format of MultiPL-E's evaluation container, run only when the user allows it.

The container reads one JSON file per problem (name, language, prompt, tests, completions, stop_tokens) and calls a
program right when prompt + completion + "\\n" + tests ends with code 0 (Cassano et al., arXiv 2208.08227). Here the
same program runs in the sandbox; Python must also reach its own last line, so that an early exit is no success.
"""

import json
import secrets
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusion.artifact import write_atomic
from fusion.config import UserError
from fusion.evaluation import sandbox
from fusion.evaluation.cells import Outcome, Task

METRICS = {"pass@1": {"formula": "percent", "higher_is_better": True}}
RUNNERS = {  # interpreters that need no second process; the others are left to the container
    "py": ([sys.executable, "-I"], True), "js": (["node", "--max-old-space-size=512"], False),
    "pl": (["perl"], True), "lua": (["lua"], True), "rb": (["ruby"], True), "php": (["php"], True),
}  # fmt: skip


def problem(row: dict[str, Any], language: str, completion: str, stops: list[str]) -> dict[str, Any]:
    """The container's record of a problem of HumanEval or of MultiPL-E."""
    tests = row["tests"] if "tests" in row else f"{row['test']}\ncheck({row['entry_point']})"
    name = (row.get("name") or row["task_id"]).replace("/", "_")
    return {
        "name": name, "language": language, "prompt": row["prompt"], "tests": tests, "completions": [completion],
        "stop_tokens": stops, "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip


def write(problems: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in problems:
        write_atomic(folder / f"{one['name']}.json", json.dumps(one, ensure_ascii=False, indent=1).encode())


def runnable(language: str) -> bool:
    return language in RUNNERS and shutil.which(RUNNERS[language][0][0]) is not None


def require_sandbox() -> None:
    """UserError where the sandbox does not close: model-written code is never run without it."""
    if why := sandbox.refusal():
        raise UserError(
            f"evaluation.allow_code_execution: this machine cannot close the sandbox ({why}); "
            "leave it false and run the completions in the MultiPL-E container"
        )


def execution(language: str, task: str) -> Task:
    """The task that runs what an earlier one wrote; its `model` is the folder of that cell."""

    def run(cell: Path, _: Any, folder: Path) -> Outcome:
        files = sorted((cell / "completions" / task).glob("*.json"))
        shutil.copytree(cell / "completions", folder / "completions", dirs_exist_ok=True)
        with ThreadPoolExecutor(4) as pool:
            records = list(pool.map(verdict, [json.loads(file.read_text()) for file in files]))
        return Outcome(records, METRICS, {"executed": len(records), "language": language})

    return Task(task, {"execute": language, "seconds": sandbox.TIME, "memory": sandbox.MEMORY}, run)


def verdict(one: dict[str, Any]) -> dict[str, Any]:
    """Run one problem's completion; a record with pass@1 and how it ended."""
    command, reserve = RUNNERS[one["language"]]
    program, mark = f"{one['prompt']}{one['completions'][0]}\n{one['tests']}\n", ""
    if one["language"] == "py":
        mark = secrets.token_hex(8)
        program += f"print({mark!r})\n"
    found = sandbox.run(command, program, f".{one['language']}", reserve=reserve)
    passed = found.ok and found.output.rstrip().endswith(mark)
    return {
        "example": one["name"], "metrics": {"pass@1": [float(passed), 1.0]}, "prompt": one["prompt"],
        "response": one["completions"][0], "how": found.how, "output": found.output[-2000:],
    }  # fmt: skip
