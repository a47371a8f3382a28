"""The fused loss against plain cross-entropy, torch's chunked one, and dense targets: time and peak memory.

    python benchmarks/objective.py [--rounds 5] [--threads 1] [--vocabulary 32000 128000] [--step] [--gpu-only]

N = 2048 positions, D = 512, K = 10 and 64, forward + backward with the head, float32. All rows of a table run
interleaved, round after round in one process; ratios are those of the medians; the CPU ratio is of processor
seconds, which other work on the machine does not stretch. Memory is the peak of the resident set
over what stood before the call (Linux), so it counts outputs and gradients. On a GPU: V = 128,256, D = 4,096,
N = 8,192 in bf16 against the three bare matmuls of the head.
"""

import argparse
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors leave the resident set at once
if __name__ == "__main__" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    os.execv(sys.executable, [sys.executable, *sys.argv])  # malloc reads its settings when a process starts

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from fusion.fusing import min_ce
from fusion.objective import fusion_loss
from fusion.topk import TopK

B, T, D = 4, 512, 512
Contender = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[32000, 128000])
    parser.add_argument("--entries", type=int, nargs="+", default=[10, 64])
    parser.add_argument("--dense", type=int, default=32000, help="largest vocabulary for the dense targets")
    parser.add_argument("--step", action="store_true", help="also whole training steps")
    parser.add_argument("--gpu-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.gpu_only:
        for V in args.vocabulary:
            losses(V, args)
    if args.step:
        steps(args)
    if torch.cuda.is_available():
        gpu(args)


def losses(V: int, args: argparse.Namespace) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B * T, D, generator=g).requires_grad_()
    weight = torch.randn(V, D, generator=g).mul_(0.02).requires_grad_()
    labels = torch.randint(V, (B * T,), generator=g)
    contenders: dict[str, Contender] = {
        "plain CE": lambda: F.cross_entropy(hidden @ weight.T, labels),
        "torch chunked CE (256)": lambda: F.linear_cross_entropy(
            hidden, weight, labels, options=LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
        ),
    }
    for K in args.entries:
        sources, ce = distributions(V, K, g)
        contenders |= {
            f"fusion loss, K={K}": lambda s=sources[0]: ours(hidden, weight, labels, s),
            f"  bucket, K={K}": lambda s=sources[0]: ours(hidden, weight, labels, s, tail="bucket"),
            f"  T=2, K={K}": lambda s=sources[0]: ours(hidden, weight, labels, s, temperature=2.0),
            f"  MinCE of three, K={K}": lambda s=sources, c=ce: ours(hidden, weight, labels, min_ce(s, c)),
        }
        if args.dense >= V and args.entries[0] == K:
            contenders["dense MinCE of three"] = lambda s=sources, c=ce: dense_min_ce(hidden, weight, labels, s, c)
    table(f"V = {V:,}, N = {B * T:,}, D = {D}, {args.threads} thread(s)", contenders, [hidden, weight], args.rounds)


def distributions(V: int, K: int, g: torch.Generator) -> tuple[list[TopK], Tensor]:
    """Three sources [B, T, K] and their cross-entropies [3, B]."""
    sources = [
        TopK(torch.rand(B, T, V, generator=g).topk(K).indices, torch.randn(B, T, K, generator=g).log_softmax(-1))
        for _ in range(3)
    ]
    return sources, torch.rand(3, B, generator=g)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, fused: TopK, **options: float | str) -> Tensor:
    flat = TopK(fused.ids.flatten(0, -2), fused.logprobs.flatten(0, -2))
    return fusion_loss(hidden, weight, labels, flat, 0.9, **options).loss


def dense_min_ce(hidden: Tensor, weight: Tensor, labels: Tensor, sources: list[TopK], ce: Tensor) -> Tensor:
    """As released: a target matrix [B, T, V] of every source, source by source the better one, KL on full logits,
    cross-entropy on a shifted copy of them."""
    V, reward = len(weight), (-ce).exp()
    matrices = [torch.zeros(B, T, V).scatter_(-1, s.ids, s.logprobs.exp()) for s in sources]
    chosen, best = matrices[0], reward[0]
    for matrix, other in zip(matrices[1:], reward[1:], strict=True):
        chosen = torch.where((other > best)[:, None, None], matrix, chosen)
        best = torch.maximum(best, other)
    logits = (hidden @ weight.T).view(B, T, V)
    clm = F.cross_entropy(logits[:, :-1].contiguous().flatten(0, 1), labels.view(B, T)[:, 1:].flatten())
    fusion = F.kl_div(logits.log_softmax(-1), chosen, reduction="none").sum(-1).mean()
    return 0.9 * clm + 0.1 * fusion


