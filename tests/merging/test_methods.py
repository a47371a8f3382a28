"""Every method against a naive whole-tensor reference, the kernels against numpy and torch, the goldens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from fusion.config import Merge, UserError, options_of
from fusion.merging import kernels, merge, methods, streaming
from fusion.merging.streaming import Tensor, kth
from fusion.merging.units import layer_of, unit_of, unit_statistic, unit_weights

HERE = "fusion.merging.methods."
ALL = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce", "varm"]


def in_memory(rows: np.ndarray, granularity: str = "matrix", name: str = "model.layers.0.x.weight") -> Tensor:
    """A tensor whose rows are at hand; its unit is itself."""

    def unit(statistic: str, layer_statistic: str) -> np.ndarray:
        deltas = rows[1:].astype(np.float64) - rows[0]
        return (deltas**2 if statistic == "square" else abs(deltas)).mean(1)

    return Tensor(
        name,
        rows.shape[1],
        len(rows) - 1,
        lambda start, stop: np.ascontiguousarray(rows[:, start:stop]),
        granularity,
        unit,
    )


def merged(name: str, rows: np.ndarray, granularity: str = "matrix", **options) -> tuple[np.ndarray, list[float]]:
    tensor = in_memory(rows, granularity)
    rule = getattr(methods, name)(tensor, **options)
    parts = tensor.map(rule.apply)
    if rule.weights is not None:
        return np.concatenate(parts), rule.weights
    values, tallies = zip(*parts, strict=True)
    return np.concatenate(values), (np.sum(tallies, axis=0) / rows.shape[1]).tolist()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK", 37)


def models(n: int = 500, count: int = 3, seed: int = 0) -> np.ndarray:
    """Pivot and models: a quarter of the scalars moved in none, many equal movements, some −0."""
    draw = np.random.default_rng(seed)
    base = (draw.integers(-40_000, 40_000, n) * 2.0**-20).astype(np.float32)  # a grid: every sum is exact
    deltas = (draw.integers(-6, 7, (count, n)) * 2.0**-10).astype(np.float32) * draw.choice([1, 0.5], (count, n))
    deltas[:, draw.random(n) < 0.25] = 0
    rows = np.concatenate([base[None], base + deltas]).astype(np.float32)
    rows[:, :5] = -0.0
    return rows


# --- naive references: whole tensors, float64 ------------------------------------------------------------------------


def naive_elect(base, deltas, weights, vote, normalize, scale=1.0):
    weighted = weights[:, None] * deltas
    ballots = {"mass": deltas, "weighted": weighted, "count": np.sign(weighted)}[vote]
    sign = np.where(ballots.sum(0) >= 0, 1, -1)
    agrees = np.sign(weighted) == sign
    moved = (weighted * agrees).sum(0)
    if normalize:
        total = (weights[:, None] * agrees).sum(0)
        moved = np.divide(moved, total, where=total != 0, out=np.zeros_like(moved))
    return base + scale * moved


def naive_top(scores, k):
    mask = np.zeros_like(scores)
    mask[np.argsort(-scores, kind="stable")[:k]] = 1
    return mask


def naive_slerp(a, b, t):
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-8)


def test_linear_slerp_and_task_arithmetic() -> None:
    rows = models()
    wide, w = rows.astype(np.float64), np.array([1.0, 0.6, 0.4])
    close(merged("linear", rows, weights=w.tolist())[0], np.average(wide[1:], axis=0, weights=w))
    close(merged("linear", rows, weights=w.tolist(), normalize=False)[0], w @ wide[1:])
    close(merged("task_arithmetic", rows, weights=w.tolist(), lambda_=0.7)[0], wide[0] + 0.7 * w @ (wide[1:] - wide[0]))
    close(merged("slerp", rows[:3], t=0.3)[0], naive_slerp(wide[1], wide[2], 0.3))
    close(merged("slerp", rows[:2], t=0.3)[0], naive_slerp(wide[0], wide[1], 0.3))
    far = np.random.default_rng(0).normal(0, 0.02, (3, 400)).astype(np.float32)
    close(merged("slerp", far, t=0.3)[0], naive_slerp(*far[1:].astype(np.float64), 0.3))


@pytest.mark.parametrize("vote", ["mass", "weighted", "count"])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.1, [0.5, 0.2, 0.9]])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(vote: str, density: float | list[float], normalize: bool) -> None:
    rows = models()
    wide, w = rows.astype(np.float64), np.array([0.5, 0.25, 0.375])
    deltas = (rows[1:] - rows[0]).astype(np.float64)
    shares = density if isinstance(density, list) else [density] * 3
    kept = np.array([d * naive_top(abs(d), int(share * d.size)) for d, share in zip(deltas, shares, strict=True)])
    found, _ = merged("ties", rows, weights=w.tolist(), density=density, vote=vote, normalize=normalize, lambda_=0.9)
    close(found, naive_elect(wide[0], kept, w, vote, normalize, 0.9))


@pytest.mark.parametrize("rescale", ["inverse_density", "l1", "none"])
def test_dare(rescale: str) -> None:
    rows = models(4000)
    wide, w = rows.astype(np.float64), np.array([0.5, 0.3, 0.2])
    deltas = (rows[1:] - rows[0]).astype(np.float64)
    bare, _ = merged("dare_linear", rows[[0, 2]], weights=[1.0], density=0.3, rescale="none", seed=4)
    moved = deltas[1] != 0
    assert 0.25 < (bare != rows[0])[moved].mean() < 0.35
    tensor = in_memory(rows)
    marks = np.concatenate(tensor.map(methods.drop(tensor, np.full(3, 0.3), "none", 4)), axis=1)
    assert not (marks[0] == marks[1]).all()
    factor = {"inverse_density": 1 / 0.3, "none": 1.0, "l1": None}[rescale]
    if factor is None:
        factor = (abs(deltas).sum(1) / abs(deltas * marks).sum(1))[:, None]
    kept = deltas * marks * factor
    options = {"weights": w.tolist(), "density": 0.3, "rescale": rescale, "seed": 4}
    close(merged("dare_linear", rows, **options)[0], wide[0] + w @ kept)
    close(merged("dare_ties", rows, **options)[0], naive_elect(wide[0], kept, w, "mass", False))


@pytest.mark.parametrize("variant", ["fusechat", "mergekit"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_sce(variant: str, share: float) -> None:
    rows = models()
    rows[1:, :] += np.random.default_rng(1).normal(0, 1e-4, (3, rows.shape[1])).astype(np.float32)  # no equal variances
    deltas = (rows[1:] - rows[0]).astype(np.float64)
    spread = deltas.var(0)
    mask = naive_top(spread, int(share * np.count_nonzero(spread)))
    squares = ((deltas * mask) ** 2).sum(1)
    weights = squares / squares.sum()
    used = deltas * mask if variant == "mergekit" else deltas
    found, effective = merged("sce", rows, select_topk=share, variant=variant)
    close(found, naive_elect(rows[0].astype(np.float64), used, weights, "mass", True))
    np.testing.assert_allclose(effective, weights, rtol=1e-5)


@pytest.mark.parametrize("statistic", ["square", "abs"])
@pytest.mark.parametrize("weighting", ["ratio", "softmax"])
@pytest.mark.parametrize("granularity", ["matrix", "parameter"])
def test_varm(statistic: str, weighting: str, granularity: str) -> None:
    rows = models()
    wide = rows.astype(np.float64)
    values = (wide[1:] - wide[0]) ** 2 if statistic == "square" else abs(wide[1:] - wide[0])
    if granularity == "matrix":
        values = values.mean(1, keepdims=True) * np.ones_like(values)
    if weighting == "softmax":
        weights = np.exp(values) / np.exp(values).sum(0)
    else:
        total = values.sum(0)
        weights = np.where(total > 0, values / np.where(total > 0, total, 1), 1 / 3)
    found, effective = merged("varm", rows, granularity, statistic=statistic, weighting=weighting)
    close(found, (weights * wide[1:]).sum(0))
    np.testing.assert_allclose(effective, weights.mean(1), rtol=1e-5)


def test_varm_keeps_the_pivot_where_nothing_moved_and_survives_tiny_movements() -> None:
    rows = np.tile(np.float32([0.5, 1e-20, -0.0]), (3, 1))
    rows[1, 1], rows[2, 1] = 3e-20, 2e-20  # squares are denormal
    found, _ = merged("varm", rows, "parameter")
    assert found[0] == 0.5
    assert np.signbit(found[2])
    np.testing.assert_allclose(found[1], (4 * 3e-20 + 2e-20) / 5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("granularity", ["matrix", "parameter"])
def test_a_model_merged_with_itself_is_itself_to_the_bit(name: str, granularity: str) -> None:
    base = models()[0]
    count = 2 if name == "slerp" else 3
    found, _ = merged(name, np.tile(base, (1 + count, 1)), granularity)
    assert (found.view(np.int32) == base.view(np.int32)).all()


@pytest.mark.parametrize("name", ALL)
def test_float64_reference_error_stays_at_float32_rounding_on_bfloat16_deltas(name: str) -> None:
    """Deltas are taken in float32, whatever the storage: no 10 % error on small bf16 movements."""
    rows = torch.from_numpy(models(seed=3)).bfloat16().float().numpy()
    found, _ = merged("task_arithmetic", rows, weights=[1.0, 1.0, 1.0])
    close(found, rows[0] + (rows[1:].astype(np.float64) - rows[0]).sum(0))


def test_options_are_checked() -> None:
    rows = models()
    with pytest.raises(UserError, match=r"merge.weights has 2 numbers for 3 models"):
        merged("linear", rows, weights=[1.0, 2.0])
    with pytest.raises(UserError, match=r"merge.density=0.0"):
        merged("ties", rows, density=0.0)
    with pytest.raises(UserError, match="sum to 0"):
        merged("linear", rows, weights=[1.0, -1.0, 0.0])
    with pytest.raises(UserError, match="one or two models"):
        merged("slerp", rows)
    _, options = options_of("merge", {"method": HERE + "ties", "lambda": 0.5, "density": [0.1, 0.2]}, "method")
    assert options == {"lambda_": 0.5, "density": [0.1, 0.2]}
    with pytest.raises(UserError, match=r"merge.lamda is no key of ties \(did you mean 'lambda'\?\)"):
        options_of("merge", {"method": HERE + "ties", "lamda": 0.5}, "method")
    with pytest.raises(UserError, match=r"merge.vote=majority"):
        options_of("merge", {"method": HERE + "ties", "vote": "majority"}, "method")


# --- kernels ---------------------------------------------------------------------------------------------------------

scores = arrays.arrays(np.float32, st.integers(1, 300), elements=st.sampled_from([0.0, 0.25, 1e-3, 1.5e-3, 2.0, 1e-40]))


@settings(max_examples=60, deadline=None)
@given(scores, st.floats(0, 1))
def test_top_is_exact_and_takes_equal_scores_by_position(values: np.ndarray, share: float) -> None:
    k = int(share * values.size)
    tensor = in_memory(np.stack([values * 0, values]))
    marks = tensor.top(lambda rows: [rows[1].copy()], [lambda n, zeros: k])
    found = np.concatenate(tensor.map(marks), axis=1)[0]
    wanted = naive_top(values, k) * (values > 0)  # a zero needs no mark
    assert (found * (values > 0) == wanted).all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 200))
def test_kth(counts: list[int], k: int) -> None:
    ordered = [i for i, c in enumerate(counts) for _ in range(c)][::-1]
    if k <= len(ordered):
        found, rank = kth(np.array(counts), k)
        assert found == ordered[k - 1]
        assert rank == k - ordered.index(found)


def test_bfloat16_as_torch_rounds_it() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    wide = np.empty(65536, np.uint32)
    kernels.widen_bfloat16(bits, wide)
    wanted = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert (wide.view(np.float32)[np.isfinite(wanted)] == wanted[np.isfinite(wanted)]).all()
    values = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = values[np.isfinite(values.view(np.float32))]
    narrow = np.empty(values.size, np.uint16)
    kernels.narrow_bfloat16(values, narrow)
    torch_bits = torch.from_numpy(values.view(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (narrow == torch_bits).all()
    assert kernels.finite(np.float32([1, -3e38, -0.0]).view(np.uint32))
    assert not kernels.finite(np.float32([1, np.nan]).view(np.uint32))
    assert not kernels.finite(np.float32([1, -np.inf]).view(np.uint32))


def test_tensors_give_what_arrays_give() -> None:
    """The form that runs on a GPU, on torch's CPU."""
    rows = models(300)
    there = torch.from_numpy(rows.copy())
    w = np.float32([0.5, 0.3, 0.2])
    back = rows[1:] - rows[0]

    def same(function, *arguments):
        as_tensors = [torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) and a.ndim == 2 else a for a in arguments]
        as_tensors[0] = torch.from_numpy(arguments[0].copy())
        np.testing.assert_allclose(np.asarray(function(*as_tensors)), function(*arguments), rtol=2e-6, atol=1e-9)

    same(kernels.toward, rows, w, 0, np.float32(1))
    same(kernels.thinned, rows, w, np.abs(back))
    same(kernels.deltas, rows, np.abs(back[:1]))
    same(kernels.deltas, rows, None)
    same(kernels.magnitude, rows, 1)
    same(kernels.spread, rows)
    for square in (True, False):
        for softmax in (True, False):
            found, wanted = kernels.by_parameter(there, square, softmax), kernels.by_parameter(rows, square, softmax)
            close(found[0].numpy(), wanted[0])
            np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
    same(kernels.products, rows)
    same(kernels.sums, back, True)
    same(kernels.sums, back, False)
    for ballot in (0, 1, 2):
        elected = kernels.elect(there[0], there[1:] - there[0], w, ballot, True, np.float32(0.7), np.float32(0))
        close(elected.numpy(), kernels.elect(rows[0], back, w, ballot, True, np.float32(0.7), np.float32(0)))
    scores = np.abs(back[0])
    threshold = int(np.sort(scores)[150:151].view(np.int32)[0])
    for upper in (-1, threshold >> 16):
        counts = np.zeros((2, 65536), np.int64)
        kernels.histogram(scores, upper, counts[0])
        kernels.histogram(torch.from_numpy(scores), upper, counts[1])
        assert (counts[0] == counts[1]).all()
    same(kernels.ties, scores, threshold)
    same(kernels.selected, scores, threshold, 3)
    same(kernels.bernoulli, scores, np.uint64(2**63 + 5), 11, 0.4, np.float32(2.5))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("granularity", ["matrix", "parameter"])
