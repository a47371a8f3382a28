"""MinCE and AvgCE against their dense definition, the authors' cases, and the rules for ties, NaN and absence."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion.fusing import avg_ce, distinct, min_ce, weights, winner
from fusion.topk import TopK

V = 11


def dense(distribution: TopK, width: int = V) -> Tensor:
    """[..., V]: entries of equal id added."""
    return torch.zeros(*distribution.ids.shape[:-1], width, dtype=torch.float64).scatter_add(
        -1, distribution.ids.long(), distribution.logprobs.double().exp()
    )


def sources(seed: int, S: int, B: int = 3, T: int = 5) -> tuple[list[TopK], Tensor]:
    """S distributions of different K with holes and repeated ids; CE [S, B, T] with NaN, infinity and ties."""
    g = torch.Generator().manual_seed(seed)
    distributions = []
    for s in range(S):
        K = 2 + s
        logprobs = torch.randn(B, T, K, generator=g).log_softmax(-1) - torch.rand(B, T, 1, generator=g)
        logprobs[torch.rand(B, T, K, generator=g) < 0.2] = -torch.inf
        logprobs[torch.rand(B, T, generator=g) < 0.3] = -torch.inf
        distributions.append(TopK(torch.randint(V, (B, T, K), generator=g), logprobs))
    ce = torch.randint(1, 4, (S, B, T), generator=g).float()
    ce[torch.rand(S, B, T, generator=g) < 0.2] = torch.nan
    ce[torch.rand(S, B, T, generator=g) < 0.1] = torch.inf
    return distributions, ce


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    S=st.integers(1, 4),
    level=st.sampled_from(["sequence", "token"]),
    weighting=st.sampled_from(["softmax_reward", "inverse_perplexity"]),
)
def test_both_equal_the_definition_position_by_position(seed, S, level, weighting):
    distributions, ce_SBT = sources(seed, S)
    ce = ce_SBT if level == "token" else ce_SBT[:, :, 0]
    P = [dense(d) for d in distributions]
    least = dense(min_ce(distributions, ce, level=level))
    mean = dense(avg_ce(distributions, ce, level=level, weighting=weighting))
    for b, t in np.ndindex(3, 5):
        known = [float(ce[s, b, t] if level == "token" else ce[s, b]) for s in range(S)]
        there = [bool(p[b, t].sum() > 0) for p in P]
        able = [s for s in range(S) if known[s] < np.inf and (there[s] or level == "sequence")]
        best = min(able, key=lambda s: known[s], default=None)
        wanted = P[best][b, t] if best is not None else torch.zeros(V)
        torch.testing.assert_close(least[b, t], wanted, rtol=1e-6, atol=1e-9, check_dtype=False)
        able = [s for s in range(S) if known[s] < np.inf and there[s]]
        score = [np.exp(-known[s]) for s in able]
        weight = np.exp(score) if weighting == "softmax_reward" else np.array(score)
        wanted = sum((w * P[s][b, t] for w, s in zip(weight / weight.sum(), able, strict=True)), torch.zeros(V))
        torch.testing.assert_close(mean[b, t], wanted, rtol=1e-5, atol=1e-9, check_dtype=False)


def test_ties_go_to_the_first_and_nan_never_wins():
    nan, inf = torch.nan, torch.inf
    ce = torch.tensor([[1.0, nan, nan, 2.0, inf], [1.0, 3.0, nan, 1.0, nan]])
    assert winner(ce).tolist() == [0, 1, -1, 1, -1]
    share = weights(ce)
    torch.testing.assert_close(share[:, 0], torch.tensor([0.5, 0.5]))
    assert share[:, 1].tolist() == [0, 1]
    assert share[:, 2].tolist() == share[:, 4].tolist() == [0, 0]


def test_the_weights_of_the_papers_example():
    ce = torch.tensor([1.5, 3.0])
    torch.testing.assert_close(weights(ce), torch.tensor([0.543, 0.457]), rtol=0, atol=5e-4)
    torch.testing.assert_close(weights(ce, "inverse_perplexity"), torch.tensor([0.818, 0.182]), rtol=0, atol=5e-4)


def test_distinct_adds_equals_sorts_and_survives_tiny_masses():
    ids = torch.tensor([[5, 2, 5, 7], [1, 1, 1, 1], [3, 3, 0, 0]])
    p = torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    out = distinct(TopK(ids, p.log()))
    assert out.ids.tolist() == [[2, 5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    expected = torch.tensor([[0.2, 0.4, 0, 0], [0.4, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(out.logprobs.exp(), expected)
    tiny = distinct(TopK(torch.tensor([[4, 4]]), torch.tensor([[-200.0, -200.0]])))
    torch.testing.assert_close(tiny.logprobs[0, 0], torch.tensor(-200 + np.log(2), dtype=torch.float32))


def test_unions_outgrow_the_vocabulary_never():
    """The result has the size of the entries, whatever the ids."""
    ids = torch.tensor([[[2**31 - 1, 0]]])
    out = avg_ce([TopK(ids, torch.tensor([[[0.5, 0.5]]]).log())] * 3, torch.ones(3, 1))
    assert out.ids.shape == (1, 1, 6)
    assert out.ids[0, 0, :2].tolist() == [0, 2**31 - 1]
    torch.testing.assert_close(out.logprobs[0, 0].exp(), torch.tensor([0.5, 0.5, 0, 0, 0, 0]))


@pytest.mark.parametrize("function", [min_ce, avg_ce])
def test_cross_entropies_of_the_other_level_are_refused(function):
    distributions, ce = sources(0, 2)
    with pytest.raises(ValueError, match=r"\[S, B\]"):
        function(distributions, ce)
    with pytest.raises(ValueError, match=r"\[S, B, T\]"):
        function(distributions, ce[:, :, 0], level="token")


def test_the_released_code_on_its_own_cases(shared):
    """MinCE to the bit of bf16; AvgCE as far as the reference's bf16 weights allow."""
    arrays = np.load(shared / "golden/fusion.npz")
    for case in json.loads((shared / "golden/fusion.json").read_text())["cases"]:
        names = ["base_target_dist"] * case["use_base"] + [f"aligned_target_dist_{i}" for i in case["use_aligned"]]
        ce = [case["metric_ce_base"]] * case["use_base"] + [case["metric_ce_aligned"][i] for i in case["use_aligned"]]
        P = [torch.tensor(arrays[f"{case['id']}/{name}"]) for name in names]
        ids = torch.arange(P[0].shape[-1]).expand(P[0].shape)
        function = min_ce if "mince" in case["id"] else avg_ce
        fused = function([TopK(ids, p.log()) for p in P], torch.tensor(ce))
        wanted = torch.tensor(arrays[f"{case['id']}/fused_target"])
        tolerance = 1e-6 if function is min_ce else 4e-3
        torch.testing.assert_close(dense(fused, P[0].shape[-1]).float(), wanted, rtol=tolerance, atol=tolerance / 2)
