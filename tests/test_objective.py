"""The chunked loss and its closed-form gradients against a dense float64 reference under autograd."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusion.objective import fusion_loss, fusion_loss_from_logits, lambda_at
from fusion.topk import TopK


def dense(fused: TopK, V: int) -> Tensor:
    """[N, V] probabilities, entries of equal id added."""
    return torch.zeros(*fused.ids.shape[:-1], V, dtype=torch.float64).scatter_add(
        -1, fused.ids, fused.logprobs.double().exp()
    )


def reference(logits, labels, fused, lambda_clm, temperature, divergence, tail, tokens=None, fused_tokens=None):
    """The definition, on full float64 logits."""
    logits = logits.double()
    counted = labels != -100
    clm = F.cross_entropy(logits[counted], labels[counted], reduction="sum")
    tokens = max(counted.sum(), 1) if tokens is None else tokens
    if fused is None:
        return lambda_clm * clm / tokens, clm, logits.new_zeros(())
    p = dense(fused, logits.shape[1])
    counted = counted & (p.sum(1) > 0)
    p, logq = p[counted], (logits[counted] / temperature).log_softmax(1)
    fused_tokens = max(counted.sum(), 1) if fused_tokens is None else fused_tokens
    if tail == "renormalize":
        p = p ** (1 / temperature)
        p = p / p.sum(1, keepdim=True)
    else:
        on = p > 0
        rest = (1 - p.sum(1, keepdim=True)).clamp_min(0)
        p = torch.cat([p / p.sum(1, keepdim=True).clamp_min(1), rest], 1)
        off = logq.masked_fill(on, -torch.inf).logsumexp(1, keepdim=True).clamp_min(-700)
        logq = torch.cat([logq.masked_fill(~on, 0), off], 1)
    fusion = -(p * logq).sum() * temperature**2
    if divergence == "kl":
        fusion = fusion - torch.special.entr(p).sum() * temperature**2
    return lambda_clm * clm / tokens + (1 - lambda_clm) * fusion / fused_tokens, clm, fusion


def problem(seed: int, N=13, V=29, D=7, K=4, peak=2.0, dtype=torch.float64, share=0.8):
    """Hidden states, head, labels (some ignored) and distributions (some empty, some entries empty, ids repeated)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64) * peak
    weight, bias = torch.randn(V, D, generator=g, dtype=torch.float64), torch.randn(V, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < 0.3] = -100
    ids = torch.randint(V, (N, K), generator=g)
    mass = torch.rand(N, 1, generator=g, dtype=torch.float64) ** 0.3
    mass[torch.rand(N, generator=g) < 0.2] = 1
    logprobs = torch.randn(N, K, generator=g, dtype=torch.float64).mul(peak).log_softmax(-1) + mass.log()
    logprobs[torch.rand(N, K, generator=g) > share] = -torch.inf
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, labels, TopK(ids, logprobs.to(dtype))


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


def close(ours, theirs, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol, check_dtype=False)


OPTIONS = {
    "lambda_clm": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    "divergence": st.sampled_from(["kl", "ce"]),
    "kind": st.sampled_from([("renormalize", 1.0), ("renormalize", 2.5), ("renormalize", 0.7), ("bucket", 1.0)]),
    "chunk": st.sampled_from([0, 1, 3, 50]),
    "with_bias": st.booleans(),
    "softcap": st.sampled_from([None, 3.0]),
    "scale": st.sampled_from([None, 0.25]),
    "counts": st.sampled_from([(None, None), (40, 30)]),
    "K": st.sampled_from([1, 4, 29]),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=300, deadline=None)
@given(**OPTIONS)
def test_value_and_gradients_equal_the_dense_reference_for_every_option(
    lambda_clm, divergence, kind, chunk, with_bias, softcap, scale, counts, K, seed
):
    hidden, weight, bias, labels, fused = problem(seed, K=K)
    tail, temperature = kind
    head = {"bias": bias if with_bias else None, "softcap": softcap, "scale": scale}
    options = (lambda_clm, temperature, divergence, tail)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)

    def logits():
        z = F.linear(hidden, weight, head["bias"]) * (scale or 1)
        return softcap * torch.tanh(z / softcap) if softcap else z

    ours = fusion_loss(hidden, weight, labels, fused, *options, chunk, **head, tokens=counts[0], fused_tokens=counts[1])
    whole = fusion_loss_from_logits(logits(), labels, fused, *options, chunk, *counts)
    loss, clm, fusion = reference(logits(), labels, fused, *options, *counts)
    theirs = grads(3 * loss, *leaves)
    for mine in (ours, whole):
        close(mine.loss, loss)
        close(mine.clm_sum, clm)
        close(mine.fusion_sum, fusion)
        for got, wanted in zip(grads(3 * mine.loss, *leaves), theirs, strict=True):
            close(got, wanted)