def steps(args: argparse.Namespace) -> None:
    """Whole optimizer steps, three fused sources against language modelling alone, for two sizes of target."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fusion.head import FusedLM

    sizes = {
        "tiny target (1M)": {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4},
        "100M target": {"vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12},
    }
    for name, size in sizes.items():
        lm = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=size["hidden_size"] // 64))
        target, g = FusedLM(lm), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(target.parameters(), lr=1e-5)
        ids = torch.randint(size["vocab_size"], (B, T), generator=g)
        sources, ce = distributions(size["vocab_size"], 10, g)

        def step(sources: list[TopK], lambda_clm: float, target=target, optimizer=optimizer, ids=ids, ce=ce) -> Tensor:
            fused = min_ce([s.renormalize() for s in sources], ce) if sources else None
            loss = target(ids, ids, fused, lambda_clm=lambda_clm).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        rows = {"CLM only": lambda s=step: s([], 1.0), "three sources, MinCE": lambda s=step, d=sources: s(d, 0.9)}
        count = sum(p.numel() for p in lm.parameters())
        table(f"training step, {name}: {count / 1e6:.1f}M parameters, {B} × {T} tokens", rows, None, args.rounds)


def table(title: str, contenders: dict[str, Contender], leaves: list[Tensor] | None, rounds: int) -> None:
    """Time and memory of every contender; `leaves` None: the contender runs its own backward pass."""

    def once(contender: Contender) -> None:
        loss = contender()
        if leaves is not None:
            loss.backward()
            for leaf in leaves:
                leaf.grad = None

    memory = {name: peak_over_inputs(lambda c=c: once(c)) for name, c in contenders.items()}  # and warm-up
    times: dict[str, list[float]] = {name: [] for name in contenders}
    busy: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start, cpu = time.perf_counter(), time.process_time()
            once(contender)
            times[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - cpu)
    base = next(iter(contenders))
    base_time = statistics.median(times[base])
    print(f"\n{title}; {rounds} interleaved rounds\n{'':28}{'ms':>9}{'ratio':>8}{'CPU ratio':>11}{'MB':>9}{'ratio':>9}")
    for name in contenders:
        median, share = statistics.median(times[name]), memory[name] / max(memory[base], 1)
        cpu = statistics.median(busy[name]) / statistics.median(busy[base])
        row = f"{median * 1e3:9.0f}{median / base_time:8.2f}{cpu:11.2f}{memory[name] / 1e6:9.0f}"
        print(f"{name:28}{row}{f'1/{1 / share:.1f}' if share < 1 else f'{share:.2f}':>9}", flush=True)


def peak_over_inputs(work: Callable[[], None]) -> int:
    """Bytes by which the resident set rose at most while `work` ran."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def gpu(args: argparse.Namespace) -> None:
    V, width, N, K = 128256, 4096, 8192, 10
    g = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": g}
    hidden = torch.randn(N, width, **options).requires_grad_()
    weight = torch.randn(V, width, **options).mul_(0.02).requires_grad_()
    labels = torch.randint(V, (N,), device="cuda", generator=g)
    fused = TopK(
        torch.randint(V, (N, K), device="cuda", generator=g),
        torch.randn(N, K, device="cuda", generator=g).log_softmax(-1),
    )
    z = torch.empty(2048, V, device="cuda", dtype=torch.bfloat16)

    def matmuls() -> None:
        for part in hidden.detach().split(2048):
            torch.mm(part, weight.detach().T, out=z)
            z @ weight.detach()
            z.T @ part

    def run(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            loss().backward()
            hidden.grad = weight.grad = None

        return work

    rows = {
        "3 bare matmuls": matmuls,
        "plain CE": run(lambda: F.cross_entropy((hidden @ weight.T).float(), labels)),
        "fusion loss": run(lambda: fusion_loss(hidden, weight, labels, fused, 0.9).loss),
        "  bucket": run(lambda: fusion_loss(hidden, weight, labels, fused, 0.9, tail="bucket").loss),
    }
    print(f"\n{torch.cuda.get_device_name()}: V = {V:,}, D = {width:,}, N = {N:,}, K = {K}, bf16")
    first = None
    for name, work in rows.items():
        work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(args.rounds):
            work()
        end.record()
        end.synchronize()
        took = start.elapsed_time(end) / args.rounds
        first = first or took
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        print(f"{name:20}{took:9.1f} ms{took / first:8.2f} × the matmuls{peak:9.2f} GB over the inputs")


if __name__ == "__main__":
    main()