def test_methods_run_on_tensors(name: str, granularity: str) -> None:
    rows = models()[: 3 if name == "slerp" else 4]
    on_device = in_memory(rows, granularity)
    on_device.load = lambda start, stop: torch.from_numpy(rows[:, start:stop].copy())
    rule = getattr(methods, name)(on_device)
    parts = [p[0] if isinstance(p, tuple) else p for p in on_device.map(rule.apply)]
    close(torch.cat(parts).numpy(), merged(name, rows, granularity)[0])


def test_random_marks_do_not_depend_on_chunks() -> None:
    one = np.float32(1)
    whole = kernels.bernoulli(np.empty(100_000, np.float32), np.uint64(7), 0, 0.3, one)
    part = kernels.bernoulli(np.empty(1000, np.float32), np.uint64(7), 31_337, 0.3, one)
    assert (whole[31_337:32_337] == part).all()
    assert abs(whole.mean() - 0.3) < 0.005
    lagged = (whole[1:] * whole[:-1]).mean()
    assert abs(lagged - 0.09) < 0.005
    other = kernels.bernoulli(np.empty(100_000, np.float32), np.uint64(8), 0, 0.3, one)
    assert abs((whole * other).mean() - 0.09) < 0.005
    assert kernels.bernoulli(np.empty(1000, np.float32), np.uint64(7), 0, 1.0, one).all()


