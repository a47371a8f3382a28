"""How fast are ready batches? python benchmarks/streaming.py [--tokens 2000000]

Three sources at K = 10 over one synthetic store, one thread, no workers, warm, global shuffle, micro-batches of 4
blocks of up to 2048 tokens. In the same run, interleaved: a bare np.memmap read of the same bytes, `datasets` with
`with_format("torch")` over fixed-size lists, and lists of lists as in the FuseLLM release. Million target tokens per
second of processor time (one core; fair on a busy machine). A batch of ours is ready: padded, int64 ids, float32
log-probabilities, cross-entropies.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from fusion.artifact import MANIFEST
from fusion.data import Blocks
from fusion.sources import _offsets
from fusion.store import Store, shard_name, write_shard

K, SOURCES, SHARD = 10, 3, 64


def build(root: Path, tokens: int, length: int) -> tuple[Blocks, int]:
    """A tokens store and three distribution stores of random numbers."""
    rng, blocks = np.random.default_rng(0), tokens // length
    shards = -(-blocks // SHARD)
    stores = []
    for s in range(-1, SOURCES):
        folder = root / str(s)
        folder.mkdir()
        for shard in range(shards):
            b = min(SHARD, blocks - shard * SHARD)
            n = b * (length - (s >= 0))
            if s < 0:
                columns = {"ids": rng.integers(0, 32000, n).astype(np.uint16), "counted": np.ones(n, bool)}
                columns |= {"offsets": _offsets([length] * b), "bytes": np.full(b, 4 * length, np.int32)}
            else:
                columns = {"ids": rng.integers(0, 32000, (n, K)).astype(np.uint16)}
                columns["logprobs"] = -rng.random((n, K), np.float32).astype(np.float16)
                columns |= {"ce": rng.random(n, np.float32).astype(np.float16), "block_ce": np.ones(b, np.float32)}
            write_shard(folder / shard_name(shard, "train" if s < 0 else ""), columns, {})
        files = {p.name: "" for p in sorted(folder.glob("*.safetensors"))}
        manifest = {"files": files, "k": K, "dtype": "uint16"}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        (folder / ".verified").write_text(
            json.dumps({n: [(folder / n).stat().st_size, (folder / n).stat().st_mtime_ns] for n in files})
        )
        stores.append(Store(folder))
    return Blocks(stores[0], "train", stores[1:]), blocks


def measure(name: str, read, groups: list, tokens: int) -> float:
    began = time.process_time()
    for group in groups:
        read(group)
    return tokens / (time.process_time() - began) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    length = options.length
    with tempfile.TemporaryDirectory() as root:
        ours, blocks = build(Path(root), options.tokens, length)
        order = np.random.default_rng(1).permutation(blocks)
        groups = [order[i : i + 4].tolist() for i in range(0, blocks, 4)]

        raw = np.memmap(Path(root) / "raw", np.uint16, "w+", shape=(blocks, length, SOURCES * (2 * K + 1)))
        raw[:] = 1
        columns = {}
        for s in range(SOURCES):
            flat = np.ones(blocks * length * K, np.int32)
            for name, values in ((f"ids{s}", flat), (f"logprobs{s}", flat.astype(np.float16))):
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values), length * K)
        arrow = datasets.Dataset(pa.table(columns)).with_format("torch")
        few = max(1, len(groups) // 8)
        nested = [{"ids": [[1] * K] * length, "logprobs": [[0.5] * K] * length} for _ in range(4)]

        def release(group: list[int]) -> None:
            for _ in range(SOURCES):
                for row in nested[: len(group)]:
                    torch.tensor(row["ids"]), torch.tensor(row["logprobs"])

        contenders = {
            "fusion: ready batches": (lambda g: ours.batch(g), groups),
            "bare np.memmap read": (lambda g: raw[g].copy(), groups),
            "datasets with_format('torch')": (lambda g: arrow[g], groups[:few]),
            "lists of lists (the release's layout)": (release, groups[: max(1, few // 8)]),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds + 1):
            for name, (read, work) in contenders.items():
                rates[name].append(measure(name, read, work, sum(len(g) for g in work) * length))
        best = {name: max(values[1:]) for name, values in rates.items()}
        own = best["fusion: ready batches"]
        print(f"{options.tokens:,} tokens, blocks of {length}, {SOURCES} sources, K = {K}, best of {options.rounds}")
        for name, rate in best.items():
            print(f"{name:40s} {rate:9.3f} M tokens/s   ours / this {own / rate:8.2f}")


if __name__ == "__main__":
    main()
