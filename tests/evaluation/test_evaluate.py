"""evaluate.py from the command line: one-line errors, W&B tables, the ablation table of a sweep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.config import Evaluate, UserError
from fusion.evaluation import evaluate, tables
from fusion.evaluation.models import labels

ROOT = Path(__file__).parents[2]


def command(*arguments, folder):
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *arguments], cwd=folder, capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_command_writes_tables_everywhere(tiny_models, tmp_path):
    (tmp_path / "prose.jsonl").write_text('{"text": "one two three"}\n{"text": "four five"}\n')
    done = command(
        f"models=[{tiny_models.path('a')},{tiny_models.path('b')}]", "baseline=b", "evaluation.texts=[prose.jsonl]",
        "evaluation.bootstrap=50", "evaluation.device=cpu", "output=out", "logger=wandb", "logger.mode=offline",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "against b" in done.stdout
    assert {"results.json", "results.md", "results.png", "examples.parquet"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    logged = [json.loads(p.read_text()) for p in tmp_path.rglob("media/table/results*.json")]
    assert logged
    assert logged[0]["columns"][0] == "model"
    assert [row[0] for row in logged[0]["data"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models=[.]", "evaluation.texts=[t.jsonl]"], "models: . is no model folder"),
        (["models=[.]", "evaluation=bbhh"], "did you mean 'bbh'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n')
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "evaluation").exists()


def job(folder, overrides, figures):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    (folder / "result.json").write_text(json.dumps(figures))


def test_compare_a_multirun(tmp_path, capsys):
    for i, fusion in enumerate(["mince", "avgce"]):
        job(tmp_path / "sweep" / str(i), [f"fusion={fusion}", "alignment=em"], {"score": 2.5 - i / 10, "output": "x"})
    figures = evaluate(Evaluate(compare=[str(tmp_path / "sweep")], output=str(tmp_path / "table")))
    assert figures == {"0 fusion=mince alignment=em": {"score": 2.5}, "1 fusion=avgce alignment=em": {"score": 2.4}}
    text = (tmp_path / "table/results.md").read_text()
    assert "| 1 fusion=avgce alignment=em | 2.400 |" in text
    assert "fusion=mince" in capsys.readouterr().out


def test_compare_runs_of_different_kinds(tmp_path):
    job(tmp_path / "one", ["a=1"], {"score": 1.0})
    (tmp_path / "two").mkdir()
    cells = {"rows": {"m": {"arc": {"value": 25.0}, "bad": None}}}
    (tmp_path / "two/results.json").write_text(json.dumps(cells))
    figures = tables.compare([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert figures == {"one a=1": {"score": 1.0}, "two: m": {"arc": 25.0}}
    assert "| two: m | – | 25.00 |" in (tmp_path / "out/results.md").read_text()


def test_compare_nothing(tmp_path):
    with pytest.raises(UserError, match="compare: nowhere: no such folder"):
        tables.compare([Path("nowhere")], tmp_path / "out")
    with pytest.raises(UserError, match="compare: no results"):
        tables.compare([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_short_names():
    assert labels(["/x/a", "/y/b"]) == ["a", "b"]
    assert labels(["/x/a", "/y/a"]) == ["x/a", "y/a"]
    assert labels(["meta/llama", "folder"]) == ["llama", "folder"]


def test_numbers():
    assert [tables.number(v) for v in (2.54062, 45.3, 1234.56, float("nan"))] == ["2.541", "45.30", "1235", "nan"]
    assert tables.cell_text({"value": 2.0, "change": -1.234, "significant": True}) == "2.000 (-1.23 %)*"
    assert tables.cell_text(None) == "–"
