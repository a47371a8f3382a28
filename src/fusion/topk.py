"""The noun of the project: a sparse next-token distribution.

Shape legend, used in every tensor name of the package:
B sequences · T positions · N flattened positions · V vocabulary · K entries kept · D hidden width · S sources
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """K entries of a next-token distribution at every position.

    `ids` [..., K] are token ids, `logprobs` [..., K] natural-log probabilities under the full vocabulary.
    An empty entry has log-probability −inf (its id means nothing); a position whose entries are all empty
    has no distribution.
    """

    ids: Tensor
    logprobs: Tensor

    @property
    def present(self) -> Tensor:
        """[...] bool: the positions that have a distribution."""
        return (self.logprobs > -torch.inf).any(-1)

    @property
    def mass(self) -> Tensor:
        """[...] float32: the probability that the kept entries hold together, at most 1 but for rounding."""
        return self.logprobs.float().exp().sum(-1)

    def renormalize(self) -> "TopK":
        """The same entries with mass 1 (the papers' reading of a top-K); an empty position stays empty."""
        total = self.logprobs.float().logsumexp(-1, keepdim=True)
        total = torch.where(total > -torch.inf, total, torch.zeros_like(total))
        return TopK(self.ids, self.logprobs.float() - total)

    def to(self, device: torch.device | str) -> "TopK":
        return TopK(self.ids.to(device), self.logprobs.to(device))