@settings(max_examples=60, deadline=None)
@given(kind=OPTIONS["kind"], divergence=OPTIONS["divergence"], chunk=OPTIONS["chunk"], seed=OPTIONS["seed"])
def test_float32(kind, divergence, chunk, seed):
    hidden, weight, _, labels, fused = problem(seed, dtype=torch.float32)
    options = (0.6, kind[1], divergence, kind[0])
    ours = fusion_loss(hidden, weight, labels, fused, *options, chunk)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = reference(wide[0] @ wide[1].T, labels, fused, *options)[0]
    close(ours.loss, loss, 1e-4, 1e-5)
    for got, wanted in zip(grads(ours.loss, hidden, weight), grads(loss, *wide), strict=True):
        close(got, wanted, 1e-3, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_accumulates_in_float32(autocast):
    """Inputs are rounded to bf16, nothing after that: logits, sums and the head's gradient over many chunks."""
    hidden, weight, _, labels, fused = problem(0, N=512, V=64, D=16)
    rounded = [x.detach().bfloat16() for x in (hidden, weight)]
    leaves = [x.float().requires_grad_() if autocast else x.clone().requires_grad_() for x in rounded]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = fusion_loss(*leaves, labels, fused, 0.6, chunk=8)
    wide = [x.double().requires_grad_() for x in rounded]
    loss = reference(wide[0] @ wide[1].T, labels, fused, 0.6, 1.0, "kl", "renormalize")[0]
    close(ours.loss, loss, 1e-5)
    for got, wanted in zip(torch.autograd.grad(ours.loss, leaves), grads(loss, *wide), strict=True):
        assert got.dtype == leaves[0].dtype
        assert (got.double() - wanted).norm() < 3e-3 * wanted.norm()


def test_a_bucket_that_is_empty_or_that_the_student_never_fills_stays_finite():
    """Mass exactly 1 (or above by rounding), support = vocabulary, and a student that puts everything on it."""
    V, ids = 5, torch.arange(5).expand(4, 5)
    p = torch.tensor([[1.0, 0, 0, 0, 0], [0.5, 0.5003, 0, 0, 0], [0.2] * 5, [0.9, 0, 0, 0, 0]])
    hidden = (torch.eye(V)[[0, 1, 2, 0]] * torch.tensor([300.0, 1, 1, 300])[:, None]).requires_grad_()
    weight = torch.eye(V, requires_grad=True)
    out = fusion_loss(hidden, weight, torch.tensor([0, 1, 2, 0]), TopK(ids, p.log()), 0.5, tail="bucket")
    out.loss.backward()
    assert all(x.isfinite().all() for x in (out.loss, hidden.grad, weight.grad))


def test_the_bucket_gradient_is_exact_where_one_minus_the_support_would_cancel():
    """A float32 student with 1e−9 off the support."""
    V = 50
    logits = torch.zeros(1, V).index_fill(1, torch.tensor([3]), 25.0)
    fused = TopK(torch.tensor([[3]]), torch.tensor([[0.9]]).log())
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    label = torch.tensor([3])
    ours = fusion_loss_from_logits(leaf, label, fused, 0.0, tail="bucket")
    loss = reference(wide, label, fused, 0.0, 1.0, "kl", "bucket")[0]
    close(ours.loss, loss, 1e-5)
    close(grads(ours.loss, leaf)[0], grads(loss, wide)[0], 1e-4, 0)


def test_bucket_needs_temperature_one():
    hidden, weight, _, labels, fused = problem(0)
    with pytest.raises(ValueError, match="temperature=1"):
        fusion_loss(hidden, weight, labels, fused, 0.5, 2.0, tail="bucket")


def test_nothing_counts_no_distributions_and_plain_language_modelling():
    hidden, weight, _, labels, fused = problem(3)
    nothing = fusion_loss(hidden, weight, torch.full_like(labels, -100), fused, 0.9)
    assert nothing.loss == 0
    assert nothing.tokens == 0
    assert all((g == 0).all() for g in grads(nothing.loss, hidden, weight))
    plain = fusion_loss(hidden, weight, labels, None, 1.0)
    empty = fusion_loss(hidden, weight, labels, TopK(fused.ids, torch.full_like(fused.logprobs, -torch.inf)), 1.0)
    close(plain.loss, F.cross_entropy(hidden @ weight.T, labels))
    close(empty.loss, plain.loss)
    assert empty.fused_tokens == plain.fused_tokens == 0
    assert empty.fusion_sum == 0


def test_counts_are_those_of_the_labels_and_of_the_distributions():
    hidden, weight, _, labels, fused = problem(5)
    out = fusion_loss(hidden, weight, labels, fused, 0.9)
    assert out.tokens == (labels != -100).sum()
    assert out.fused_tokens == ((labels != -100) & fused.present).sum()
    assert not (out.clm_sum.requires_grad)
    assert not (out.fusion_sum.requires_grad)
    close(out.loss, 0.9 * out.clm_sum / out.tokens + 0.1 * out.fusion_sum / out.fused_tokens)


def test_a_frozen_head_or_a_frozen_model_gets_no_gradient():
    hidden, weight, _, labels, fused = problem(5)
    full = grads(fusion_loss(hidden, weight, labels, fused, 0.9).loss, hidden, weight)
    close(grads(fusion_loss(hidden, weight.detach(), labels, fused, 0.9).loss, hidden)[0], full[0])
    close(grads(fusion_loss(hidden.detach(), weight, labels, fused, 0.9).loss, weight)[0], full[1])
    with torch.no_grad():
        assert not fusion_loss(hidden, weight, labels, fused, 0.9).loss.requires_grad


def test_tied_weights_and_accumulation_add_up():
    """The head's gradient meets the embedding's; two halves with global counts are the whole."""
    _, weight, _, labels, fused = problem(7, N=20, D=6)
    tokens = torch.randint(len(weight), (20,))

    def part(at: slice, **counts):
        hidden = F.embedding(tokens[at], weight).tanh()
        return hidden, fusion_loss(hidden, weight, labels[at], TopK(*(x[at] for x in fused)), 0.7, **counts)

    hidden, whole = part(slice(None))
    loss = reference(hidden @ weight.T, labels, fused, 0.7, 1.0, "kl", "renormalize")[0]
    wanted = grads(loss, weight)[0]
    close(grads(part(slice(None))[1].loss, weight)[0], wanted)
    weight.grad = None
    for at in (slice(0, 8), slice(8, 20)):
        part(at, tokens=whole.tokens, fused_tokens=whole.fused_tokens)[1].loss.backward()
    close(weight.grad, wanted)


def test_a_second_backward_is_refused():
    hidden, weight, _, labels, fused = problem(0)
    loss = fusion_loss(hidden, weight, labels, fused, 0.9).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()


def test_lambda_decays_linearly_to_one():
    assert lambda_at(0.0, 0.9, "decay") == 0.9
    assert lambda_at(1.0, 0.9, "decay") == pytest.approx(1)
    assert lambda_at(0.5, 0.8, "decay") == pytest.approx(0.9)
    assert lambda_at(0.5, 0.8, "constant") == 0.8


def test_the_released_code_on_its_own_cases(shared):
    """Value and gradient of the authors' fusion losses. Their fusion mask is the unshifted attention mask."""
    arrays = np.load(shared / "golden/fusion.npz")
    for case in json.loads((shared / "golden/fusion.json").read_text())["cases"]:
        data = {name: torch.tensor(arrays[f"{case['id']}/{name}"]) for name in (
            "logits", "labels", "attention_mask", "fused_target", "grad_logits", "per_token_fusion_loss"
        )}  # fmt: skip
        B, T, V = data["logits"].shape
        logits = data["logits"].reshape(-1, V).requires_grad_()
        p = data["fused_target"].reshape(-1, V)
        fused = TopK(torch.arange(V).expand(B * T, V), p.log())
        shifted = F.pad(data["labels"][:, 1:], (0, 1), value=-100).reshape(-1)
        mask = torch.where(data["attention_mask"].bool(), 0, -100).reshape(-1)
        clm = fusion_loss(logits, torch.eye(V), shifted, None, 1.0)
        fusion = fusion_loss(logits, torch.eye(V), mask, fused, 0.0, divergence=case["id"].rpartition("/")[2])
        assert clm.loss.item() == pytest.approx(case["clm_loss"], abs=2e-3)
        assert fusion.loss.item() == pytest.approx(case["fusion_loss"], abs=1e-2)
        (0.9 * clm.loss + 0.1 * fusion.loss).backward()
        torch.testing.assert_close(logits.grad.reshape(B, T, V), data["grad_logits"], rtol=2e-3, atol=2e-4)
