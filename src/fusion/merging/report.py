"""What a merge says about itself: plan, manifest, effective weights as CSV and as a picture, model card."""

import csv
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fusion.artifact import write_atomic
from fusion.merging.job import Job
from fusion.merging.streaming import CHUNK
from fusion.merging.units import layer_of, unit_of

CSV, PICTURE, CARD = "merge_weights.csv", "merge_weights.png", "README.md"


def names(job: Job) -> list[str]:
    """A short name a model: its folder's, made unique."""
    short = [Path(m.name.rstrip("/")).name or m.name for m in job.models]
    return [s if short.count(s) == 1 else f"{s} ({i})" for i, s in enumerate(short)]


def plan(job: Job) -> dict[str, Any]:
    """Bytes read and written, passes, memory, disk, and what keeps tensors from being merged."""
    output = Path(job.config.output).expanduser().absolute()
    there = next(p for p in [output, *output.parents] if p.exists())
    threads = job.config.threads or len(os.sched_getaffinity(0))
    written = sum(p.end - p.begin for p in job.places.values())
    return {
        "method": job.method.__name__,
        "granularity": job.config.granularity,
        "tensors": len(job.places),
        "parameters": sum(e.count for e in job.pivot.entries.values()),
        "input_bytes": sum(m.bytes for m in job.inputs),
        "output_bytes": written,
        "output_files": len(job.headers),
        "disk_free_bytes": shutil.disk_usage(there).free,
        "buffer_bytes": threads * CHUNK * 4 * (4 * len(job.inputs) + 4),
        "kept_from_pivot": job.kept,
        "left_out": job.left_out,
        "output_exists": output.exists() and any(output.iterdir()) if output.is_dir() else output.exists(),
    }


def print_plan(job: Job) -> None:
    facts = plan(job)
    gb = 1e9
    print(f"{facts['method']}, granularity {facts['granularity']}: {facts['parameters']:,} parameters")
    for model in job.inputs:
        print(f"  read   {model.bytes / gb:9.3f} GB  {model.path} ({len(model.maps)} files)")
    print(f"  write  {facts['output_bytes'] / gb:9.3f} GB  {job.config.output} ({facts['output_files']} files)")
    free = facts["disk_free_bytes"]
    print(f"  disk   {free / gb:9.3f} GB  free{'' if free > facts['output_bytes'] else ': NOT ENOUGH'}")
    print(f"  memory {facts['buffer_bytes'] / gb:9.3f} GB  of buffers")
    for name in facts["kept_from_pivot"]:
        print(f"  kept from the pivot: {name}")
    for name in facts["left_out"]:
        print(f"  left out: {name}")
    if facts["output_exists"]:
        print("  the output folder is there already: its own result is kept, anything else needs overwrite=true")


def write_weights(job: Job, folder: Path, table: dict[str, dict[str, Any]]) -> None:
    """The effective weight of every (model, tensor): `merge_weights.csv`, and a picture where tensors differ."""
    rows = [(n, e["weights"]) for n, e in table.items() if e["weights"] is not None]
    with open(folder / CSV, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["tensor", "unit", "scalars", *names(job)])
        for name, weights in rows:
            count = job.pivot.entries[name].count
            out.writerow([name, unit_of(name, job.config.granularity), count, *(f"{w:.9g}" for w in weights)])
    if len({tuple(np.round(w, 9)) for _, w in rows}) > 1:
        draw(folder / PICTURE, [(n, w) for n, w in rows], names(job), job.method.__name__, job.config.granularity)


