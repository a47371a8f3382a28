"""The main job on a small world: every row is there, the report is written, the second run only reads."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from world import make_world

from fusion.config import Evaluation, Run
from fusion.mainjob import arms, fuse


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = make_world(tmp_path_factory.mktemp("world"))
    trainer = replace(config.trainer, steps=3, log_every=1, threads=1, accelerator="cpu")
    merges = {"linear": {"method": "fusion.merging.methods.linear"}, "varm": {"method": "fusion.merging.methods.varm"}}
    options = Evaluation(bootstrap=50, window=64, device="cpu")
    return replace(config, trainer=trainer, merges=merges, seeds=[0, 1], evaluation=options, jobs=1)


@pytest.mark.slow
def test_every_row_is_there(world: Run, tmp_path: Path) -> None:
    config = replace(world, output=str(tmp_path / "results"))
    figures = fuse(config)
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        "target as it was",
        "neox",
        "piece",
        "text only",
        "FuseLLM",
        "pivot + neox",
        "pivot + piece",
        "linear merge",
        "varm merge",
    ]
    assert all(len(row["seeds"]) == (1 if row["group"] in ("source", "target") else 2) for row in rows.values())
    assert rows["text only"]["change"] == 0
    assert figures["score"] == min(row["average"] for row in results["rows"][4:])
    page = (tmp_path / "results" / "report.html").read_text()
    assert "varm merge" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "results" / "report.md").exists()
    assert list((tmp_path / "results").glob("*.png"))
    assert set(results["won"]["FuseLLM"]) == {"target", "neox", "piece"}
    begun = time.perf_counter()
    assert fuse(config) == figures
    assert time.perf_counter() - begun < 30


def test_arms_are_what_the_config_says(world: Run) -> None:
    names = [name for name, *_ in arms(replace(world, arms=["text_only", "fusellm"], seeds=[5]))]
    assert names == ["text only", "FuseLLM"]
    pairs = [(name, list(run.sources)) for name, _, run in arms(replace(world, arms=["fusechat"], seeds=[5]))]
    assert pairs == [("pivot + neox", ["neox"]), ("pivot + piece", ["piece"])]
    text_only = next(run for name, _, run in arms(world) if name == "text only")
    assert text_only.objective.lambda_clm == 1
