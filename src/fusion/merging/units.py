"""Parameter units of VaRM: which scalars share one weight, and what that weight is. Pure functions.

FuseChat (arXiv 2402.16107) eq. 4: W_{j,m} = E_m[Δθ²_{j,m}] / Σ_j E_m[Δθ²_{j,m}] for parameter unit m and model j.
"""

from collections.abc import Iterable, Mapping

import numpy as np

GRANULARITIES = ("model", "layer", "matrix", "parameter")


def layer_of(name: str) -> str:
    """The transformer block a tensor belongs to (`model.layers.3`): its name up to the first number; "" for none."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def unit_of(name: str, granularity: str) -> str:
    """The unit of a tensor. A tensor outside the layers (embeddings, final norm, head) is a unit of its own."""
    if granularity == "model":
        return "model"
    return (layer_of(name) or name) if granularity == "layer" else name


def units(names: Iterable[str], granularity: str) -> dict[str, list[str]]:
    """Unit → its tensors, in the order given."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(unit_of(name, granularity), []).append(name)
    return found


def unit_statistic(sums: Mapping[str, np.ndarray], counts: Mapping[str, int], layer_statistic: str) -> np.ndarray:
    """[J] float64: E_m of a unit from the sums [J] and element counts of its tensors.

    `mean` weighs every scalar alike; `sum_of_means` adds the tensors' means, as the authors' code does per layer.
    """
    if layer_statistic == "sum_of_means":
        return np.sum([sums[name] / counts[name] for name in sums], axis=0)
    return np.sum(list(sums.values()), axis=0) / sum(counts[name] for name in sums)


def unit_weights(statistic_J: np.ndarray, weighting: str) -> np.ndarray:
    """[J] float64, of sum 1: the statistic's share of its sum, or its softmax.

    Where no model moved the weights are uniform: over equal values, so the unit keeps the pivot's.
    """
    if weighting == "softmax":
        powers = np.exp(statistic_J - statistic_J.max())
        return powers / powers.sum()
    top = statistic_J.max()
    if top == 0:
        return np.full(len(statistic_J), 1 / len(statistic_J))
    shares = statistic_J / top  # a sum of squares may be denormal
    return shares / shares.sum()
