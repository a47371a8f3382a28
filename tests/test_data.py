"""Batches against the stores they come from, and an order that no kill, worker or rank changes."""

import copy
import os
import socket

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from world import make_world, paths

from fusion.config import UserError
from fusion.data import IGNORED, FusionData, deal
from fusion.sources import precompute
from fusion.store import Store, dense


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), documents=16)


@pytest.fixture(scope="module")
def done(world):
    """The stores; an epoch is six steps, the last of them smaller."""
    done = precompute(world, *paths(world))
    blocks = FusionData(world, done).blocks
    world.trainer.global_batch = next(n for n in range(3, blocks) if -(-blocks // n) == 6 and blocks % n)
    return done


# --- what is in a batch


def test_batches_hold_what_the_stores_hold(world, done):
    data = FusionData(world, done)
    assert data.names == ["target", "neox", "piece"]
    tokens, stores = Store(done.tokens), [Store(folder) for folder in done.distributions.values()]
    seen = []
    for step in data.train_dataloader():
        for batch in step:
            for row, block in enumerate(batch.blocks_B.tolist()):
                seen.append(block)
                shard, local = tokens.shard(f"train-{block // 8:05d}.safetensors"), block % 8
                begin, end = shard["offsets"][local : local + 2]
                n = end - begin
                ids = shard["ids"][begin:end].astype(np.int64)
                np.testing.assert_array_equal(batch.ids_BT[row, :n], ids)
                labels = np.where(shard["counted"][begin:end], ids, IGNORED)
                np.testing.assert_array_equal(batch.labels_BT[row, :n], labels)
                assert (batch.labels_BT[row, n:] == IGNORED).all()
                assert batch.bytes_B[row] == shard["bytes"][local]
                for s, store in enumerate(stores):
                    columns = store.shard(f"{block // 8:05d}.safetensors")
                    a, b = columns["offsets"][local : local + 2]
                    given_ids, logprobs = dense(columns, a, b, local, 6)
                    topk = batch.distributions[s]
                    np.testing.assert_array_equal(topk.ids[row, : n - 1], given_ids)
                    np.testing.assert_array_equal(topk.logprobs[row, : n - 1], logprobs.astype(np.float32))
                    assert not topk.present[row, n - 1 :].any()
                    np.testing.assert_array_equal(batch.ce_SBT[s, row, : n - 1], columns["ce"][a:b])
                    assert batch.ce_SBT[s, row, n - 1 :].isnan().all()
                    assert batch.ce_SB[s, row] == columns["block_ce"][local]
            assert batch.ids_BT.dtype == batch.labels_BT.dtype == batch.distributions[0].ids.dtype == torch.int64
            assert batch.ce_SB.dtype == batch.distributions[0].logprobs.dtype == torch.float32
    assert sorted(seen) == list(range(data.blocks))


def test_validation_sees_every_held_out_block_once(world, done):
    data = FusionData(world, done)
    batches = [batch for step in data.val_dataloader() for batch in step]
    assert sorted(b for batch in batches for b in batch.blocks_B.tolist()) == list(range(len(data.held_out)))
    assert all(batch.distributions == [] and batch.ce_SB.shape[0] == 0 for batch in batches)


def test_without_sources_there_are_only_tokens(world):
    config = copy.deepcopy(world)
    config.fuse_target, config.sources = False, {}
    data = FusionData(config, precompute(config, *paths(config)))
    (batch, *_), *_ = data.train_dataloader()
    assert batch.distributions == []
    assert (batch.labels_BT != IGNORED).any()


# --- who gets what


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 60),
    micro=st.integers(1, 5),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 9),
    total=st.integers(60, 90),
)
def test_ranks_share_a_step_without_overlap_and_in_lockstep(n, micro, ranks, seed, total):
    rng = np.random.default_rng(seed)
    lengths, blocks = rng.integers(2, 500, total), rng.permutation(total)[:n]
    dealt = [deal(blocks, lengths, micro, rank, ranks) for rank in range(ranks)]
    assert len({len(mine) for mine in dealt}) == 1
    everything = [b for mine in dealt for group in mine for b in group]
    assert sorted(b for b in everything if b >= 0) == sorted(blocks)
    assert all(len(group) <= micro for mine in dealt for group in mine)


def test_a_blank_block_counts_nothing(world, done):
    data = FusionData(world, done)
    batch = data.train.batch([-1])
    assert (batch.labels_BT == IGNORED).all()
    assert not any(d.present.any() for d in batch.distributions)
    assert batch.ids_BT.shape == (1, 2)
    assert batch.ce_SB.isnan().all()


