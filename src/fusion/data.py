"""From the stores to training batches: any number of sources zipped by block, in an order that survives a kill.

Decisions:
- An item is one optimizer step's share of a rank: a list of micro-batches. The blocks of a step are sorted by length
  before they are dealt to micro-batches and ranks, so padding is small and nothing about the step changes.
- The order is perm(seed, epoch); step s of an epoch takes its s-th `global_batch` blocks. What has to be remembered is
  (seed, epoch, blocks consumed), so ranks, workers and micro-batches may change between a kill and the rerun.
- The last step of an epoch is smaller. Ranks without a block of their own get one that counts nothing (`blocks_B` is
  −1), because every rank must take part in every forward pass.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fusion.config import Run, UserError
from fusion.sources import Precomputed
from fusion.store import Store, dense
from fusion.topk import TopK

IGNORED = -100


class Batch(NamedTuple):
    """A micro-batch, padded to its longest block.

    `ids_BT` int64; `labels_BT` int64, not shifted, −100 where nothing counts; `blocks_B` block numbers;
    `distributions` a TopK [B, T, K] per source, in the order of `FusionData.names`; `ce_SB` each source's mean
    cross-entropy on its own grid, `ce_SBT` the one at every position that it has a distribution for (both NaN where
    unknown); `bytes_B` bytes of the text that counts.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    blocks_B: Tensor
    distributions: list[TopK]
    ce_SB: Tensor
    ce_SBT: Tensor
    bytes_B: Tensor


class Blocks(Dataset):
    """Micro-batches out of the stores: `blocks[[[3, 8], [1, -1]]]` gives two of them."""

    def __init__(self, tokens: Store, part: str, distributions: list[Store]):
        self.tokens, self.distributions = tokens, distributions
        self.shards = tokens.shards(part)
        lengths = [np.diff(tokens.shard(name)["offsets"]).astype(np.int32) for name in self.shards]
        self.first = np.concatenate([[0], np.cumsum([len(n) for n in lengths])]).astype(np.int64)
        self.lengths = np.concatenate([*lengths, np.zeros(0, np.int32)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, micro_batches: list[list[int]]) -> list[Batch]:
        return [self.batch(blocks) for blocks in micro_batches]

    def batch(self, blocks: list[int]) -> Batch:
        lengths = [int(self.lengths[block]) if block >= 0 else 2 for block in blocks]
        b, t = len(blocks), max(lengths)
        ids_BT, labels_BT = np.zeros((b, t), np.int64), np.full((b, t), IGNORED, np.int64)
        sizes_B = np.zeros(b, np.int64)
        ce_SB = np.full((len(self.distributions), b), np.nan, np.float32)
        ce_SBT = np.full((len(self.distributions), b, t), np.nan, np.float16)
        ids_SBTK, logprobs_SBTK = [], []
        for store in self.distributions:
            shape = (b, t, store.manifest["k"])
            ids_SBTK.append(np.zeros(shape, np.int64))
            logprobs_SBTK.append(np.full(shape, -np.inf, np.float16))
        for row, block in enumerate(blocks):
            number = int(np.searchsorted(self.first, max(block, 0), "right")) - 1
            name, local = self.shards[number], max(block, 0) - int(self.first[number])
            shard = self.tokens.shard(name)
            begin, n = int(shard["offsets"][local]), lengths[row]
            ids_BT[row, :n] = shard["ids"][begin : begin + n]
            self.tokens.read(shard["ids"].itemsize * n)
            if block < 0:
                continue
            labels_BT[row, :n] = np.where(shard["counted"][begin : begin + n], ids_BT[row, :n], IGNORED)
            sizes_B[row] = shard["bytes"][local]
            rows = slice(begin - local, begin - local + n - 1)
            for s, store in enumerate(self.distributions):
                columns = store.shard(name.partition("-")[2])
                ids, logprobs = dense(columns, rows.start, rows.stop, local, store.manifest["k"])
                ids_SBTK[s][row, : n - 1], logprobs_SBTK[s][row, : n - 1] = ids, logprobs
                ce_SBT[s, row, : n - 1] = columns["ce"][rows]
                ce_SB[s, row] = columns["block_ce"][local]
                store.read(ids.nbytes + logprobs.nbytes + 2 * n)
        topks = [
            TopK(torch.from_numpy(i), torch.from_numpy(p).float()) for i, p in zip(ids_SBTK, logprobs_SBTK, strict=True)
        ]
        ids, labels, sizes, numbers = (torch.from_numpy(x) for x in (ids_BT, labels_BT, sizes_B, np.array(blocks)))
        return Batch(ids, labels, numbers, topks, torch.from_numpy(ce_SB), torch.from_numpy(ce_SBT).float(), sizes)


class Steps(Sampler):
    """The blocks of every step from where the state says, for one rank; the length is that of a whole epoch."""

    def __init__(self, lengths: np.ndarray, seed: int, global_batch: int, micro_batch: int, rank: int, ranks: int):
        self.lengths, self.seed, self.global_batch, self.micro_batch = lengths, seed, global_batch, micro_batch
        self.rank, self.ranks = rank, ranks
        self.epoch, self.consumed = 0, 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.global_batch)

    def order(self) -> np.ndarray:
        """The permutation of this epoch."""
        return np.random.Generator(np.random.Philox(key=[self.seed, self.epoch])).permutation(len(self.lengths))

    def __iter__(self) -> Iterator[list[list[int]]]:
        order = self.order()
        for begin in range(self.consumed, len(order), self.global_batch):
            yield deal(order[begin : begin + self.global_batch], self.lengths, self.micro_batch, self.rank, self.ranks)