# --- units -----------------------------------------------------------------------------------------------------------


def test_units_come_from_the_names() -> None:
    assert layer_of("model.layers.12.mlp.experts.3.w1.weight") == "model.layers.12"
    assert layer_of("transformer.h.0.attn.c_attn.bias") == "transformer.h.0"
    assert layer_of("lm_head.weight") == ""
    assert unit_of("lm_head.weight", "layer") == "lm_head.weight"
    assert unit_of("gpt_neox.layers.4.mlp.bias", "layer") == "gpt_neox.layers.4"
    assert unit_of("gpt_neox.layers.4.mlp.bias", "matrix") == "gpt_neox.layers.4.mlp.bias"
    assert unit_of("lm_head.weight", "model") == "model"
    sums = {"a": np.array([1.0, 3.0]), "b": np.array([8.0, 0.0])}
    counts = {"a": 10, "b": 2}
    np.testing.assert_allclose(unit_statistic(sums, counts, "mean"), [9 / 12, 3 / 12])
    np.testing.assert_allclose(unit_statistic(sums, counts, "sum_of_means"), [4.1, 0.3])
    np.testing.assert_allclose(unit_weights(np.array([1e-310, 3e-310]), "ratio"), [0.25, 0.75], rtol=1e-3)
    np.testing.assert_allclose(unit_weights(np.zeros(4), "ratio"), [0.25] * 4)