def test_every_epoch_and_seed_has_its_own_order(world, done):
    def order(seed, epoch):
        config = copy.deepcopy(world)
        config.seed = seed
        data = FusionData(config, done)
        data.epoch = epoch
        return [b for step in data.train_dataloader() for batch in step for b in batch.blocks_B.tolist()]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert len({tuple(sorted(o)) for o in orders}) == 1
    assert order(0, 1) == orders[1]


# --- a kill in the middle


class Recorder(lightning.LightningModule):
    """Trains nothing; writes down which blocks each step got."""

    def __init__(self, path, stop=None):
        super().__init__()
        self.weight, self.path, self.stop = torch.nn.Parameter(torch.zeros(1)), path, stop
        self.automatic_optimization = False

    def training_step(self, step, index):
        with open(f"{self.path}.{self.global_rank}", "a") as file:
            file.write(" ".join(str(b) for batch in step for b in batch.blocks_B.tolist()) + "\n")
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum() * 0)
        optimizer.step()

    def on_train_batch_end(self, *_):
        if self.stop and self.global_step > self.stop:
            os._exit(9)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(config, done, folder, steps, workers=0, devices=1, stop=None, resume=None):
    """Run a recorder; its lines, one per step, are in `folder`/blocks.RANK."""
    config = copy.deepcopy(config)
    config.trainer.workers = workers
    data = FusionData(config, done)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(Recorder(f"{folder}/blocks", stop), data, ckpt_path=resume, weights_only=True)


def lines(folder, ranks=1):
    """The blocks of every step, over all ranks."""
    rows = [(folder / f"blocks.{rank}").read_text().splitlines() for rank in range(ranks)]
    return [sorted(int(b) for row in step for b in row.split() if int(b) >= 0) for step in zip(*rows, strict=True)]


@pytest.fixture(scope="module")
def uninterrupted(world, done, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(world, done, folder, 13)
    made = lines(folder)
    blocks = FusionData(world, done).blocks
    assert sorted(b for step in made[:6] for b in step) == list(range(blocks))
    return made


@pytest.mark.parametrize(("workers", "cut"), [(0, 3), (2, 3), (0, 6), (2, 7)])
def test_resumed_training_gets_the_batches_that_would_have_come(world, done, uninterrupted, tmp_path, workers, cut):
    """Stopped after `cut` steps (6 is an epoch's last), with workers that had fetched ahead."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fit(world, done, tmp_path / "a", cut, workers)
    assert lines(tmp_path / "a") == uninterrupted[:cut]
    fit(world, done, tmp_path / "b", 13, workers, resume=tmp_path / "a" / f"step={cut}.ckpt")
    assert lines(tmp_path / "b") == uninterrupted[cut:]


def fork_ranks(config, done, folder, ranks, **options):
    """Run `fit` on that many ranks, as torchrun would start them; returns their exit codes."""
    torch.set_num_threads(1)
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                place = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "GROUP_RANK": 0,
                    "WORLD_SIZE": ranks,
                    "LOCAL_WORLD_SIZE": ranks,
                }
                place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
                os.environ.update({k: str(v) for k, v in place.items()})
                fit(config, done, folder, 13, workers=1, devices=ranks, **options)
                code = 0
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_two_ranks_killed_and_resumed_by_one_and_by_two(world, done, uninterrupted, tmp_path):
    """Both ranks die after step 4; what comes next is the same for any number of ranks."""
    assert 0 not in fork_ranks(world, done, tmp_path / "killed", 2, stop=3)
    before = lines(tmp_path / "killed", 2)
    assert before == uninterrupted[: len(before)]
    checkpoint = tmp_path / "killed" / "step=3.ckpt"
    assert fork_ranks(world, done, tmp_path / "again", 2, resume=checkpoint) == [0, 0]
    assert lines(tmp_path / "again", 2) == uninterrupted[3:]
    (tmp_path / "alone").mkdir()
    fit(world, done, tmp_path / "alone", 13, resume=checkpoint)
    assert lines(tmp_path / "alone") == uninterrupted[3:]


def test_another_seed_cannot_resume(world, done):
    data = FusionData(world, done)
    with pytest.raises(UserError, match=r"seed=0: the checkpoint was made with seed=5"):
        data.load_state_dict({"seed": 5, "epoch": 0, "consumed": 8})
