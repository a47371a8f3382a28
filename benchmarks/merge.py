"""Merging against the floor (read every input, write and fsync the output) and against mergekit, process by process.

    python benchmarks/merge.py [--folder DIR] [--mergekit VENV] [--repeat 3] [--device cpu] [--only linear,varm]

Makes a pivot and three models of 535M parameters in bfloat16 (4.3 GB) once, then runs everything interleaved: in each
round the floor, ours, mergekit's. Prints the best wall clock, CPU seconds and peak anonymous memory of the processes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WEIGHTS = [0.5, 0.3, 0.2]
OURS = {
    "linear": ["merge=linear", "merge.weights=[0.5,0.3,0.2]"],
    "slerp": ["merge=slerp", "merge.t=0.4"],
    "task_arithmetic": ["merge=task_arithmetic", "merge.weights=[0.5,0.3,0.2]"],
    "varm model": ["merge=varm", "granularity=model"],
    "varm layer": ["merge=varm", "granularity=layer"],
    "varm matrix": ["merge=varm", "granularity=matrix"],
    "varm parameter": ["merge=varm", "granularity=parameter"],
    "varm all four": ["-m", "merge=varm", "granularity=model,layer,matrix,parameter"],
    "ties": ["merge=ties", "merge.weights=[0.5,0.3,0.2]", "merge.density=0.5", "merge.vote=weighted"],
    "dare_linear": ["merge=dare_linear", "merge.weights=[0.5,0.3,0.2]", "merge.density=0.5"],
    "dare_ties": ["merge=dare_ties", "merge.weights=[0.5,0.3,0.2]", "merge.density=0.5", "merge.vote=weighted"],
    "sce": ["merge=sce", "merge.select_topk=0.5", "merge.variant=mergekit"],
}
FLOOR = """
import os, sys
*inputs, output = sys.argv[1:]
buffer = bytearray(1 << 24)
for path in inputs:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer): pass
with open(output, "wb", buffering=0) as file:
    left = os.path.getsize(inputs[0])
    while left > 0: left -= file.write(memoryview(buffer)[:min(left, len(buffer))])
    os.fsync(file.fileno())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("artifacts/benchmark_merge"))
    parser.add_argument("--mergekit", type=Path, help="virtual environment with mergekit in it")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="names, comma-separated")
    args = parser.parse_args()
    folder = args.folder.absolute()
    base, *models = inputs(folder)
    chosen = [n for n in OURS if not args.only or n in args.only.split(",")]
    runs = {"floor": lambda: floor(folder, [base, *models])}
    for name in chosen:
        runs[name] = lambda name=name: ours(folder, name, base, models, args.device)
        if args.mergekit and (config := mergekit_config(name, base, models)):
            runs[f"mergekit {name}"] = lambda name=name, config=config: mergekit(folder, args.mergekit, name, config)
    for name in chosen:
        ours(folder, name, base, models, args.device)  # compiles the kernels once and warms the page cache
    best: dict[str, tuple[float, float, float]] = {}
    for _ in range(args.repeat):
        for name, action in runs.items():
            found = action()
            best[name] = tuple(map(min, best.get(name, found), found))
            print(
                f"# {name:28} {found[0]:7.2f} s {found[1]:7.2f} s CPU {found[2]:6.0f} MB", file=sys.stderr, flush=True
            )
    wall, cpu, _ = best["floor"]
    print("| what | wall s | × floor | CPU s | anonymous MB | mergekit wall | mergekit CPU |")
    print("|---|---|---|---|---|---|---|")
    print(f"| floor | {wall:.2f} | 1.0 | {cpu:.2f} | | | |")
    for name in chosen:
        w, c, memory = best[name]
        theirs = best.get(f"mergekit {name}")
        other = f"{theirs[0]:.1f} ({theirs[0] / w:.1f}×) | {theirs[1]:.1f} ({theirs[1] / c:.1f}×)" if theirs else " | "
        print(f"| {name} | {w:.2f} | {w / wall:.2f} | {c:.2f} | {memory:.0f} | {other} |")


def inputs(folder: Path) -> list[Path]:
    """base, a, b, c: a Llama's tensors, random, the models 1e-3 away from the base."""
    hidden, inner, vocabulary, layers = 1024, 4096, 64000, 24
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folders = [folder / name for name in ("base", "a", "b", "c")]
    if all((f / "model.safetensors").exists() for f in folders):
        return folders
    import torch
    from safetensors.torch import save_file

    for j, target in enumerate(folders):
        target.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for i, (name, shape) in enumerate(shapes.items()):
            tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.02
            if j:
                moved = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * j + i))
                tensor += moved * 1e-3 * (1 + (i + j) % 3)
            tensors[name] = tensor.bfloat16()
        (target / "config.json").write_text(json.dumps(config))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return folders


def floor(folder: Path, models: list[Path]) -> tuple[float, float, float]:
    output = folder / "floor.bin"
    output.unlink(missing_ok=True)
    return run([sys.executable, "-c", FLOOR, *(str(m / "model.safetensors") for m in models), str(output)])


def ours(folder: Path, name: str, base: Path, models: list[Path], device: str) -> tuple[float, float, float]:
    output = folder / "ours"
    shutil.rmtree(output, ignore_errors=True)
    for model in [base, *models]:
        shutil.rmtree(model / ".fusion", ignore_errors=True)  # every run measures its own statistics
    chosen = models[:2] if name == "slerp" else models
    listed = ",".join(map(str, chosen))
    command = [sys.executable, str(ROOT / "merge.py"), *OURS[name]]
    where = [f"hydra.run.dir={folder}/hydra", f"hydra.sweep.dir={folder}/hydra", f"device={device}"]
    return run([*command, f"base={base}", f"models=[{listed}]", f"output={output}", *where])


def mergekit_config(name: str, base: Path, models: list[Path]) -> dict | None:
    """The same merge in mergekit's terms, where it has it."""
    if name.startswith("varm"):
        return None
    if name == "slerp":
        listed = [{"model": str(m)} for m in models[:2]]
        return {"merge_method": name, "base_model": str(models[0]), "models": listed, "parameters": {"t": 0.4}}
    keys = {"density": 0.5} if name in ("ties", "dare_linear", "dare_ties") else {}
    listed = [{"model": str(m), "parameters": {"weight": w, **keys}} for m, w in zip(models, WEIGHTS, strict=True)]
    if name == "sce":
        listed = [{"model": str(m)} for m in models]
    config = {"merge_method": name, "models": listed, "dtype": "bfloat16"}
    config |= {} if name == "linear" else {"base_model": str(base)}
    return config | ({"parameters": {"select_topk": 0.5}} if name == "sce" else {})


def mergekit(folder: Path, venv: Path, name: str, config: dict) -> tuple[float, float, float]:
    output, recipe = folder / "theirs", folder / f"{name}.yml"
    shutil.rmtree(output, ignore_errors=True)
    recipe.write_text(json.dumps(config))
    return run([str(venv / "bin" / "mergekit-yaml"), str(recipe), str(output), "--no-copy-tokenizer"])


def run(command: list[str]) -> tuple[float, float, float]:
    """Wall-clock seconds, CPU seconds and peak anonymous MB of a process."""
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon"):
                        peak[0] = max(peak[0], int(line.split()[1]) / 1000)
            except OSError:
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    stderr: list[bytes] = []
    reader = threading.Thread(target=lambda: stderr.append(process.stderr.read()))
    watcher.start()
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    done.set()
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{stderr[0].decode()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, peak[0]


if __name__ == "__main__":
    main()
