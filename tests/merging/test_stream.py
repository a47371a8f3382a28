"""Merges from disk to disk: files, conflicts, resume, statistics, threads, memory, verification, the command line."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from fusion.config import Merge, UserError
from fusion.merging import job, merge, methods, statistics
from fusion.merging.verify import verify

HERE = "fusion.merging.methods."
ALL = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce", "varm"]
ROOT = Path(__file__).parents[2]
SHAPES = {
    "model.embed_tokens.weight": (300, 64),
    "lm_head.weight": (300, 64),
    "model.norm.weight": (64,),
    **{f"model.layers.{i}.mlp.up_proj.weight": (1500, 64) for i in range(3)},
    **{f"model.layers.{i}.input_layernorm.weight": (64,) for i in range(3)},
}


def write(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, shards: int = 1, **changes) -> Path:
    """A model: the pivot (seed 0), or the pivot with movements drawn from `seed`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.02
        if seed:
            moved = (
                torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i))
                * 2e-3
                * (1 + (i * seed) % 3)
            )
            value = value + moved * (torch.rand(shape, generator=torch.Generator().manual_seed(i)) > 0.25)
        tensors[name] = value.to(dtype)
    tensors |= changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": 64})
    )
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, index = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b", "c")):
        write(tmp_path / name, seed, shards=2 if name == "b" else 1)
    return tmp_path


def config(world: Path, method: str = "varm", output: str = "out", models: str = "abc", **keys) -> Merge:
    options = {k: keys.pop(k) for k in list(keys) if k not in Merge.__dataclass_fields__}
    listed = [str(world / m) for m in (models[:2] if method == "slerp" else models)]
    return Merge(
        base=keys.pop("base", str(world / "base")),
        models=listed,
        output=str(world / output),
        merge={"method": HERE + method, **options},
        **keys,
    )