def draw(path: Path, rows: list[tuple[str, list[float]]], models: list[str], method: str, granularity: str) -> None:
    """Heat map, layer × matrix kind, one panel per model; what is outside the layers in a strip below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inside = [(n, w) for n, w in rows if layer_of(n)]
    outside = [(n, w) for n, w in rows if not layer_of(n)]
    layers = list(dict.fromkeys(layer_of(n) for n, _ in inside)) or [""]
    layers.sort(key=lambda layer: (layer.rpartition(".")[0], int(layer.rpartition(".")[2] or 0)))
    kinds = list(dict.fromkeys(n[len(layer_of(n)) + 1 :] for n, _ in inside)) or [""]
    grid = np.full((len(models), len(layers), len(kinds)), np.nan)
    for name, weights in inside:
        layer = layer_of(name)
        grid[:, layers.index(layer), kinds.index(name[len(layer) + 1 :])] = weights
    strip = np.array([w for _, w in outside]).T.reshape(len(models), 1, -1)
    values = np.concatenate([grid[np.isfinite(grid)], strip.ravel()])
    low, high = min(0.0, values.min()), values.max()
    width = 0.22 * max(len(kinds), strip.shape[2]) + 1.0
    height = min(0.2 * len(layers), 11.0) + 4.4
    figure = Figure(figsize=(width * len(models) + 1.6, height), dpi=100)
    FigureCanvasAgg(figure)
    # inches from the edges: 1.5 for the names under the strip, 1.6 for those under the layers, 0.7 for the titles
    inches = {"left": 0.6, "right": width * len(models) + 0.5}
    edges = {side: value / figure.get_figwidth() for side, value in inches.items()}
    ratios = [height - 4.2, 0.22]
    axes = figure.subplots(2, len(models), squeeze=False, height_ratios=ratios)
    figure.subplots_adjust(
        **edges, top=1 - 0.7 / height, bottom=1.55 / height, hspace=2 * 1.75 / sum(ratios), wspace=0.12
    )
    shown = {"vmin": low, "vmax": high, "cmap": "viridis", "aspect": "auto", "interpolation": "nearest"}
    for j, model in enumerate(models):
        image = axes[0, j].imshow(grid[j], **shown)
        axes[0, j].set_title(model, fontsize=10)
        axes[0, j].set_xticks(range(len(kinds)), [short(k) for k in kinds], rotation=90, fontsize=7)
        step = max(1, len(layers) // 16)
        numbers = [x.rpartition(".")[2] for x in layers[::step]]
        axes[0, j].set_yticks(range(0, len(layers), step), numbers if j == 0 else [], fontsize=7)
        if outside:
            axes[1, j].imshow(strip[j], **shown)
            axes[1, j].set_xticks(range(len(outside)), [short(n) for n, _ in outside], rotation=90, fontsize=7)
            axes[1, j].set_yticks([])
        else:
            axes[1, j].axis("off")
    axes[0, 0].set_ylabel("layer", fontsize=8)
    bar = figure.add_axes((edges["right"] + 0.15 / figure.get_figwidth(), 0.35, 0.14 / figure.get_figwidth(), 0.5))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
    figure.suptitle(f"effective weight: {method}, granularity {granularity}", fontsize=10, y=1 - 0.12 / height)
    figure.savefig(path, metadata={"Software": None})


def short(name: str) -> str:
    """A tensor's name as it fits under an axis."""
    name = name.removesuffix(".weight")
    return name if len(name) <= 24 else f"…{name[-23:]}"


def write_card(job: Job, folder: Path, table: dict[str, dict[str, Any]]) -> None:
    """A model card: parents, method, and the mean weight of every model."""
    rows = [(job.pivot.entries[n].count, e["weights"]) for n, e in table.items() if e["weights"] is not None]
    means = np.average([w for _, w in rows], axis=0, weights=[max(1, c) for c, _ in rows]) if rows else []
    parents = "".join(f"- {name}\n" for name in [job.pivot.name, *(m.name for m in job.models)])
    lines = "".join(f"| {m.name} | {w:.6f} |\n" for m, w in zip(job.models, means, strict=False))
    options = "".join(f", {key.rstrip('_')}={value}" for key, value in job.options.items())
    text = f"""---
library_name: transformers
tags:
- merge
base_model:
{parents}---
# Merged model

`{job.method.__name__}` (granularity {job.config.granularity}{options}) over the pivot `{job.pivot.name}`.

| model | mean effective weight |
|---|---|
{lines}
The weight of every tensor is in `{CSV}`; inputs, checksums and settings are in `merge_manifest.json`.
`python -m fusion.merging verify .` checks the files.
"""
    write_atomic(folder / CARD, text.encode())


def manifest(
    job: Job, table: dict[str, dict[str, Any]], recipe: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, Any]:
    versions = {p: importlib.metadata.version(p) for p in ("fusion", "numpy", "numba", "safetensors")}
    inputs = [
        {"name": m.name, "path": str(m.path.resolve()), "files": {f: m.digest(f) for f in sorted(m.maps)}}
        for m in job.inputs
    ]
    return {
        "kind": "merge",
        "recipe": recipe,
        "seed": job.options.get("seed"),
        "versions": versions,
        "inputs": inputs,
        "outputs": outputs,
        "kept_from_pivot": job.kept,
        "left_out": job.left_out,
        "weights": {"models": names(job), "tensors": {n: e["weights"] for n, e in table.items()}},
        "digests": {n: e["digest"] for n, e in table.items()},
    }
