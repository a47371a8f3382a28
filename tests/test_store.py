"""Shards survive kills, full disks, flipped bytes and any number of processes, and say what is in them."""

import copy
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import make_world, paths

from fusion import store as shelf
from fusion.artifact import MANIFEST, read_manifest
from fusion.config import UserError
from fusion.sources import precompute


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = make_world(tmp_path_factory.mktemp("world"), documents=16)
    config.externalize.shard_blocks = 4
    return config


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The artifacts of an uninterrupted run."""
    config = replace(world, artifacts=str(tmp_path_factory.mktemp("whole")))
    precompute(config, *paths(config))
    return Path(config.artifacts)


def start(config, limit=0, **environment):
    """precompute in a process of its own, forked so that the kills meet work and not imports."""
    torch.set_num_threads(1)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        precompute(config, *paths(config))
        code = 0
    except UserError as error:
        Path(config.artifacts, "error.txt").write_text(str(error))
        code = 2
    finally:
        os._exit(code)


def wait(child, seconds=120.0):
    """Exit code of a child; None if it still runs after that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def content(folder):
    """Bytes of every file that counts, by its path."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock" and p.name != shelf.STAMPS and "vocabulary" not in p.parts
    }


# --- writing and reading


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 12),
    ragged=st.booleans(),
    width=st.sampled_from([700, 70_000]),
    data=st.data(),
)
def test_what_is_written_is_read(tmp_path_factory, n, k, ragged, width, data):
    from fusion.sources import _entries, _narrow, _offsets

    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    ids, logprobs = rng.integers(0, width, (n, k)).astype(_narrow(width)), -rng.random((n, k)).astype(np.float16) * 9
    used = np.sort(rng.random((n, k)) < 0.6, axis=1)[:, ::-1] if ragged else np.ones((n, k), bool)
    offsets = _offsets([n // 3, n - n // 3])
    path = tmp_path_factory.mktemp("shard") / "00000.safetensors"
    shelf.write_shard(path, _entries(ids, logprobs, used, ragged, offsets), {"a": 1.5})
    shelf.write_json(path.parent / MANIFEST, {"files": {path.name: shelf.checksum(path)}})
    columns = shelf.Store(path.parent).shard(path.name)
    assert shelf.read_facts(path) == {"a": 1.5}
    for block, (begin, end) in enumerate(itertools.pairwise(offsets)):
        read_ids, read_logprobs = shelf.dense(columns, begin, end, block, k)
        u = used[begin:end]
        np.testing.assert_array_equal(read_ids[u], ids[begin:end][u])
        np.testing.assert_array_equal(read_logprobs[u], logprobs[begin:end][u])
        assert (read_logprobs[~u] == -np.inf).all()


def test_a_store_of_ten_entries_takes_42_bytes_a_token(tmp_path):
    """The promise for a vocabulary under 65,536 at K = 10: header, offsets and per-block figures included."""
    from fusion.sources import _entries, _offsets

    for width, most in ((32_000, 42), (128_256, 62)):
        from fusion.sources import _narrow

        offsets = _offsets([750] * 64)
        n = int(offsets[-1])
        zeros = np.zeros((n, 10))
        columns = _entries(zeros.astype(_narrow(width)), zeros, zeros == 0, False, offsets)
        columns |= {"ce": np.zeros(n, np.float16), "block_ce": np.zeros(64, np.float32), "offsets": offsets}
        path = tmp_path / f"{width}.safetensors"
        shelf.write_shard(path, columns, {"positions": n})
        assert path.stat().st_size / (64 * 751) <= most


# --- kills


def test_killed_twenty_times_the_result_is_the_same_to_the_bit(world, whole, tmp_path):
    config, kills = replace(world, artifacts=str(tmp_path / "artifacts")), 0
    random.seed(0)
    expected = content(whole)
    for _ in range(200):
        child = start(config)
        code = wait(child, random.uniform(0.01, 0.4 + 0.05 * kills))
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        if kills >= 20:
            break
        if code == 0:  # finished too early: begin again with some of it taken away
            for folder in Path(config.artifacts).glob("*/*"):
                if folder.is_dir() and random.random() < 0.7:
                    shutil.rmtree(folder)
    assert kills >= 20
    precompute(config, *paths(config))
    made = content(Path(config.artifacts))
    assert made.keys() == expected.keys()
    assert all(made[name] == expected[name] for name in expected)


def test_ranks_share_the_work_and_may_change_in_number(world, whole, tmp_path):
    config = replace(world, artifacts=str(tmp_path / "artifacts"))
    first = [start(config, RANK=str(r), WORLD_SIZE="3") for r in range(3)]
    deadline = time.time() + 60
    while not list(Path(config.artifacts).glob("source/*.partial/0*.safetensors")) and time.time() < deadline:
        time.sleep(0.005)
    for child in first:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not list(Path(config.artifacts).glob(f"aligned/*/{MANIFEST}"))
    second = [start(config, RANK=str(r), WORLD_SIZE="2") for r in range(2)]
    assert [wait(child) for child in second] == [0, 0]
    assert content(Path(config.artifacts)) == content(whole)
    assert not list(Path(config.artifacts).glob("*/*.locks")) + list(Path(config.artifacts).glob("*/*.partial"))


def test_no_shard_is_made_twice(tmp_path):
    """Three processes, one store: every shard is made once, by one of them."""
    code = """
