"""Training runs: counts, ranks, kills, W&B, sweeps. Whole commands where the command is what could be wrong."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import make_world

from fusion.artifact import checksum, read_manifest
from fusion.config import Run, UserError
from fusion.module import FusionModule
from fusion.stages import refuse_foreign, train, train_target

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = make_world(tmp_path_factory.mktemp("world"))
    return replace(config, trainer=replace(config.trainer, steps=6, log_every=1, threads=1, accelerator="cpu"))


def overrides(config: Run, **more: object) -> list[str]:
    """The command line that says the same as `config`."""
    sources = ", ".join(f"{name}: {{path: {llm.path}, dtype: float32}}" for name, llm in config.sources.items())
    fixed = {
        "corpus": "jsonl",
        "corpus.path": config.corpus.path,
        "corpus.block_size": config.corpus.block_size,
        "corpus.held_out": config.corpus.held_out,
        "target": "model",
        "target.path": config.target.path,
        "target.dtype": "float32",
        "externalize.shard_blocks": 8,
        "externalize.top_k": 6,
        "externalize.workers": 1,
        "trainer.global_batch": 8,
        "trainer.micro_batch": 2,
        "trainer.steps": config.trainer.steps,
        "trainer.log_every": 1,
        "trainer.progress": "false",
        "artifacts": config.artifacts,
    } | {k.replace("__", "."): v for k, v in more.items()}
    return ["sources=[]", f"+sources={{{sources}}}", *(f"{k}={v}" for k, v in fixed.items())]


def run(script: str, arguments: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def losses(folder: Path, column: str = "train/loss") -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_the_output_is_a_hugging_face_folder(world: Run, tmp_path: Path) -> None:
    output = tmp_path / "fused"
    figures = train(replace(world, output=str(output)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=3).shape[1] >= 3
    assert (output / "generation_config.json").exists()
    card = (output / "README.md").read_text()
    assert all(word in card for word in ("neox", "piece", "span", world.corpus.path, "validation/bits_per_byte"))
    assert figures["steps"] == 6
    assert math.isfinite(figures["validation/bits_per_byte"])
    assert len(losses(output)) == 6
    assert not (output / "checkpoints").exists()
    share = losses(output, "train/share/target")[0] + losses(output, "train/share/neox")[0]
    assert 0 <= share + losses(output, "train/share/piece")[0] <= 1 + 1e-6


def test_the_second_time_it_is_found(world: Run) -> None:
    first = train_target(world)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert train_target(replace(world, trainer=replace(world.trainer, progress=False, log_every=3))) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_micro_batches_change_nothing_but_rounding(world: Run) -> None:
    one = losses(train_target(world))
    whole = losses(train_target(replace(world, trainer=replace(world.trainer, micro_batch=8))))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(whole), rtol=1e-4, atol=1e-4)


def test_lambda_one_needs_no_sources(world: Run) -> None:
    plain = replace(world, objective=replace(world.objective, lambda_clm=1.0))
    manifest = read_manifest(train_target(plain))
    assert manifest["recipe"]["distributions"] == {}
    assert set(losses(train_target(plain), "train/fusion")) == {0.0}


def test_lambda_decays_to_one(world: Run) -> None:
    decay = replace(world, objective=replace(world.objective, lambda_clm=0.5, schedule="decay"))
    lambdas = losses(train_target(decay), "train/lambda")
    assert lambdas == sorted(lambdas)
    assert lambdas[0] == 0.5
    assert lambdas[-1] > 0.9


def test_adapters_are_merged_on_export(world: Run) -> None:
    lora = replace(world, target=replace(world.target, lora=replace(world.target.lora, rank=2)))
    folder = train_target(lora)
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(world.target.path).state_dict()
    assert trained.keys() == before.keys()
    moved = [name for name in before if not torch.equal(before[name], trained[name])]
    assert moved
    assert all("layers" in name for name in moved)


def test_a_loss_that_is_no_number_stops_with_the_blocks(world: Run) -> None:
    module = FusionModule(world, ["neox"], 10)
    batch = type("Batch", (), {"blocks_B": torch.tensor([3, 5])})
    with pytest.raises(UserError, match=r"nan.*blocks \[3, 5\]"):
        module.guard(math.nan, [batch])


def test_a_foreign_folder_is_never_touched(world: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        train(replace(world, output=str(tmp_path)))
    with pytest.raises(UserError, match="holds something else"):
        refuse_foreign(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_ranks_do_what_one_does(world: Run, tmp_path: Path, strategy: str) -> None:
    alone = train_target(world)
    more = {"trainer__strategy": strategy, "trainer__devices": 2, "output": tmp_path / "two"}
    done = run("train.py", overrides(world, **more), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(alone)), rtol=1e-3, atol=1e-3
    )
    ours = AutoModelForCausalLM.from_pretrained(alone).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_with_the_same_bits(world: Run, tmp_path: Path) -> None:
    long = replace(world, trainer=replace(world.trainer, steps=40))
    arguments = overrides(long, trainer__checkpoint_every=3, optimizer__lr=1e-3)
    whole = run("train.py", [*arguments, f"output={tmp_path / 'whole'}"], tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = Path(world.artifacts) / "trained" / read_recipe_name(tmp_path / "whole", world)
    elsewhere = folder.rename(tmp_path / "elsewhere")
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"output={tmp_path / 'killed'}"]
    killed = 0
    for _ in range(3):
        victim = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        partial = folder.with_name(f"{folder.name}.partial") / "checkpoints"
        seen = {p.name for p in partial.glob("last-*")}
        while victim.poll() is None and {p.name for p in partial.glob("last-*")} <= seen:
            time.sleep(0.02)
        time.sleep(random.random() * 0.3)
        if victim.poll() is None:
            os.killpg(victim.pid, signal.SIGKILL)
            killed += 1
        victim.wait()
    assert killed, "the run was never killed"
    done = run("train.py", [*arguments, f"output={tmp_path / 'killed'}"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checksum(tmp_path / "killed" / "model.safetensors") == checksum(elsewhere / "model.safetensors")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def read_recipe_name(output: Path, world: Run) -> str:
    """The artifact that `output` was published from."""
    recipe = read_manifest(output)["recipe"]
    found = (Path(world.artifacts) / "trained").glob("*/manifest.json")
    return next(path.parent.name for path in found if read_manifest(path.parent)["recipe"] == recipe)


@pytest.mark.slow
def test_a_sweep_has_a_run_a_folder_and_a_row_for_every_job(world: Run, tmp_path: Path) -> None:
    arguments = overrides(world, logger="wandb", logger__mode="offline")
    arguments = ["-m", *arguments, "fusion=mince,avgce"]
    done = run("train.py", arguments, tmp_path, WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr[-3000:]
    sweep = next((tmp_path / "multirun" / "train").iterdir())
    results = [json.loads((sweep / job / "result.json").read_text()) for job in "01"]
    assert results[0]["output"] != results[1]["output"]
    assert (sweep / "results.md").read_text().count("\n| ") == 3
    runs = sorted(sweep.glob("*/wandb/offline-run-*/*.wandb"))
    assert [path.relative_to(sweep).parts[0] for path in runs] == ["0", "1"]
    for path, result in zip(runs, results, strict=True):
        config, summary, code = read_wandb(path)
        assert config["objective"]["lambda_clm"] == 0.9
        assert summary["train/loss"] == pytest.approx(result["train/loss"])
        assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["launcher=joblib", "launcher=submitit_local", "sweeper=optuna"])
def test_other_launchers_and_sweepers_share_what_is_computed(world: Run, tmp_path: Path, plugin: str) -> None:
    values = {"launcher=joblib": ["seed=0,1", "hydra.launcher.n_jobs=2"], "launcher=submitit_local": ["seed=0,1"]}
    optuna = ["objective.lambda_clm=interval(0.5,0.9)", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=minimize"]
    arguments = ["-m", f"hydra/{plugin}", *overrides(world), *values.get(plugin, optuna)]
    done = run("train.py", arguments, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = list((tmp_path / "multirun").glob("train/*/*/result.json"))
    assert len(results) == 2
    assert len({json.loads(path.read_text())["output"] for path in results}) == 2
    assert len(list((Path(world.artifacts) / "source").glob("*/manifest.json"))) == 3, "the sources ran once"


def read_wandb(path: Path) -> tuple[dict, dict, int]:
    """Config, last value of every metric, and exit code of an offline run, from the file that would be synced."""
    from wandb.proto import wandb_internal_pb2

    config, summary, code = {}, {}, -1
    for data in logged(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for update in record.run.config.update:
            config[update.key] = json.loads(update.value_json)
        for item in record.history.item:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("exit"):
            code = record.exit.exit_code
    return config, summary, code


def logged(raw: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: pieces of at most one 32 KB block, each after crc, length and kind."""
    at, record = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # what is left of a block cannot hold a header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        record = (b"" if kind in (1, 2) else record) + raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
