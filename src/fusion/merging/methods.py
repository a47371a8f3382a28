"""Merge methods. Each is one pure function: it may take sums over a streamed tensor, then says what to do per chunk.

A method gets a `Tensor` (streaming.py): its name, its scalars in chunks, reductions over them. It returns a `Rule`:
a function of (rows [1+J, n] float32, start) → [n] float32, where row 0 is the pivot and row 1+j is model j, and the
effective weight of every model. Keyword-only parameters are the config keys (`lambda` in YAML is `lambda_` here).
Every rule *subtracts* what moved from its origin: x − (+0) is x to the bit, also for x = −0.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from fusion.config import UserError
from fusion.merging.kernels import (
    Array,
    bernoulli,
    by_parameter,
    deltas,
    elect,
    magnitude,
    products,
    spread,
    sums,
    thinned,
    toward,
)
from fusion.merging.streaming import Tensor, stack
from fusion.merging.units import layer_of, unit_weights


class Rule(NamedTuple):
    apply: Callable[[Array, int], Any]  # (rows, start) → merged [n], or (merged, Σ of per-scalar weights [J])
    weights: list[float] | None  # effective weight of every model; None: from the sums that `apply` returns


def linear(tensor: Tensor, *, weights: list[float] | None = None, normalize: bool = True) -> Rule:
    """Σ w θ / Σ w (model soups, arXiv 2203.05482); without `normalize` Σ w θ. The pivot has no part in it.

    `weights`: one a model, default 1.
    """
    given = per_model(tensor, "weights", weights, 1.0)
    total = given.sum()
    if normalize and abs(total) < 1e-12:
        raise UserError("merge.weights sum to 0: change them, or set merge.normalize=false")
    effective = given / total if normalize else given
    scale = 1.0 if normalize else total
    return Rule(lambda rows, start: toward(rows, single(effective), 1, np.float32(scale)), effective.tolist())


def slerp(tensor: Tensor, *, t: float = 0.5) -> Rule:
    """Spherical interpolation of two whole tensors: between two models, or the pivot and one model.

    sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b (Shoemake 1985); straight when |cos Ω| > 0.9995 or a norm is 0.
    """
    if tensor.models > 2:
        raise UserError(f"merge=slerp takes one or two models, not {tensor.models}: shorten `models`")
    first = tensor.models - 1  # row of a; b is the next one
    (aa, ab), (_, bb) = tensor.sum(lambda rows, start: products(rows[first : first + 2]))
    cosine = ab / math.sqrt(aa * bb) if aa * bb > 0 else 1.0
    if abs(cosine) > 0.9995:
        ends = (1 - t, t)
        straight = single(np.array([0.0, t][-tensor.models :]))
        return Rule(lambda rows, start: toward(rows, straight, first, np.float32(1)), list(ends[-tensor.models :]))
    angle = math.acos(cosine)
    ends = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    s, e = np.float32(ends[0]), np.float32(ends[1])
    return Rule(lambda rows, start: rows[first] * s + rows[first + 1] * e, list(ends[-tensor.models :]))


def task_arithmetic(tensor: Tensor, *, weights: list[float] | None = None, lambda_: float = 1.0) -> Rule:
    """θ0 + λ Σ w Δ (Ilharco et al., arXiv 2212.04089). `weights`: one a model, default 1/J."""
    effective = lambda_ * per_model(tensor, "weights", weights, 1 / tensor.models)
    return Rule(lambda rows, start: toward(rows, single(effective), 0, np.float32(1)), effective.tolist())


def ties(
    tensor: Tensor,
    *,
    weights: list[float] | None = None,
    density: float | list[float] = 0.2,
    lambda_: float = 1.0,
    normalize: bool = True,
    vote: Literal["mass", "weighted", "count"] = "mass",
) -> Rule:
    """Trim, elect sign, disjoint mean (Yadav et al., arXiv 2306.01708): θ0 + λ Σ w T E / Σ w E.

    T keeps the int(density·n) largest |Δ| of a tensor (exactly: equal ones by position), E marks the scalars whose
    sign won. `vote`: the sign of Σ T (`mass`, the paper), of Σ w T (`weighted`, mergekit), or of Σ sign(w T)
    (`count`). `normalize=false` leaves the sum undivided. `weights`: default 1.
    """
    given = per_model(tensor, "weights", weights, 1.0)
    keep = trim(tensor, per_model(tensor, "density", density, 1.0))
    return elected(given, keep, vote, normalize, lambda_)


def dare_linear(
    tensor: Tensor,
    *,
    weights: list[float] | None = None,
    density: float | list[float] = 0.5,
    lambda_: float = 1.0,
    rescale: Literal["inverse_density", "l1", "none"] = "inverse_density",
    seed: int = 0,
) -> Rule:
    """Drop and rescale (Yu et al., arXiv 2311.03099), then task arithmetic: θ0 + λ Σ w M Δ / density.

    M is 1 with probability `density`, drawn per scalar from (seed, model, tensor, position). `rescale`: by 1/density
    (the paper), to the tensor's own Σ|Δ| (`l1`, mergekit), or not. `weights`: default 1/J.
    """
    effective = lambda_ * per_model(tensor, "weights", weights, 1 / tensor.models)
    keep = drop(tensor, per_model(tensor, "density", density, 1.0), rescale, seed)
    return Rule(lambda rows, start: thinned(rows, single(effective), keep(rows, start)), effective.tolist())


def dare_ties(
    tensor: Tensor,
    *,
    weights: list[float] | None = None,
    density: float | list[float] = 0.5,
    lambda_: float = 1.0,
    normalize: bool = False,
    vote: Literal["mass", "weighted", "count"] = "mass",
    rescale: Literal["inverse_density", "l1", "none"] = "inverse_density",
    seed: int = 0,
) -> Rule:
    """Drop and rescale as in `dare_linear`, then elect signs and sum as in `ties`. `weights`: default 1/J."""
    given = per_model(tensor, "weights", weights, 1 / tensor.models)
    keep = drop(tensor, per_model(tensor, "density", density, 1.0), rescale, seed)
    return elected(given, keep, vote, normalize, lambda_)


def sce(tensor: Tensor, *, select_topk: float = 1.0, variant: Literal["fusechat", "mergekit"] = "fusechat") -> Rule:
    """Select, calculate, erase (FuseChat, arXiv 2408.07990 §3.3): θ0 + Σ w Δ E / Σ w E, w ∝ Σ Δ² per tensor.

    The share `select_topk` of scalars with the largest variance over the models decides the weights (`fusechat`, the
    authors' code), and the others are also dropped from the deltas (`mergekit`). E: sign of Δ = sign of Σ Δ.
    """
    check_share("select_topk", select_topk)
    everything = select_topk >= 1
    size = [lambda n, zeros: int(select_topk * (n - zeros))]
    chosen = None if everything else tensor.top(lambda rows: [spread(rows)], size, zeros=True)

    def squares(rows: Array, start: int) -> np.ndarray:
        return sums(deltas(rows, None if everything else chosen(rows, start)), True)

    weights = unit_weights(tensor.sum(squares), "ratio")
    drops = variant == "mergekit" and not everything
    return elected(weights, chosen if drops else None, "mass", True, 1.0, 1e-6 if variant == "mergekit" else 0.0)


def varm(
    tensor: Tensor,
    *,
    statistic: Literal["square", "abs"] = "square",
    weighting: Literal["ratio", "softmax"] = "ratio",
    layer_statistic: Literal["mean", "sum_of_means"] = "mean",
) -> Rule:
    """Σ_j W_j θ_j, W_j the share of model j in the movement of the unit (FuseChat, arXiv 2402.16107 eq. 4–5).

    `granularity` sets the unit. `layer_statistic=sum_of_means` is the authors' code at layer level: it adds the means
    of a layer's tensors and leaves tensors outside the layers uniform.
    """
    square = statistic == "square"
    if tensor.granularity == "parameter":
        softmax = weighting == "softmax"
        return Rule(lambda rows, start: by_parameter(rows, square, softmax), None)
    authors = layer_statistic == "sum_of_means" and tensor.granularity == "layer"
    if authors and not layer_of(tensor.name):
        weights = np.full(tensor.models, 1 / tensor.models)
    else:
        weights = unit_weights(tensor.unit_statistic(statistic, "sum_of_means" if authors else "mean"), weighting)
    return Rule(lambda rows, start: toward(rows, single(weights), 0, np.float32(1)), weights.tolist())


# --- options ---------------------------------------------------------------------------------------------------------


def per_model(tensor: Tensor, key: str, given: float | list[float] | None, default: float) -> np.ndarray:
    """[J] float64: an option given once, once a model, or not at all."""
    values = [default if given is None else given] * tensor.models if not isinstance(given, list) else given
    if len(values) != tensor.models:
        raise UserError(f"merge.{key} has {len(values)} numbers for {tensor.models} models: give one a model")
    if not all(math.isfinite(v) for v in values):
        raise UserError(f"merge.{key}={values}: every number must be finite")
    if key == "density":
        for value in values:
            check_share(key, value)
    return np.array(values, np.float64)


def check_share(key: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"merge.{key}={value}: must be above 0 and at most 1")


def single(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)


# --- steps that methods share ----------------------------------------------------------------------------------------


def trim(tensor: Tensor, density: np.ndarray) -> Callable[[Array, int], Array] | None:
    """Marks [J, n] of the largest |Δ| of every model; None when nothing is trimmed."""
    if (density >= 1).all():
        return None
    sizes = [lambda n, zeros, d=d: int(d * n) for d in density]
    return tensor.top(lambda rows: [magnitude(rows, j) for j in range(tensor.models)], sizes)


def drop(tensor: Tensor, density: np.ndarray, rescale: str, seed: int) -> Callable[[Array, int], Array] | None:
    """Random marks [J, n] times the factor that makes up for what was dropped."""
    keys = [np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{j}/{tensor.name}".encode())) for j in range(tensor.models)]

    def marks(rows: Array, start: int, values: np.ndarray) -> Array:
        draws = zip(keys, density.tolist(), single(values), strict=True)
        return stack([bernoulli(rows[0], key, start, d, value) for key, d, value in draws])

    factors = np.ones(tensor.models)
    if rescale == "inverse_density":
        factors = 1 / density
    elif rescale == "l1":
        ones = factors.copy()
        before = tensor.sum(lambda rows, start: sums(deltas(rows, None), False))
        after = tensor.sum(lambda rows, start: sums(deltas(rows, marks(rows, start, ones)), False))
        factors = np.divide(before, after, where=after > 0, out=factors)
    return lambda rows, start: marks(rows, start, factors)


def elected(
    weights: np.ndarray,
    keep: Callable[[Array, int], Array] | None,
    vote: str,
    normalize: bool,
    scale: float,
    floor: float = 0.0,
) -> Rule:
    """Sign election and (disjoint) sum of what `keep` leaves of the deltas; `floor` under the divisor."""
    w, ballot = single(weights), ("mass", "weighted", "count").index(vote)

    def apply(rows: Array, start: int) -> Array:
        kept = deltas(rows, None if keep is None else keep(rows, start))
        return elect(rows[0], kept, w, ballot, normalize, np.float32(scale), np.float32(floor))

    return Rule(apply, (scale * weights).tolist())