import sys, time
from pathlib import Path
import numpy as np
from fusion.store import fill, write_shard
def make(path):
    with open(sys.argv[1] + "/made.txt", "a") as file:
        file.write(path.name + "\\n")
    time.sleep(0.02)
    write_shard(path, {"x": np.zeros(3)}, {"n": 1})
names = [f"{i:05d}.safetensors" for i in range(24)]
fill(Path(sys.argv[1]), "source", {"a": 1}, names, make, lambda totals: totals, int(sys.argv[2]))
"""
    run = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(8 * i)]) for i in range(3)]
    assert [p.wait() for p in run] == [0] * 3
    made = (tmp_path / "made.txt").read_text().split()
    assert len(made) == len(set(made)) == 24
    (manifest,) = tmp_path.glob(f"source/*/{MANIFEST}")
    assert json.loads(manifest.read_text())["n"] == 24


# --- damage


def flip(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_byte_is_named_and_only_that_shard_is_made_again(world, whole, tmp_path, capsys):
    config = replace(world, artifacts=str(tmp_path / "artifacts"))
    shutil.copytree(whole, config.artifacts)
    done = precompute(config, *paths(config))
    for folder in (done.tokens, done.distributions["target"], done.distributions["piece"]):
        victim = sorted(folder.glob("*.safetensors"))[-1]
        times = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
        before = victim.read_bytes()
        flip(victim)
        with pytest.raises(UserError, match=rf"{victim.name}: damaged"):
            read_all(config, done)
        capsys.readouterr()
        assert precompute(config, *paths(config)) == done
        assert f"{folder}: {victim.name} damaged" in capsys.readouterr().out
        assert victim.read_bytes() == before
        again = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
        assert [name for name in times if again[name] != times[name]] == [victim.name]
    assert content(Path(config.artifacts)) == content(whole)


def read_all(config, done):
    from fusion.data import FusionData

    data = FusionData(config, done)
    for blocks in (data.train, data.held_out):
        for block in range(len(blocks)):
            blocks.batch([block])


def test_a_missing_file_is_made_again(world, whole, tmp_path):
    config = replace(world, artifacts=str(tmp_path / "artifacts"))
    shutil.copytree(whole, config.artifacts)
    victim = sorted(Path(config.artifacts).glob("aligned/*/*.safetensors"))[1]
    victim.unlink()
    precompute(config, *paths(config))
    assert content(Path(config.artifacts)) == content(whole)


def test_a_full_disk_is_one_clear_line_and_what_is_done_stays(world, whole, tmp_path):
    """A limit on the size of a file stands for the disk; the small tokens fit, the distributions do not."""
    sizes = {kind: [p.stat().st_size for p in whole.glob(f"{kind}/*/*.safetensors")] for kind in ("tokens", "source")}
    limit = max(*sizes["tokens"], min(sizes["source"]) + 1)
    assert limit < max(sizes["source"])
    config = replace(world, artifacts=str(tmp_path / "artifacts"))
    assert wait(start(config, limit=limit)) == 2
    message = Path(config.artifacts, "error.txt").read_text()
    assert "no room" in message
    assert "artifacts=FOLDER" in message
    assert "\n" not in message
    Path(config.artifacts, "error.txt").unlink()
    finished = [p for p in Path(config.artifacts).rglob("*.safetensors")]
    assert finished
    assert not list(Path(config.artifacts).rglob(".*.safetensors.*"))
    precompute(config, *paths(config))
    assert content(Path(config.artifacts)) == content(whole)


# --- what does not fit together


def test_a_store_of_other_tokens_is_refused_with_the_field(world, whole, tmp_path):
    from fusion.data import FusionData

    config = replace(world, artifacts=str(tmp_path / "artifacts"))
    shutil.copytree(whole, config.artifacts)
    done = precompute(config, *paths(config))
    other = copy.deepcopy(config)
    other.corpus.block_size = 64
    shorter = precompute(other, *paths(other))
    with pytest.raises(UserError, match=r"another corpus.block_size \(128, not 64\)"):
        FusionData(other, shorter._replace(distributions=done.distributions))
    text = tmp_path / "other.jsonl"
    text.write_text(Path(config.corpus.path).read_text().replace("the", "a"))
    other = replace(config, corpus=replace(config.corpus, path=str(text)), artifacts=str(tmp_path))
    tokens = precompute(replace(other, fuse_target=False), other.target.path, {})
    with pytest.raises(UserError, match=r"another corpus.files"):
        FusionData(other, tokens._replace(distributions=done.distributions))
    with pytest.raises(UserError, match=r"no finished store"):
        shelf.Store(tmp_path)


# --- the command


def command(*arguments):
    run = [sys.executable, "-m", "fusion.store", *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    return done.returncode, done.stdout + done.stderr


def test_the_command_shows_verifies_and_exports(world, whole, tmp_path):
    import datasets

    artifacts = tmp_path / "artifacts"
    shutil.copytree(whole, artifacts)
    code, text = command(artifacts, "--verify")
    assert code == 0
    assert "every checksum of 6 stores is right" in text
    assert "coverage" in text
    assert "alignment span" in text
    victim = sorted(artifacts.glob("aligned/*/*.safetensors"))[0]
    stat = victim.stat()
    flip(victim)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, text = command(artifacts, "--verify")
    assert code == 1
    assert f"{victim}: damaged" in text.replace("\n", "")
    assert command(tmp_path / "nothing") == (
        2,
        f"error: {tmp_path / 'nothing'}: no finished store here (no {MANIFEST})\n",
    )
    folder = next(p for p in whole.glob("source/*") if p.is_dir())
    code, text = command(folder, "--export", "parquet", "-o", tmp_path / "exported")
    assert code == 0, text
    rows = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "exported"), split="train", cache_dir=str(tmp_path / "c")
    )
    store = shelf.Store(folder)
    columns = store.shard(store.shards()[0])
    n = columns["offsets"][1]
    assert rows[0]["ids"] == columns["ids"][:n].ravel().tolist()
    np.testing.assert_array_equal(np.float16(rows[0]["logprobs"]), columns["logprobs"][:n].ravel())
    assert len(rows) == sum(read_manifest(p)["blocks"] for p in whole.glob("tokens/*") if p.is_dir())


# --- memory


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_the_store(tmp_path):
    """Two gigabytes read block by block: at most 150 MB resident beyond the start."""
    folder, n = tmp_path / "source", 100_000
    folder.mkdir()
    columns = {
        "ids": np.ones((n, 10), np.uint16),
        "logprobs": np.zeros((n, 10), np.float16),
        "ce": np.zeros(n, np.float16),
    }
    shelf.write_shard(folder / shelf.shard_name(0), columns, {})
    for i in range(1, 480):
        os.link(folder / shelf.shard_name(0), folder / shelf.shard_name(i))
    digest = shelf.checksum(folder / shelf.shard_name(0))
    shelf.write_json(folder / MANIFEST, {"files": {shelf.shard_name(i): digest for i in range(480)}})
    shelf._stamp(folder, [shelf.shard_name(i) for i in range(480)])
    code = """
import resource, sys
from fusion.store import Store
import numpy as np
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
store, begin, most, total = Store(sys.argv[1]), resident(), 0, 0
for name in store.shards():
    columns = store.shard(name)
    for i in range(0, 100_000, 2_000):
        total += int(columns["ids"][i : i + 2_000].sum()) + int(columns["logprobs"][i : i + 2_000].sum())
        store.read(80_000)
    most = max(most, resident())
print(begin, most, total)
"""
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    begin, most, total = map(float, out.split())
    assert total == 480 * n * 10
    assert most - begin < 150
