"""λ·CLM + (1−λ)·fusion in one chunked pass over the language-model head, gradients in closed form (FuseLLM eq. 5).

Both terms need the same logits and the same logsumexp, and the gradient of both with respect to the logits z is one
scaled softmax row and K + 1 scattered numbers (shape legend in topk.py, C rows of a chunk):

    T = 1:   ∂L/∂z = (a + b·m)·softmax(z) − a·e_y − b·p          a = λ/tokens, b = (1−λ)/fused_tokens, m = Σp
    T ≠ 1:   ∂L/∂z = a·(softmax(z) − e_y) + b·T·(softmax(z/T) − p)
    bucket:  the kept entries as at T = 1; every other token shares the remaining mass t = 1 − m, and its gradient is
             b·s_v·(1 − t/R) with R = Σ_{off support} s_v, summed, since 1 − Σ_{support} s_v cancels

so the gradients of hidden states and head are made in the forward pass, C rows at a time, in one buffer [C, V], at the
6·N·V·D flop of plain cross-entropy; the backward pass only multiplies by the incoming scalar. Nothing of size N × V
exists. Never put this under activation checkpointing: the forward pass would run twice.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from fusion.fusing import distinct
from fusion.topk import TopK

IGNORED = -100
"""The label of a position that does not count."""


class FusionLoss(NamedTuple):
    """`loss` = λ·clm_sum/tokens + (1−λ)·fusion_sum/fused_tokens, in nats, is differentiable; the rest is detached."""

    loss: Tensor
    clm_sum: Tensor
    fusion_sum: Tensor
    tokens: Tensor
    fused_tokens: Tensor


class _Rule(NamedTuple):
    """What the kernel needs to know besides tensors."""

    temperature: float
    softcap: float | None
    chunk: int


class _Teacher(NamedTuple):
    """P of the counted rows: `ids` and `p` [N, K] (p = 0 where empty), `rest` [N] the bucket's mass t or None,
    `entropy` [N] ΣP·log P (0 for `ce`), `present` [N] 1 or 0."""

    ids: Tensor
    p: Tensor
    rest: Tensor | None
    entropy: Tensor
    present: Tensor


def fusion_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    fused: TopK | None,
    lambda_clm: float,
    temperature: float = 1.0,
    divergence: Literal["kl", "ce"] = "kl",
    tail: Literal["renormalize", "bucket"] = "renormalize",
    chunk: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    tokens: Tensor | float | None = None,
    fused_tokens: Tensor | float | None = None,
) -> FusionLoss:
    """The training loss of a plain linear head: logits = softcap·tanh((hidden·weightᵀ + bias)·scale / softcap).

    A position counts if its label is not −100; it has a fusion loss if it also has a distribution. The weight may be
    tied to the embedding. A DTensor weight is gathered and its gradient averaged over the mesh, as FSDP2 and DDP
    average every gradient: give global counts and multiply the loss by the number of ranks.

    Args:
        hidden_ND: the model's last hidden states, any floating dtype; logits and sums are float32 (float64 kept).
        weight_VD: of lm_head; its rows may outnumber the tokenizer (padding counts in the softmax).
        labels_N: the next token of every position (already shifted), −100 where none counts.
        fused: TopK [N, K], or None for plain language modelling.
        lambda_clm: λ.
        temperature: T; P and Q are taken to the power 1/T and the term is multiplied by T² (T = 1 in the papers).
        divergence: KL(P‖Q), or −ΣP·log Q; the gradient is the same.
        tail: `renormalize` scales what top-K kept to mass 1; `bucket` (T = 1 only) compares the mass it left out
            with the student's mass there.
        chunk: rows whose logits exist at one time; 0: 256 on a CPU (cache), 2048 on a GPU (occupancy).
        bias, softcap, scale: of the head, see `head_of`.
        tokens, fused_tokens: global counts to divide by; None: the counts of this call.

    Raises:
        ValueError: bucket at a temperature other than 1.
    """
    if scale is not None:
        hidden_ND, bias = hidden_ND * scale, None if bias is None else bias * scale
    weight_VD, bias = (_gathered(x) for x in (weight_VD, bias))
    options = (lambda_clm, temperature, divergence, tail, tokens, fused_tokens, _exact(weight_VD.dtype))
    *parts, counts = _prepare(labels_N, fused, *options)
    rule = _Rule(temperature, softcap, chunk or (2048 if hidden_ND.is_cuda else 256))
    return FusionLoss(*_Linear.apply(hidden_ND, weight_VD, bias, *parts, rule, torch.is_grad_enabled()), *counts)


def fusion_loss_from_logits(
    logits_NV: Tensor,
    labels_N: Tensor,
    fused: TopK | None,
    lambda_clm: float,
    temperature: float = 1.0,
    divergence: Literal["kl", "ce"] = "kl",
    tail: Literal["renormalize", "bucket"] = "renormalize",
    chunk: int = 0,
    tokens: Tensor | float | None = None,
    fused_tokens: Tensor | float | None = None,
) -> FusionLoss:
    """The same loss for a head that is not a plain linear map: exact, but logits and gradient are [N, V]."""
    options = (lambda_clm, temperature, divergence, tail, tokens, fused_tokens, _exact(logits_NV.dtype))
    *parts, counts = _prepare(labels_N, fused, *options)
    rule = _Rule(temperature, None, chunk or 256)
    return FusionLoss(*_Logits.apply(logits_NV, *parts, rule, torch.is_grad_enabled()), *counts)


def lambda_at(progress: float, lambda_clm: float, schedule: Literal["constant", "decay"]) -> float:
    """λ after the share `progress` of the training steps: as it is, or going linearly to 1."""
    return lambda_clm + (1 - lambda_clm) * progress if schedule == "decay" else lambda_clm


def _gathered(x: Tensor | None) -> Tensor | None:
    """A sharded tensor as a whole one. Each rank's gradient covers its own rows only, so the gradient is Partial:
    `full_tensor()` alone would take it for equal on all ranks and keep a slice of one."""
    if not isinstance(x, DTensor):
        return x
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def _prepare(labels_N, fused, lambda_clm, temperature, divergence, tail, tokens, fused_tokens, dtype):
    """The counted rows and their labels, a and b, the teacher, and the counts that divide the sums."""
    if tail == "bucket" and temperature != 1:
        raise ValueError("tail='bucket' is defined at temperature 1: set temperature=1 or tail='renormalize'")
    rows = (labels_N != IGNORED).nonzero().squeeze(1)
    teacher, found = None, 0
    if fused is not None:
        ids_NK, logp_NK = distinct(TopK(fused.ids[rows], fused.logprobs[rows].to(dtype)))
        present_N = TopK(ids_NK, logp_NK).present
        found = present_N.sum()
        logp_NK = logp_NK / temperature
        total_N = logp_NK.logsumexp(-1).nan_to_num(neginf=0.0)
        rest_N = None
        if tail == "bucket":
            rest_N = -torch.expm1(total_N.clamp_max(0)) * present_N
            total_N = total_N.clamp_min(0)  # rounding can leave a mass above 1; the bucket is empty then
        p_NK = (logp_NK - total_N[:, None]).exp()
        entropy_N = torch.zeros_like(total_N)
        if divergence == "kl":
            entropy_N -= torch.special.entr(p_NK).sum(-1)
            entropy_N -= 0 if rest_N is None else torch.special.entr(rest_N)
        teacher = _Teacher(ids_NK, p_NK, rest_N, entropy_N, present_N.to(dtype))
    tokens = torch.as_tensor(len(rows) if tokens is None else tokens, device=labels_N.device)
    fused_tokens = torch.as_tensor(found if fused_tokens is None else fused_tokens, device=labels_N.device)
    a = lambda_clm / tokens.to(dtype).clamp_min(1)
    b = (1 - lambda_clm) / fused_tokens.to(dtype).clamp_min(1)
    return rows, labels_N[rows], teacher, a, b, (tokens, fused_tokens)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Logits, sums and the head's gradient are float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(z_CV: Tensor, y_C: Tensor, teacher: _Teacher | None, a: Tensor, b: Tensor, rule: _Rule, grad: bool):
    """(clm sum, fusion sum) of a chunk; if `grad`, its logits `z_CV` are overwritten with ∂loss/∂logits.

    The softmax is taken in place; its logsumexp is the row's largest logit less the log of the largest probability.
    """
    if rule.softcap:
        z_CV.div_(rule.softcap).tanh_()
        slope_CV = z_CV.square().neg_().add_(1) if grad else None
        z_CV.mul_(rule.softcap)
    y_C1, heat = y_C[:, None], rule.temperature
    zy_C, top_C = z_CV.gather(1, y_C1)[:, 0], z_CV.amax(1)
    if teacher is not None:
        ids, p = teacher.ids, teacher.p
        m_C, pz_C = p.sum(1), (p * z_CV.gather(1, ids)).sum(1)
        b_C1 = b * teacher.present[:, None]
        warm_CV = z_CV / heat if heat != 1 else None
    s_CV = torch.softmax(z_CV, 1, out=z_CV)
    lse_C = top_C - s_CV.amax(1).log()
    clm, fusion = (lse_C - zy_C).sum(), None
    if teacher is None:
        s_CV.mul_(a)
    elif warm_CV is not None:
        torch.softmax(warm_CV, 1, out=warm_CV)
        lse_C = top_C / heat - warm_CV.amax(1).log()
        fusion = heat**2 * (teacher.entropy + m_C * lse_C - pz_C / heat).sum()
        if grad:
            s_CV.mul_(a).addcmul_(warm_CV, heat * b_C1).scatter_add_(1, ids, -heat * b_C1 * p)
    elif teacher.rest is None:
        fusion = (teacher.entropy + m_C * lse_C - pz_C).sum()
        if grad:
            s_CV.mul_(a + b_C1 * m_C[:, None]).scatter_add_(1, ids, -b_C1 * p)
    else:
        kept_CK = s_CV.gather(1, ids) * (p > 0)
        s_CV.scatter_add_(1, ids, -kept_CK)
        off_C = s_CV.sum(1).clamp_min(torch.finfo(s_CV.dtype).tiny)
        fusion = (teacher.entropy + m_C * lse_C - pz_C - teacher.rest * off_C.log()).sum()
        if grad:
            s_CV.mul_(a + b_C1 * (1 - teacher.rest / off_C)[:, None])
            s_CV.scatter_add_(1, ids, (a + b_C1) * kept_CK - b_C1 * p)
    if grad:
        s_CV.scatter_add_(1, y_C1, -a.expand_as(y_C1))
        if rule.softcap:
            s_CV.mul_(slope_CV)
    return clm, fusion


class _Linear(torch.autograd.Function):
    """The loss over hidden states and head; the gradients are ready when `forward` returns."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, rows, y, teacher, a, b, rule, grad):
        to_hidden, to_weight, to_bias = (grad and needed for needed in ctx.needs_input_grad[:3])
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        if dtype != torch.float64 and (kind == "cpu" or dtype == torch.float16):
            dtype = torch.float32  # a CPU without bf16 units emulates them 5 times slower; float16 gradients underflow
        exact = _exact(dtype)
        head_VD = weight_VD.to(dtype)
        dH = torch.zeros_like(hidden_ND) if to_hidden else None
        dW = torch.zeros(head_VD.shape, dtype=exact, device=head_VD.device) if to_weight else None
        db = torch.zeros(len(head_VD), dtype=exact, device=head_VD.device) if to_bias else None
        z = torch.empty(min(rule.chunk, len(rows)), len(head_VD), dtype=exact, device=head_VD.device)
        clm, fusion = z.new_zeros(()), z.new_zeros(())
        with torch.autocast(kind, enabled=False):
            for at, part, its_teacher in _chunks(rows, teacher, rule.chunk):
                h_CD, z_CV = hidden_ND[part].to(dtype), z[: len(part)]
                _matmul(h_CD, head_VD.t(), z_CV, 0)
                if bias_V is not None:
                    z_CV.add_(bias_V)
                sums = _rows(z_CV, y[at], its_teacher, a, b, rule, any((to_hidden, to_weight, to_bias)))
                clm += sums[0]
                fusion += 0 if sums[1] is None else sums[1]
                if to_bias:
                    db += z_CV.sum(0)
                z_CV = z_CV.to(dtype)
                if to_hidden:
                    dH[part] = (z_CV @ head_VD).to(dH.dtype)
                if to_weight:
                    _matmul(z_CV.t(), h_CD, dW, 1)
        ctx.grads = [dH, dW, db]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        ctx.mark_non_differentiable(clm, fusion)
        return a * clm + b * fusion, clm, fusion

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return *_scaled(ctx, grad_loss), *[None] * 7


