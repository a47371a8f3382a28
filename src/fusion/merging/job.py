"""A merge before it starts: inputs opened, options checked, every conflict between the models listed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion.config import Merge, UserError, options_of
from fusion.merging.files import STORED, Entry, Model, layout
from fusion.merging.streaming import Tensor


@dataclass
class Job:
    """A merge that has been checked and can start."""

    config: Merge
    method: Callable
    options: dict[str, Any]
    pivot: Model
    models: list[Model]
    kept: list[str]  # tensors taken from the pivot as they are: not floating, or in conflict with conflicts=pivot
    left_out: list[str]  # tensors the pivot does not have, with conflicts=pivot
    headers: dict[str, bytes]
    places: dict[str, Entry]

    @property
    def inputs(self) -> list[Model]:
        return [self.pivot, *self.models]

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "method": f"{self.method.__module__}.{self.method.__qualname__}",
            "options": self.options,
            "granularity": self.config.granularity,
            "dtype": self.config.dtype,
            "conflicts": self.config.conflicts,
            "shard_gb": self.config.shard_gb,
            "inputs": [{"name": m.name, "path": str(m.path), "files": m.signature} for m in self.inputs],
        }


def prepare(config: Merge) -> Job:
    """Open the inputs and check everything that can be checked without reading the weights.

    Raises:
        UserError: listing every conflict between the models, or naming the option that is wrong.
    """
    method, options = options_of("merge", config.merge, "method")
    if not config.models:
        raise UserError("models is empty: set it to the folders or hub names that are merged, e.g. 'models=[A,B]'")
    if not config.output:
        raise UserError("output is empty: set it to the folder of the merged model")
    pivot = Model("base", config.base)
    models = [Model(f"models[{i}]", name) for i, name in enumerate(config.models)]
    output = Path(config.output).expanduser().resolve()
    if any(output == m.path.resolve() for m in [pivot, *models]):
        raise UserError(f"output={config.output} is one of the inputs: choose another folder")
    check_device(config.device)
    trial = Tensor(
        "trial",
        1,
        len(models),
        lambda start, stop: np.zeros((1 + len(models), 1), np.float32),
        config.granularity,
        lambda statistic, layer_statistic: np.zeros(len(models)),
    )
    method(trial, **options)  # an option of the wrong length or range is an error now
    found = conflicts(pivot, models)
    if found and config.conflicts == "error":
        lines = [line for lines in found.values() for line in lines]
        raise UserError(
            f"{len(lines)} conflict{'s' * (len(lines) > 1)} between the models: {'; '.join(lines)}. "
            "Make them agree, or set conflicts=pivot to keep the pivot's tensors"
        )
    left_out = [name for name in found if name not in pivot.entries]
    mixed = {name for name, lines in found.items() if all("stored as" in line for line in lines)}
    kept = [n for n, e in pivot.entries.items() if e.dtype not in STORED or (n in found and n not in mixed)]
    headers, places = layout(pivot.entries.items(), config.dtype, int(config.shard_gb * 1e9))
    return Job(config, method, options, pivot, models, kept, left_out, headers, places)


def check_device(device: str) -> None:
    """`cpu` runs compiled loops, every other device torch (`cpu:0` is torch on the CPU: for comparison)."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={device} cannot be used here ({reason}): set device=cpu") from error


def conflicts(pivot: Model, models: list[Model]) -> dict[str, list[str]]:
    """Tensor → what keeps it from being merged. The union of all names decides; nothing is passed over."""
    found: dict[str, list[str]] = {}
    everyone = [pivot, *models]
    for name in dict.fromkeys(n for m in everyone for n in m.entries):
        if missing := [m.name for m in everyone if name not in m.entries]:
            tied = " (tied to the embeddings there?)" if name.endswith("lm_head.weight") else ""
            found[name] = [f"{name} is missing from {', '.join(missing)}{tied}"]
            continue
        ours = pivot.entries[name]
        for model in models:
            theirs = model.entries[name]
            if theirs.shape != ours.shape:
                hint = " (resized vocabulary?)" if theirs.shape[1:] == ours.shape[1:] and len(ours.shape) == 2 else ""
                text = f"{name} is {list(theirs.shape)} in {model.name}, {list(ours.shape)} in the pivot{hint}"
            elif theirs.dtype != ours.dtype:
                both = "stored as" if {theirs.dtype, ours.dtype} <= set(STORED) else "of type"
                text = f"{name} is {both} {theirs.dtype} in {model.name}, {ours.dtype} in the pivot"
            elif ours.dtype not in STORED and model.raw(name).tobytes() != pivot.raw(name).tobytes():
                text = f"{name} ({ours.dtype}) differs in {model.name} and cannot be averaged"
            else:
                continue
            found.setdefault(name, []).append(text)
    return found