def weights_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_byte_identical_for_any_number_of_threads(world: Path, method: str) -> None:
    results = [weights_of(merge(config(world, method, f"out{n}", threads=n))) for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_merged_with_itself_is_that_model(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    zeros = torch.tensor([0.0, -0.0, 1e-7, -1.0], dtype=dtype).repeat(16)
    write(tmp_path / "base", 1, dtype, **{"model.norm.weight": zeros})
    output = merge(config(tmp_path, method, models=["base"] * 3))
    found, wanted = load_torch(output / "model.safetensors"), load_torch(tmp_path / "base" / "model.safetensors")
    assert found.keys() == wanted.keys()
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert all((found[n].view(kind) == wanted[n].view(kind)).all() for n in wanted)


def test_output_does_not_depend_on_shards_and_is_complete(world: Path) -> None:
    whole = load_torch(merge(config(world, "dare_ties", "one")) / "model.safetensors")
    output = merge(config(world, "dare_ties", "many", shard_gb=2e-4))
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    parts = {n: t for file in set(index.values()) for n, t in load_torch(output / file).items()}
    assert parts.keys() == whole.keys() == SHAPES.keys()
    assert all(torch.equal(parts[n], whole[n]) and parts[n].dtype == torch.bfloat16 for n in whole)
    assert {"config.json", "tokenizer.json", "README.md", "merge_manifest.json"} <= {p.name for p in output.iterdir()}


def test_dtype_and_arithmetic(world: Path) -> None:
    output = merge(config(world, "task_arithmetic", dtype="float32", weights=[1.0, 1.0, 1.0]))
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "float32"
    base, *others = [load_all(world / m) for m in ("base", "a", "b", "c")]
    for name, value in load_file(output / "model.safetensors").items():
        wanted = base[name].double() + sum(o[name].double() - base[name].double() for o in others)
        np.testing.assert_allclose(value, wanted.numpy(), rtol=0, atol=1e-7)
    write(world / "big", 1, torch.float32, **{"model.norm.weight": torch.full((64,), 1e5)})
    with pytest.raises(UserError, match=r"model.norm.weight of the result does not fit into F16"):
        merge(config(world, "linear", models=["big"], base=str(world / "big"), dtype="float16", overwrite=True))


@pytest.mark.parametrize("method", ALL)
def test_a_device_gives_the_same_merge(world: Path, method: str) -> None:
    """What runs on a GPU, run by torch on the CPU: equal but for the order of sums."""
    found = load_all(merge(config(world, method, "there", device="cpu:0", dtype="float32")))
    wanted = load_all(merge(config(world, method, "here", dtype="float32")))
    assert all(torch.allclose(found[n], wanted[n], rtol=0, atol=2e-7) for n in wanted)


def test_a_device_that_is_not_there(world: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"device=cuda cannot be used here .*: set device=cpu"):
        merge(config(world, device="cuda"))


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_torch(file).items()}


def test_weights_table_and_manifest(world: Path) -> None:
    output = merge(config(world, granularity="layer"))
    rows = list(csv.DictReader((output / "merge_weights.csv").open()))
    assert {r["tensor"] for r in rows} == SHAPES.keys()
    assert all(abs(sum(float(r[m]) for m in "abc") - 1) < 1e-8 for r in rows)
    by_unit = {}
    for row in rows:
        by_unit.setdefault(row["unit"], set()).add(row["a"])
    assert all(len(found) == 1 for found in by_unit.values())
    base, a = load_all(world / "base"), load_all(world / "a")
    moved = {
        m: [load_all(world / m)[n].double() - base[n].double() for n in SHAPES if ".layers.1." in n] for m in "abc"
    }
    squares = {m: sum(d.square().sum() for d in moved[m]) for m in "abc"}
    row = next(r for r in rows if r["unit"] == "model.layers.1")
    assert abs(float(row["a"]) - float(squares["a"] / sum(squares.values()))) < 1e-8
    manifest = json.loads((output / "merge_manifest.json").read_text())
    assert manifest["weights"]["models"] == ["a", "b", "c"]
    assert set(manifest["inputs"][2]["files"]) == set(p.name for p in (world / "b").glob("*.safetensors"))
    assert set(manifest["outputs"]) == {p.name for p in output.iterdir()} - {"merge_manifest.json"}
    assert (output / "merge_weights.png").stat().st_size > 10_000
    assert a.keys() == base.keys()


def test_result_loads_and_generates(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        LlamaForCausalLM(shape).save_pretrained(tmp_path / name)
    output = merge(config(tmp_path, models="ab"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False).shape == (1, 8)
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


def test_a_real_model(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    real = shared / "data" / "models" / "stories260K"
    shutil.copytree(real, tmp_path / "base")
    os.chmod(tmp_path / "base", 0o755)
    tensors = load_torch(real / "model.safetensors")
    (tmp_path / "a").mkdir()
    generator = torch.Generator().manual_seed(0)
    moved = {n: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(moved, tmp_path / "a" / "model.safetensors")
    output = merge(config(tmp_path, models=["a", "base"]))
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    assert "time" in text
    assert len(text) > 30


# --- what cannot be merged -------------------------------------------------------------------------------------------


def test_conflicts_are_all_listed(world: Path) -> None:
    write(world / "d", 1, **{"lm_head.weight": None, "model.norm.weight": torch.ones(65), "extra.bias": torch.ones(3)})
    write(world / "e", 2, torch.float32, **{"model.embed_tokens.weight": torch.ones(310, 64)})
    with pytest.raises(UserError) as caught:
        merge(config(world, models="de"))
    text = str(caught.value)
    assert "\n" not in text
    for part in ("lm_head.weight is missing from", "tied", "model.norm.weight is [65]", "extra.bias is missing from"):
        assert part in text
    assert "resized vocabulary?" in text
    assert "stored as F32" in text
    assert not (world / "out").exists()
    output = merge(config(world, models="de", conflicts="pivot"))
    found, pivot = load_all(output), load_all(world / "base")
    assert found.keys() == pivot.keys()
    assert torch.equal(found["lm_head.weight"], pivot["lm_head.weight"])
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], pivot["model.layers.0.mlp.up_proj.weight"])
    manifest = json.loads((output / "merge_manifest.json").read_text())
    assert set(manifest["kept_from_pivot"]) == {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"}
    assert manifest["left_out"] == ["extra.bias"]
    assert verify(output) == []


def test_integers_are_carried_over_when_equal(world: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        write(world / name, seed, **{"model.rotary.positions": torch.arange(9), "one": torch.tensor(0.5)})
    output = merge(config(world, models="a"))
    assert torch.equal(load_all(output)["model.rotary.positions"], torch.arange(9))
    write(world / "b2", 1, **{"model.rotary.positions": torch.arange(9) + 1, "one": torch.tensor(0.5)})
    with pytest.raises(UserError, match=r"positions .I64. differs in"):
        merge(config(world, models=["b2"]))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights_are_named(world: Path, method: str, value: float) -> None:
    norm = torch.ones(64, dtype=torch.bfloat16)
    norm[7] = value
    write(world / "a", 1, **{"model.norm.weight": norm})
    with pytest.raises(UserError, match=r"a/model.safetensors: tensor model.norm.weight holds an infinity or NaN"):
        merge(config(world, method))
    assert not (world / "out").exists()


def test_bad_inputs(world: Path) -> None:
    cases = [
        ({"base": str(world / "nowhere")}, r"base=.*nowhere: no such folder"),
        ({"models": []}, r"models is empty"),
        ({"output": "a"}, r"output=.*a is one of the inputs"),
    ]
    for keys, message in cases:
        with pytest.raises(UserError, match=message):
            merge(config(world, **keys))
    (world / "empty").mkdir()
    with pytest.raises(UserError, match=r"models\[0\]: no safetensors in"):
        merge(config(world, models=["empty"]))
    data = (world / "a" / "model.safetensors").read_bytes()
    for cut in (4, 100, len(data) - 10):
        (world / "a" / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"models\[0\]: .*(no whole safetensors|cut short)"):
            merge(config(world))
    (world / "b" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="which its index names"):
        merge(config(world, models="b"))


# --- trust -----------------------------------------------------------------------------------------------------------


def test_other_content_is_refused_and_the_same_merge_is_found_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = merge(config(world))
    stamp = (output / "model.safetensors").stat().st_mtime_ns
    assert merge(config(world)) == output
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="overwrite=true"):
        merge(config(world, "linear"))
    assert verify(output) == []
    (output / "stray.safetensors").write_bytes(b"old")
    merge(config(world, "linear", overwrite=True))
    assert not (output / "stray.safetensors").exists()
    assert sorted(p.name for p in world.iterdir() if not p.name.startswith(".")) == ["a", "b", "base", "c", "out"]


def test_a_failed_merge_leaves_nothing_and_continues_where_it_was(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = weights_of(merge(config(world, "ties", "reference")))
    seen: list[str] = []

    def failing(tensor, **options):
        if tensor.name != "trial":
            seen.append(tensor.name)
            if len(seen) == 5:
                raise KeyboardInterrupt
        return original(tensor, **options)

    original = methods.ties
    failing.__kwdefaults__, failing.__module__, failing.__qualname__ = None, original.__module__, "ties"
    monkeypatch.setattr(job, "options_of", lambda *_: (failing, {}))
    with pytest.raises(KeyboardInterrupt):
        merge(config(world, "ties", threads=1))
    assert not (world / "out").exists()
    done = [json.loads(x)["tensor"] for x in (world / "out.partial" / "journal.jsonl").read_text().splitlines()]
    assert len(done) >= 4
    victim = done[0]
    spoil(world / "out.partial" / "model.safetensors", victim)
    seen[:] = ["", "", "", "", ""]
    output = merge(config(world, "ties", threads=1))
    assert set(seen[5:]) == (SHAPES.keys() - set(done)) | {victim}  # the damaged one is done again, the others are not
    assert weights_of(output) == wanted
    assert verify(output) == []


def spoil(file: Path, tensor: str) -> None:
    """Change one byte of a tensor."""
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        begin = json.loads(stream.read(length))[tensor]["data_offsets"][0]
        stream.seek(8 + length + begin)
        byte = stream.read(1)
        stream.seek(8 + length + begin)
        stream.write(bytes([byte[0] ^ 255]))


def test_what_is_left_of_another_merge_is_not_used(world: Path) -> None:
    wanted = weights_of(merge(config(world, "linear", "reference")))
    (world / "out.partial").mkdir()
    (world / "out.partial" / "recipe.json").write_text('{"method": "another"}')
    (world / "out.partial" / "model-00001-of-00009.safetensors").write_bytes(b"older")
    assert weights_of(merge(config(world, "linear"))) == wanted


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path) -> None:
    """SIGKILL at several moments, then the same command: the same bytes, and never a half-written folder."""
    wide = {f"model.layers.{i}.wide.weight": torch.randn(1024, 2048).bfloat16() for i in range(20)}
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, seed, **{n: t + seed * 1e-3 for n, t in wide.items()})
    program = (
        "import sys; from fusion.config import Merge; from fusion.merging import merge; b, a, c, o = sys.argv[1:]; "
        f"print('go', flush=True); merge(Merge(b, [a, c], o, {{'method': '{HERE}ties'}}))"
    )
    command = [sys.executable, "-c", program, *(str(tmp_path / n) for n in ("base", "a", "b"))]
    subprocess.run([*command, str(tmp_path / "reference")], check=True, stdout=subprocess.DEVNULL)
    kills = 0
    for wait in (0.4, 0.8, 1.2):
        process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
        process.stdout.close()
        assert not (tmp_path / "out").exists() or verify(tmp_path / "out") == []
    assert kills
    subprocess.run([*command, str(tmp_path / "out")], check=True, stdout=subprocess.DEVNULL)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "reference")
    assert verify(tmp_path / "out") == []


def test_verify_names_what_changed(world: Path, capsys: pytest.CaptureFixture) -> None:
    output = merge(config(world, "dare_linear", shard_gb=2e-4))
    assert verify(output, tensors=100) == []
    changed = shutil.copytree(output, world / "changed")
    file = sorted(changed.glob("*.safetensors"))[1]
    spoil(file, next(iter(load_torch(output / file.name))))
    assert verify(changed) == [f"{file.name} changed"]
    (changed / "tokenizer.json").write_text("[]")
    assert "tokenizer.json changed" in verify(changed)
    file.unlink()
    assert verify(changed)[0].endswith("missing")
    spoil(world / "c" / "model.safetensors", "lm_head.weight")
    assert verify(output) == [f"input {(world / 'c').resolve()}/model.safetensors changed"]
    with pytest.raises(UserError, match=r"holds no merge_manifest.json"):
        verify(world / "a")


def test_verify_merges_a_sample_again(world: Path) -> None:
    """Bytes that agree with a forged manifest still have to be what the inputs give."""
    output = merge(config(world, "linear"))
    other = merge(config(world, "linear", "other", weights=[0.5, 0.3, 0.2]))
    manifest = json.loads((other / "merge_manifest.json").read_text())
    manifest["recipe"]["options"] = {}
    (other / "merge_manifest.json").write_text(json.dumps(manifest))
    assert any("are not what the inputs give" in problem for problem in verify(other))
    assert verify(output) == []


def test_plan_does_nothing(world: Path, capsys: pytest.CaptureFixture) -> None:
    merge(config(world, plan=True))
    text = capsys.readouterr().out
    assert "write" in text
    assert "GB  free" in text
    assert sorted(p.name for p in world.iterdir()) == ["a", "b", "base", "c"]


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(tensor, number of models) of every measurement."""
    seen: list[tuple[str, int]] = []
    original = statistics.Movements.tensor

    def spy(self, statistic, name, measure):
        def counted(n, models):
            seen.append((n, len(models)))
            return measure(n, models)

        return original(self, statistic, name, counted)

    monkeypatch.setattr(statistics.Movements, "tensor", spy)
    return seen


def test_statistics_are_measured_once(world: Path, measured: list[tuple[str, int]]) -> None:
    results = {}
    for granularity in ("model", "layer", "matrix", "parameter"):
        results[granularity] = weights_of(merge(config(world, output=granularity, granularity=granularity)))
    assert sorted(measured) == sorted((name, 3) for name in SHAPES)
    assert len({r["model.safetensors"] for r in results.values()}) == 4
    measured.clear()
    merge(config(world, output="two", models="ab"))  # fewer models: nothing to read
    write(world / "d", 4)
    merge(config(world, output="four", models="abcd"))
    assert sorted(measured) == sorted((name, 1) for name in SHAPES)
    measured.clear()
    merge(config(world, output="abs", statistic="abs"))
    assert len(measured) == len(SHAPES)
    shutil.rmtree(world / "a" / ".fusion")
    assert weights_of(merge(config(world, output="again"))) == results["matrix"]


def test_statistics_belong_to_the_content(world: Path, measured: list[tuple[str, int]]) -> None:
    merge(config(world, output="one"))
    measured.clear()
    os.utime(world / "a" / "model.safetensors")  # touched, the same content
    merge(config(world, output="two"))
    assert measured == []
    before = (world / "a" / "model.safetensors").stat()
    spoil(world / "a" / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    os.utime(world / "a" / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    fresh = merge(config(world, output="three"))
    assert sorted(measured) == sorted((name, 1) for name in SHAPES)
    shutil.rmtree(world / "a" / ".fusion")
    assert weights_of(merge(config(world, output="four"))) == weights_of(fresh)


def test_a_read_only_model_folder_is_no_obstacle(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(statistics, "write_json", refuse)
    merge(config(world))
    assert not (world / "a" / ".fusion" / "movements.json").exists()


# --- memory ----------------------------------------------------------------------------------------------------------

PROBE = """
import sys, threading, time
from pathlib import Path
from fusion.config import Merge
from fusion.merging import merge
from fusion.merging.run import anonymous_mb
peak = [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous_mb()); time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
base, output, method, granularity, *models = sys.argv[1:]
merge(Merge(base, models, output, {"method": "fusion.merging.methods." + method}, granularity=granularity, threads=2))
print(peak[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "granularity"), [("varm", "model"), ("ties", "matrix"), ("sce", "matrix")])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, method: str, granularity: str) -> None:
    """A pivot and four models of 2.1 GB, half of it one tensor (sparse files: the disk need not be large)."""
    rows, columns = 131_072, 4096
    tensors = {"model.embed_tokens.weight": (rows, columns), "model.layers.0.mlp.up_proj.weight": (rows, columns)}
    for seed, name in enumerate(("base", "a", "b", "c", "d")):
        sparse(tmp_path / name / "model.safetensors", tensors, seed)
    command = [sys.executable, "-c", PROBE, *(str(tmp_path / n) for n in ("base", "out")), method, granularity]
    warm = [str(tmp_path / n) for n in "abcd"]
    subprocess.run([*command, *warm], check=True, capture_output=True)  # kernels are compiled once
    shutil.rmtree(tmp_path / "out")
    found = subprocess.run([*command, *warm], check=True, capture_output=True, text=True)
    assert float(found.stdout) <= 250


def sparse(path: Path, shapes: dict[str, tuple[int, int]], seed: int) -> None:
    """A bfloat16 model that is zero but for a megabyte at the start of every tensor."""
    path.parent.mkdir()
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in header.values():
            file.seek(8 + len(text) + value["data_offsets"][0])
            noise = torch.randn(500_000, generator=torch.Generator().manual_seed(seed)).bfloat16()
            file.write(noise.view(torch.int16).numpy().tobytes())
        file.truncate(8 + len(text) + offset)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_over_the_granularities(world: Path) -> None:
    models = ",".join(str(world / m) for m in "abc")
    command = [sys.executable, str(ROOT / "merge.py"), "-m", "granularity=model,layer,matrix,parameter"]
    command += [
        f"base={world / 'base'}",
        f"models=[{models}]",
        f"output={world / 'out'}",
        f"hydra.sweep.dir={world / 'sweep'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=world)
    assert done.returncode == 0, done.stderr
    folders = sorted(p.name for p in (world / "out").iterdir() if p.is_dir())
    assert folders == [f"granularity={g}" for g in ("layer", "matrix", "model", "parameter")]
    assert (world / "sweep" / "results.md").exists()
    wrong = subprocess.run(
        [*command[:2], *command[4:6], "output=x", "merge=tis"], capture_output=True, text=True, check=False, cwd=world
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert "ties" in wrong.stderr
    missing = [*command[:2], f"base={world / 'gone'}", f"models=[{models}]", "output=x"]
    wrong = subprocess.run(missing, capture_output=True, text=True, check=False, cwd=world)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.splitlines()[-1].endswith("gone: no such folder")