class _Logits(torch.autograd.Function):
    """The loss over logits that exist already."""

    @staticmethod
    def forward(ctx, logits_NV, rows, y, teacher, a, b, rule, grad):
        grad = grad and ctx.needs_input_grad[0]
        dL = torch.zeros_like(logits_NV) if grad else None
        clm, fusion = a.new_zeros(()), a.new_zeros(())
        for at, part, its_teacher in _chunks(rows, teacher, rule.chunk):
            z_CV = logits_NV[part].to(_exact(logits_NV.dtype))
            sums = _rows(z_CV, y[at], its_teacher, a, b, rule, grad)
            clm += sums[0]
            fusion += 0 if sums[1] is None else sums[1]
            if grad:
                dL[part] = z_CV.to(dL.dtype)
        ctx.grads, ctx.dtypes = [dL], [logits_NV.dtype]
        ctx.mark_non_differentiable(clm, fusion)
        return a * clm + b * fusion, clm, fusion

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return *_scaled(ctx, grad_loss), *[None] * 7


def _chunks(rows, teacher, size):
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        part = None if teacher is None else _Teacher(*(None if x is None else x[at] for x in teacher))
        yield at, rows[at], part


def _matmul(a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
    """out = beta·out + a @ b, in the precision of `out`, which bf16 units accumulate in anyway."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


def _scaled(ctx, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients times the incoming scalar, in place: they are handed over, not kept for a second backward."""
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        raise RuntimeError("the fusion loss hands its gradients over: a second backward needs a second forward")
    if grad_loss.is_cuda or grad_loss != 1:
        grads = [None if g is None else g.mul_(grad_loss) for g in grads]
    return [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
