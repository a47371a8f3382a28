"""What do the kept distributions cost beyond the bare forward pass? python benchmarks/precompute.py

A random Llama (--hidden, --layers, --vocabulary) reads the same batches of real text lengths twice, interleaved: once
bare (`model(ids, mask).logits`, as anyone would), once through `Reader` and `keep` (top 10, full logsumexp, gold CE).
Ratio of processor times, padding, and the peak of resident memory of each in a process of its own.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusion.config import LLM, Externalize
from fusion.sources import Reader, batches, keep


def work(options: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 0.8, options.rows).astype(int) + 16, 1024).tolist()
    made = []
    for batch in batches(lengths, options.batch_tokens):
        longest = max(lengths[r] for r in batch)
        mask = torch.tensor([[t < lengths[r] for t in range(longest)] for r in batch])
        made.append((torch.from_numpy(rng.integers(0, options.vocabulary, mask.shape)), mask))
    return made


@torch.inference_mode()
def bare(reader: Reader, ids: torch.Tensor, mask: torch.Tensor) -> None:
    reader.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits  # noqa: B018


@torch.inference_mode()
def ours(reader: Reader, ids: torch.Tensor, mask: torch.Tensor) -> None:
    gold, done = ids.roll(-1, 1)[mask], 0
    for logits in reader.logits(ids, mask.long(), mask, Externalize().chunk_tokens):
        keep(logits, gold[done : done + len(logits)], Externalize())
        done += len(logits)


def peak() -> float:
    """Megabytes resident at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {
        "hidden": 512,
        "layers": 8,
        "vocabulary": 32000,
        "rows": 24,
        "batch_tokens": 4096,
        "rounds": 3,
    }.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--only", choices=("bare", "ours"), help="run one of them and print its peak memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        reader = Reader(LLM(path=folder), "cpu")
    made = work(options)
    if options.only:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
        before = peak()
        for ids, mask in made:
            (bare if options.only == "bare" else ours)(reader, ids, mask)
        print(peak() - before)
        return
    times = {"bare": [], "ours": []}
    for _ in range(options.rounds):
        for name, run in (("bare", bare), ("ours", ours)):
            began = time.process_time()
            for ids, mask in made:
                run(reader, ids, mask)
            times[name].append(time.process_time() - began)
    real, padded = sum(int(m.sum()) for _, m in made), sum(m.numel() for _, m in made)
    ratio = min(times["ours"]) / min(times["bare"])
    print(f"Llama {options.hidden}×{options.layers}, V = {options.vocabulary}, {real:,} tokens", end=", ")
    print(f"padding {1 - real / padded:.1%}")
    print(f"time of ours / bare forward: {ratio:.3f}", flush=True)
    for name in times:
        most = subprocess.run(
            [sys.executable, *sys.argv, "--only", name], capture_output=True, text=True, check=True
        ).stdout
        print(f"{name}: {real / min(times[name]):,.0f} tokens/s, peak {float(most):,.0f} MB above the model")


if __name__ == "__main__":
    main()
