"""Ranks, guards and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusion.config import Run, Trainer, UserError
from fusion.launch import compare_jobs, preflight, spawn_ranks, user_error

ROOT = Path(__file__).parents[1]


def test_one_device_stays_in_this_process() -> None:
    spawn_ranks(Run(), False)
    spawn_ranks(Run(trainer=Trainer(strategy="fsdp", devices="1")), False)


def test_several_machines_need_a_launcher_and_are_told_which() -> None:
    with pytest.raises(UserError, match="torchrun --nnodes 2"):
        spawn_ranks(Run(trainer=Trainer(strategy="fsdp", devices="8", nodes=2)), False)


def test_sweepers_that_would_split_the_ranks_are_refused() -> None:
    fsdp = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
    for plugin in ("hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra/launcher=submitit_local"):
        with pytest.raises(UserError, match=r"trainer\.strategy=single"):
            preflight("train", ["-m", plugin, *fsdp, "seed=0,1"])
        preflight("train", ["-m", plugin, "seed=0,1"])
    preflight("train", ["-m", *fsdp, "seed=0,1"])


def test_the_cause_of_an_error_may_be_the_users() -> None:
    error = RuntimeError("while composing")
    error.__cause__ = UserError("corpus.path is empty")
    assert user_error(error) == "corpus.path is empty"
    assert user_error(RuntimeError("a bug")) is None


def test_the_table_of_a_sweep_reads_what_jobs_left(tmp_path: Path) -> None:
    for number, score in enumerate((2.5, 2.25)):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(f"- seed={number}\n- sources=[a]\n")
        (tmp_path / str(number) / "result.json").write_text(f'{{"score": {score}, "output": "x"}}')
    (tmp_path / "2").mkdir()  # a job that was killed
    compare_jobs(tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert "| 1 | seed=1 sources=[a] | 2.25 |" in table
    assert "| 2 |" not in table


@pytest.mark.parametrize("missing", ["corpus.path=nowhere.jsonl", "target.path=./nowhere"])
def test_a_missing_path_is_one_line_and_code_two(missing: str, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "some text to train on"}\n')
    fixed = ["corpus=jsonl", "corpus.path=texts.jsonl", "sources=[]", "target=model", missing]
    command = [sys.executable, str(ROOT / "train.py"), *fixed]
    if "target" not in missing:
        command.append("target.path=./nowhere")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "nowhere" in last
    assert "Traceback" not in done.stderr
