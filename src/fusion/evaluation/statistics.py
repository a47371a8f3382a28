"""What a score is worth: paired bootstrap over examples (Koehn 2004; Efron & Tibshirani 1993).

Every metric here is a function of sums over examples: accuracy of (Σ correct, N), bits per byte of (Σ bits, Σ bytes),
perplexity of (Σ nats, Σ tokens), corpus BLEU of its ten counts. So an example is a short vector, a resample is a
weighting of the examples, and all resamples together are one matrix product. The same weights serve every model:
what the models find equally hard cancels in the difference.

Shapes: N examples · M numbers of an example's vector · R resamples.
"""

import zlib
from collections.abc import Callable

import numpy as np


def ratio(sums: np.ndarray) -> np.ndarray:
    """Σ value / Σ weight, of sums [..., 2]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def percent(sums: np.ndarray) -> np.ndarray:
    return 100 * ratio(sums)


def exponential(sums: np.ndarray) -> np.ndarray:
    """exp(Σ nats / Σ tokens): perplexity."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU of sums [..., 10]: n-gram matches 1–4, n-grams 1–4, lengths of hypothesis and reference."""
    from sacrebleu.metrics import BLEU

    def one(x: np.ndarray) -> float:
        x = [round(v) for v in x]
        return BLEU.compute_bleu(correct=x[:4], total=x[4:8], sys_len=x[8], ref_len=x[9]).score

    return np.apply_along_axis(one, -1, sums)


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ratio": ratio, "percent": percent, "exp": exponential, "bleu": bleu,
}  # fmt: skip


def value(vectors_NM: np.ndarray, formula: str) -> float:
    return float(FORMULAS[formula](vectors_NM.sum(0)))


def draws(vectors_NM: np.ndarray, formula: str, resamples: int, seed: int, task: str) -> np.ndarray:
    """[R] values of the metric over resampled examples; equal (N, seed, task) give equal resamples: they are paired."""
    count = len(vectors_NM)
    random = np.random.default_rng([seed, zlib.crc32(task.encode())])
    sums = np.empty((resamples, vectors_NM.shape[1]))
    for row in range(resamples):
        sums[row] = np.bincount(random.integers(count, size=count), minlength=count) @ vectors_NM
    return FORMULAS[formula](sums)


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.nanquantile(values_R, [0.025, 0.975])
    return float(low), float(high)