def deal(blocks: np.ndarray, lengths: np.ndarray, micro_batch: int, rank: int, ranks: int) -> list[list[int]]:
    """One rank's micro-batches of a step: blocks by length, equally many micro-batches for every rank."""
    blocks = blocks[np.argsort(lengths[blocks], kind="stable")[::-1]]
    size = min(micro_batch, -(-len(blocks) // ranks))
    groups = [blocks[i : i + size].tolist() for i in range(0, len(blocks), size)]
    mine = groups[rank::ranks]
    if len(mine) < -(-len(groups) // ranks):
        mine.append([-1])
    return mine


class InOrder(Sampler):
    """Every block once, in order: validation."""

    def __init__(self, lengths: np.ndarray, micro_batch: int, rank: int, ranks: int):
        self.arguments = (lengths, micro_batch, rank, ranks)

    def __len__(self) -> int:
        lengths, micro_batch, _, ranks = self.arguments
        return -(-len(lengths) // (micro_batch * ranks))

    def __iter__(self) -> Iterator[list[list[int]]]:
        lengths, micro_batch, rank, ranks = self.arguments
        for begin in range(0, len(lengths), micro_batch * ranks):
            blocks = np.arange(begin, min(begin + micro_batch * ranks, len(lengths)))
            yield deal(blocks, lengths, micro_batch, rank, ranks)


class Loader(DataLoader):
    """A DataLoader that knows how far training has come, whatever its workers have fetched in advance."""

    def __init__(self, blocks: Blocks, steps: Steps, data: "FusionData", workers: int):
        super().__init__(
            blocks,
            batch_size=None,
            sampler=steps,
            collate_fn=_as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.steps, self.data = steps, data

    def __iter__(self) -> Iterator[list[Batch]]:
        self.steps.epoch, self.steps.consumed = self.data.epoch, self.data.consumed
        for step in super().__iter__():
            self.data.consumed += min(self.steps.global_batch, len(self.steps.lengths) - self.data.consumed)
            if self.data.consumed >= len(self.steps.lengths):
                self.data.epoch, self.data.consumed = self.data.epoch + 1, 0
            yield step


def _as_is(batches: list[Batch]) -> list[Batch]:
    return batches


class FusionData(lightning.LightningDataModule):
    """Streams training and validation micro-batches; its state is (seed, epoch, blocks consumed).

    Raises:
        UserError: a store that was made for other tokens; the field that differs is named.
    """

    def __init__(self, config: Run, precomputed: Precomputed):
        super().__init__()
        self.config, self.names = config, list(precomputed.distributions)
        self.tokens = Store(precomputed.tokens)
        self.distributions = [Store(folder) for folder in precomputed.distributions.values()]
        for name, store in zip(self.names, self.distributions, strict=True):
            require_tokens(name, store, self.tokens)
        self.train, self.held_out = (
            Blocks(self.tokens, "train", self.distributions),
            Blocks(self.tokens, "held_out", []),
        )
        self.epoch, self.consumed = 0, 0

    @property
    def blocks(self) -> int:
        """Training blocks of an epoch."""
        return len(self.train)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.blocks // self.config.trainer.global_batch)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> DataLoader:
        options = self.config.trainer
        steps = Steps(self.train.lengths, self.config.seed, options.global_batch, options.micro_batch, *self._place())
        return Loader(self.train, steps, self, options.workers)

    def val_dataloader(self) -> DataLoader:
        order = InOrder(self.held_out.lengths, self.config.trainer.micro_batch, *self._place())
        return DataLoader(self.held_out, batch_size=None, sampler=order, collate_fn=_as_is)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.config.seed:
            raise UserError(f"seed={self.config.seed}: the checkpoint was made with seed={state['seed']}, set that")
        self.epoch, self.consumed = state["epoch"], state["consumed"]


def require_tokens(name: str, store: Store, tokens: Store) -> None:
    recipe = store.manifest["recipe"]
    made, wanted = recipe.get("source", recipe)["tokens"], tokens.manifest["recipe"]
    for field in _differing(made, wanted):
        raise UserError(f"{store.folder}: {name}'s store was made for another {field}: run precompute.py again")


def _differing(made: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """Dotted names of the fields in which two recipes differ."""
    if isinstance(made, dict) and isinstance(wanted, dict):
        for field in sorted({*made, *wanted}):
            yield from _differing(made.get(field), wanted.get(field), f"{path}.{field}" if path else field)
    elif made != wanted:
        yield f"{path} ({made!r}, not {wanted!r})"
