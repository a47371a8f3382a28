"""How far every tensor of every model moved from the pivot: measured once, kept beside the model, found by content.

`MODEL/.fusion/movements.json` holds Σ Δ² and Σ |Δ| per tensor for every pivot it was compared with, the digest of the
model's files, and their size, times and inode: while these are unchanged the digest is trusted without reading.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fusion.artifact import write_json
from fusion.merging.files import Model
from fusion.merging.units import unit_statistic

FILE = Path(".fusion") / "movements.json"
VERSION = 1


class Movements:
    """Sums of one merge; what is known already comes from the caches, the rest is measured when it is asked for."""

    def __init__(self, pivot: Model, models: list[Model]) -> None:
        self.pivot, self.models = pivot, models
        self.memory = {id(m): recall(m) for m in [pivot, *models]}
        self.sums: dict[tuple[int, str, str], float] = {}  # (model's place, statistic, tensor)
        self.units: dict[tuple[str, str, str], np.ndarray] = {}
        self.locks: dict[tuple[str, str], threading.Lock] = {}
        self.lock = threading.Lock()
        if pivot.digests:
            for j, model in enumerate(models):
                against = self.memory[id(model)]["against"].get(pivot.content, {}) if model.digests else {}
                for statistic, values in against.items():
                    self.sums |= {(j, statistic, name): value for name, value in values.items()}
        self.reused = len(self.sums)

    def unit(
        self,
        statistic: str,
        unit: str,
        counts: dict[str, int],
        layer_statistic: str,
        measure: Callable[[str, list[Model]], np.ndarray],
    ) -> np.ndarray:
        """[J] float64: the mean of the unit whose tensors have these `counts`."""
        key = (statistic, unit, layer_statistic)
        if key not in self.units:
            values = {name: self.tensor(statistic, name, measure) for name in counts}
            self.units[key] = unit_statistic(values, counts, layer_statistic)
        return self.units[key]

    def tensor(self, statistic: str, name: str, measure: Callable[[str, list[Model]], np.ndarray]) -> np.ndarray:
        """[J] float64: the sums of one tensor; only the models that lack theirs are read."""
        with self.lock:
            lock = self.locks.setdefault((statistic, name), threading.Lock())
        with lock:
            keys = [(j, statistic, name) for j in range(len(self.models))]
            if missing := [j for j, key in enumerate(keys) if key not in self.sums]:
                measured = measure(name, [self.models[j] for j in missing])
                self.sums |= {keys[j]: float(value) for j, value in zip(missing, measured, strict=True)}
            return np.array([self.sums[key] for key in keys])

    def save(self) -> None:
        """Write back what was measured. A folder that cannot be written to goes without."""
        remember(self.pivot, self.memory[id(self.pivot)])
        for j, model in enumerate(self.models):
            measured: dict[str, dict[str, float]] = {}
            for (place, statistic, name), value in self.sums.items():
                if place == j:
                    measured.setdefault(statistic, {})[name] = value
            memory = self.memory[id(model)]
            if measured:
                against = memory["against"].setdefault(self.pivot.content, {})
                for statistic, values in measured.items():
                    against.setdefault(statistic, {}).update(values)
            remember(model, memory)


def recall(model: Model) -> dict[str, Any]:
    """What is kept beside a model, as far as it is about the files as they are now."""
    fresh: dict[str, Any] = {"version": VERSION, "files": {}, "against": {}}
    try:
        memory = json.loads((model.path / FILE).read_text())
        files = memory["files"]
        if memory["version"] != VERSION or set(files) != set(model.signature):
            return fresh
        touched = any(files[f]["signature"] != model.signature[f] for f in files)
        if touched and any(model.digest(f) != files[f]["digest"] for f in files):  # the content decides
            return fresh
        model.digests |= {f: files[f]["digest"] for f in files}
        return memory
    except (OSError, ValueError, KeyError, TypeError):
        return fresh


def remember(model: Model, memory: dict[str, Any]) -> None:
    memory["files"] = {f: {"signature": model.signature[f], "digest": model.digest(f)} for f in model.signature}
    try:
        (model.path / FILE).parent.mkdir(exist_ok=True)
        write_json(model.path / FILE, memory)
    except OSError:
        pass  # a read-only folder: nothing is kept, everything still works
