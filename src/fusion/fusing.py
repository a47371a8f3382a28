"""Fusion functions: the distributions of several sources become one (FuseLLM, arXiv 2401.10491, §3.2).

Shape legend in topk.py. Everything stays sparse: nothing here has the size of the vocabulary. Log-probabilities are
taken as they are given, whether they hold the full vocabulary's mass or were renormalised; the papers average
renormalised ones, so pass `TopK.renormalize()` of each source for that. A cross-entropy that is NaN or infinite is no
evidence: its source neither wins nor weighs anything.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusion.topk import TopK

Level = Literal["sequence", "token"]
Weighting = Literal["softmax_reward", "inverse_perplexity"]


def min_ce(distributions: list[TopK], cross_entropies: Tensor, *, level: Level = "sequence") -> TopK:
    """MinCE: the distribution of the source with the smallest cross-entropy; ties go to the first in the list.

    Per sequence, a position where the winner has no distribution gets none: the others know the text less well.
    Per token, the sources that have no distribution at a position do not compete for it.

    Args:
        distributions: one TopK [B, T, K] per source, the target's own first if it takes part. K may differ.
        cross_entropies: of the gold tokens under each source, [S, B] for `sequence`, [S, B, T] for `token`.

    Returns:
        TopK [B, T, largest K].
    """
    winner_BT = winner(_by_position(distributions, cross_entropies, level))
    width = max(d.ids.shape[-1] for d in distributions)
    ids_BTK, logprobs_BTK = _widen(distributions[0], width)
    logprobs_BTK = logprobs_BTK.masked_fill(winner_BT[..., None] != 0, -torch.inf)
    for source, distribution in enumerate(distributions[1:], start=1):
        won = winner_BT[..., None] == source
        other = _widen(distribution, width)
        ids_BTK, logprobs_BTK = torch.where(won, other.ids, ids_BTK), torch.where(won, other.logprobs, logprobs_BTK)
    return TopK(ids_BTK, logprobs_BTK)


def avg_ce(
    distributions: list[TopK],
    cross_entropies: Tensor,
    *,
    level: Level = "sequence",
    weighting: Weighting = "softmax_reward",
) -> TopK:
    """AvgCE: P = Σ_k w_k·P_k with the weights of `weights`, over the union of the sources' entries.

    Sources without a distribution at a position are left out there and the weights of the others add up to 1.

    Args:
        distributions: one TopK [B, T, K] per source; K may differ.
        cross_entropies: as in `min_ce`.
        weighting: as in `weights`.

    Returns:
        TopK [B, T, sum of all K], each id once, ascending; the empty entries last.
    """
    present_SBT = torch.stack([d.present for d in distributions])
    ce_SBT = _by_position(distributions, cross_entropies, level).expand(present_SBT.shape)
    weight_SBT = weights(ce_SBT.masked_fill(~present_SBT, torch.nan), weighting)
    ids = torch.cat([d.ids for d in distributions], -1)
    logprobs = torch.cat([d.logprobs + w[..., None].log() for d, w in zip(distributions, weight_SBT, strict=True)], -1)
    return distinct(TopK(ids, logprobs))


def winner(cross_entropies: Tensor) -> Tensor:
    """[S, ...] → [...] int64: the source with the smallest cross-entropy, the first of equals; −1 if none has one."""
    known = torch.where(cross_entropies < torch.inf, cross_entropies, torch.inf)
    return torch.where(known.amin(0) < torch.inf, known.argmin(0), -1)


def weights(cross_entropies: Tensor, weighting: Weighting = "softmax_reward") -> Tensor:
    """[S, ...] → [S, ...]: the share of each source; the shares add up to 1, or are all 0 if none has evidence.

    `softmax_reward`: softmax_k(exp(−CE_k)), what the authors' code does; rewards lie in (0, 1), so the shares are
    nearly uniform (CE 1.5 against 3.0: 0.543 to 0.457). `inverse_perplexity`: w_k ∝ exp(−CE_k) (0.818 to 0.182).
    """
    known = cross_entropies < torch.inf
    score = -cross_entropies if weighting == "inverse_perplexity" else (-cross_entropies).exp()
    return score.masked_fill(~known, -torch.inf).softmax(0).nan_to_num(nan=0.0)


def _by_position(distributions: list[TopK], cross_entropies: Tensor, level: Level) -> Tensor:
    """[S, B, 1] or [S, B, T] float32 (float64 kept): NaN where a source cannot be chosen."""
    if cross_entropies.dim() != (2 if level == "sequence" else 3) or len(cross_entropies) != len(distributions):
        wanted = "[S, B]" if level == "sequence" else "[S, B, T]"
        raise ValueError(
            f"level={level} of {len(distributions)} sources needs cross-entropies {wanted}, "
            f"not {list(cross_entropies.shape)}"
        )
    ce = cross_entropies if cross_entropies.dtype == torch.float64 else cross_entropies.float()
    if level == "sequence":
        return ce[..., None]
    return ce.masked_fill(~torch.stack([d.present for d in distributions]), torch.nan)


def _widen(distribution: TopK, width: int) -> TopK:
    """The same with `width` entries; logprobs float32 (float64 kept)."""
    extra = width - distribution.ids.shape[-1]
    return TopK(
        pad(distribution.ids.long(), (0, extra)), pad(_float(distribution.logprobs), (0, extra), value=-torch.inf)
    )


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def distinct(distribution: TopK) -> TopK:
    """Entries of equal id become one that holds their probabilities' sum; ids ascend, the empty entries come last.

    Sorting by id makes equals neighbours, so a running count of the distinct ids is the slot each entry adds to.
    Probabilities are relative to the largest of the position, which keeps a position of tiny masses alive.
    """
    logprobs = _float(distribution.logprobs)
    empty = logprobs == -torch.inf
    ids, order = distribution.ids.long().masked_fill(empty, torch.iinfo(torch.int64).max).sort(-1)
    slot = pad((ids[..., 1:] != ids[..., :-1]).cumsum(-1), (1, 0))
    peak = logprobs.amax(-1, keepdim=True).clamp_min(torch.finfo(logprobs.dtype).min)
    mass = (logprobs - peak).exp().gather(-1, order)
    total = torch.zeros_like(mass).scatter_add_(-1, slot, mass)
    ids = torch.zeros_like(ids).scatter_(-1, slot, ids)
    return TopK(ids.masked_fill(total == 0, 0), total.log() + peak)