# --- goldens ---------------------------------------------------------------------------------------------------------

MERGEKIT = {
    "linear": ("linear", {"weights": [1.0, 0.6, 0.4]}),
    "slerp_near": ("slerp", {"t": 0.4}),
    "task_arithmetic": ("task_arithmetic", {"weights": [0.5, 0.3, 0.2]}),
    "ties_d100": ("ties", {"weights": [0.5, 0.3, 0.2], "density": 1.0, "vote": "weighted"}),
    "dare_linear_d100": ("dare_linear", {"weights": [0.5, 0.3, 0.2], "density": 1.0}),
    "sce_k100": ("sce", {"variant": "mergekit"}),
}


def run(output: Path, base: Path, fine_tuned: list[Path], granularity: str = "matrix", **options) -> dict:
    listed = [str(m) for m in fine_tuned]
    merge(Merge(base=str(base), models=listed, output=str(output), merge=options, granularity=granularity))
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("case", MERGEKIT)
def test_goldens_of_mergekit(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    inputs = shared / "golden" / "merge" / "inputs"
    name, options = MERGEKIT[case]
    chosen = [inputs / f"ft{i}" for i in ((1, 2) if name == "slerp" else (1, 2, 3))]
    found = run(tmp_path / "out", inputs / "base", chosen, method=HERE + name, **options)
    wanted = load_file(shared / "golden" / "merge" / "cases" / case / "output.safetensors")
    assert found.keys() == wanted.keys()
    assert max(abs(found[k] - wanted[k]).max() for k in wanted) <= 5e-7


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((Path(__file__).parent / "mergekit_0_1_5.json").read_text())


@pytest.mark.parametrize("vote", ["weighted", "count"])
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_ties_as_mergekit_trims_and_votes(recorded: dict, vote: str, density: float) -> None:
    rows = np.float32(recorded["rows"]) * np.float32(2**-20)
    found, _ = merged("ties", rows, weights=recorded["weights"], density=density, vote=vote)
    close(found, recorded["cases"][f"ties {vote} {density}"])


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_dare_rescaled_as_mergekit_does(recorded: dict, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.float32(recorded["rows"]) * np.float32(2**-20)
    marks = {f"0/{j}/model.layers.0.x.weight".encode(): np.float32(line) for j, line in enumerate(recorded["mask"])}
    keys = {int(methods.xxhash.xxh3_64_intdigest(text)): line for text, line in marks.items()}
    fixed = lambda like, key, start, density, value: keys[int(key)][start : start + like.size] * value  # noqa: E731
    monkeypatch.setattr(methods, "bernoulli", fixed)
    options = {"vote": "weighted"} if name == "dare_ties" else {}
    method = "dare_ties" if name == "dare_ties" else "dare_linear"
    found, _ = merged(method, rows, weights=recorded["weights"], density=0.4, rescale="l1", **options)
    close(found, recorded["cases"][f"{name} l1"])


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_sce_as_mergekit_selects(recorded: dict, share: float) -> None:
    rows = np.float32(recorded["rows"]) * np.float32(2**-20)
    found, _ = merged("sce", rows, select_topk=share, variant="mergekit")
    close(found, recorded["cases"][f"sce {share}"])


VARM = {
    "avg_model_square": ("model", {}),
    "avg_layer_square": ("layer", {"layer_statistic": "sum_of_means"}),
    "avg_param_square": ("matrix", {}),
    "avg_param_abs": ("matrix", {"statistic": "abs"}),
    "avg_param_square_sfmax": ("matrix", {"weighting": "softmax"}),
}


@pytest.mark.parametrize("case", VARM)
def test_goldens_of_varm(shared: Path, tmp_path: Path, case: str) -> None:
    """Weights to 1e-7; tensors to one bf16 ulp once rounded as the reference rounds: every term, then the sum."""
    golden = load_file(shared / "golden" / "varm.safetensors")
    runs = json.loads((shared / "golden" / "varm.json").read_text())["families"][0]["runs"]
    record = next(r for r in runs if r["label"] == f"intended_{case}")
    folders, given = [], {}
    for name in ("base", "target0", "target1"):
        prefix = f"two_targets/{name}/"
        given[name] = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
        (tmp_path / name).mkdir()
        save_file(given[name], tmp_path / name / "model.safetensors")
        folders.append(tmp_path / name)
    granularity, options = VARM[case]
    found = run(tmp_path / "out", folders[0], folders[1:], granularity, method=HERE + "varm", **options)
    weights = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["weights"]["tensors"]
    for name, value in found.items():
        moved = [(given[t][name] != given["base"][name]).any() for t in ("target0", "target1")]
        if all(moved) or granularity != "matrix":  # the reference goes uniform where one target did not move
            wanted = record["per_param_weights"][name] if "per_param_weights" in record else record["weights"]
            np.testing.assert_allclose(weights[name], wanted, atol=1e-7)
        wanted = golden[f"two_targets/intended_{case}/{name}"]
        scale = np.maximum(abs(given["target0"][name]), abs(given["target1"][name]))
        ulp = 2.0 ** (np.floor(np.log2(np.maximum(scale, 1e-30))) - 7)
        assert (abs(value - wanted) <= 2 * ulp).all()
        if granularity != "matrix" or all(moved):
            reference = bf16(
                bf16(weights[name][0] * bf16(given["target0"][name]))
                + bf16(weights[name][1] * bf16(given["target1"][name]))
            )
            assert (abs(reference - wanted) <= ulp).all()


def bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.float32(values)).bfloat16().float().numpy()
