"""Running the sources: every kept number against the dense logits, and what goes wrong says so."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from world import make_world, paths

from fusion import corpus, sources
from fusion.config import LLM, Externalize, UserError
from fusion.store import Store, dense


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world):
    return sources.precompute(world, *paths(world))


def rows_of(store, tokens, k):
    """(shard columns, local block, slice of rows, tokens shard) of every training block."""
    for name in tokens.shards("train"):
        columns, shard = store.shard(name.partition("-")[2]), tokens.shard(name)
        for b in range(len(shard["flags"])):
            begin, end = columns["offsets"][b : b + 2]
            yield columns, b, slice(begin, end), shard, dense(columns, begin, end, b, k)


# --- what is kept


def naive(logits, gold, k):
    p = torch.log_softmax(logits.double(), -1)
    top = p.topk(k)
    return top.indices, top.values, -p.gather(1, gold[:, None])[:, 0]


@pytest.mark.parametrize("width", [17, 500, 5000])
def test_top_k_agrees_with_dense_logits(width):
    torch.manual_seed(0)
    logits, gold = torch.randn(40, width) * 5, torch.randint(width, (40,))
    ids, logprobs, ce = naive(logits, gold, 10)
    kept = sources.keep(logits.clone(), gold, Externalize())
    np.testing.assert_array_equal(kept.ids, ids)
    np.testing.assert_allclose(kept.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(kept.ce, ce, atol=1e-5)
    np.testing.assert_allclose(kept.mass, logprobs.exp().sum(-1), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), v=st.integers(1, 3000), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_grouped_top_k_is_torch_top_k(n, v, k, seed):
    k = min(k, v)
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(seed))
    values, ids = sources.top_k(logits, k)
    torch.testing.assert_close(values, logits.topk(k).values)
    torch.testing.assert_close(logits.gather(1, ids), values)


def test_top_p_keeps_the_fewest_that_reach_the_mass():
    p = torch.tensor([[0.6, 0.25, 0.1, 0.05], [0.25, 0.25, 0.25, 0.25]])
    kept = sources.keep(p.log(), torch.tensor([0, 0]), Externalize(top_k=4, top_p=0.8))
    assert kept.used.sum(1).tolist() == [2, 4]
    np.testing.assert_allclose(kept.mass, [0.85, 1.0], atol=1e-6)


def test_sampling_is_unbiased_where_top_k_is_not():
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 2
    p = logits.softmax(-1)[0].double().numpy()
    options, estimate = Externalize(keep="sample", top_k=20), np.zeros(50)
    rounds, gold = 4000, torch.zeros(4000, dtype=torch.long)
    uniform = torch.from_numpy(np.random.default_rng(0).random((rounds, 20), np.float32))
    kept = sources.keep(logits.expand(rounds, -1).clone(), gold, options, uniform)
    weights = np.where(kept.used, np.exp(kept.logprobs), 0)
    np.add.at(estimate, kept.ids.ravel(), weights.ravel() / rounds)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert np.abs(estimate - p).max() < 5 * np.sqrt(p.max() / (rounds * 20))
    dense_mass = np.array([p[np.unique(i[u])].sum() for i, u in zip(kept.ids[:50], kept.used[:50], strict=True)])
    np.testing.assert_allclose(kept.mass[:50], dense_mass, atol=1e-5)
    assert (np.diff(np.where(kept.used, kept.logprobs, -99), axis=1) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80), tokens=st.integers(64, 4096))
def test_batches_hold_every_row_once_with_little_padding(lengths, tokens):
    made = sources.batches(lengths, tokens)
    assert sorted(row for batch in made for row in batch) == list(range(len(lengths)))
    for batch in made:
        longest, filled = max(lengths[r] for r in batch), sum(lengths[r] for r in batch)
        assert longest * len(batch) <= max(tokens, longest)
        assert filled > 0.95 * longest * len(batch)


@given(length=st.integers(1, 500), context=st.integers(2, 64))
def test_windows_predict_every_position_once_with_half_a_context(length, context):
    kept = []
    for start, end, first in sources.windows(length, context):
        assert end - start <= context
        assert first == 0 or first - start >= context // 2
        kept += range(max(first, start), end) if start == 0 or end == length else range(first, end)
    assert sorted(set(kept)) == list(range(length))


# --- whole stores


@pytest.mark.parametrize("name", ["target", "neox", "piece"])
def test_stored_distributions_are_those_of_the_model(world, done, name):
    """Every block alone through the model, dense softmax: ids exact, log-probabilities to float16."""
    llm = world.target if name == "target" else world.sources[name]
    model = AutoModelForCausalLM.from_pretrained(llm.path).eval()
    tokenizer = sources.load_tokenizer(llm)
    tokens, store = Store(done.tokens), raw_store(world, done, name)
    sums = np.zeros(2)
    for columns, b, rows, shard, (ids, logprobs) in rows_of(store, tokens, 6):
        block, counted = sources._tokenised(shard, tokenizer)[b]
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(block)[None]).logits[0, :-1]
        expected, values, ce = naive(logits, torch.from_numpy(block[1:]), 6)
        np.testing.assert_allclose(logprobs, values, rtol=2e-3, atol=2e-3)
        assert (ids == expected.numpy()).mean() > 0.97  # near-ties may swap
        np.testing.assert_allclose(columns["ce"][rows], ce, rtol=2e-3)
        np.testing.assert_allclose(columns["block_ce"][b], ce[counted[1:]].mean(), rtol=1e-4)
        sums += float(ce[counted[1:]].sum()), counted[1:].sum()
    assert store.manifest["cross_entropy"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def raw_store(world, done, name):
    if name == "target":
        return Store(done.distributions["target"])
    return Store(sources.externalize(world, name, world.sources[name], done.tokens))


def test_aligned_store_follows_the_aligner(world, done):
    from fusion.alignment import Aligner

    source, target = (sources.load_tokenizer(llm) for llm in (world.sources["piece"], world.target))
    aligner = Aligner(source, target, world.alignment, source_width=600, target_width=500)
    tokens, raw, store = Store(done.tokens), raw_store(world, done, "piece"), Store(done.distributions["piece"])
    kinds = np.zeros(3, int)
    for (columns, b, rows, shard, (ids, logprobs)), (r, _, raw_rows, _, (raw_ids, candidates)) in zip(
        rows_of(store, tokens, 6), rows_of(raw, tokens, 6), strict=True
    ):
        block = sources._tokenised(shard, source)[b][0]
        target_ids = shard["ids"][shard["offsets"][b] : shard["offsets"][b + 1]].astype(np.int64)
        at = aligner.positions(block, target_ids)
        pad = ((0, 1), (0, 0))
        candidates = np.pad(candidates.astype(np.float32), pad, constant_values=-np.inf)
        projection = aligner.project(at, np.pad(raw_ids, pad).astype(np.int64), candidates, target_ids)
        np.testing.assert_array_equal(ids, projection.ids[:-1])
        np.testing.assert_array_equal(logprobs, projection.logprobs[:-1].astype(np.float16))
        ce = columns["ce"][rows]
        usable = projection.kind[:-1] == 1
        np.testing.assert_array_equal(ce[usable], r["ce"][raw_rows][at[:-1][usable]])
        assert np.isnan(ce[~usable]).all()
        kinds += np.bincount(projection.kind[:-1], minlength=3)
    m = store.manifest
    assert [m["none"], m["aligned"], m["one_hot"]] == kinds.tolist()
    assert m["coverage"] == pytest.approx(kinds[1] / kinds.sum())


def test_bytes_per_position_and_reuse(world, done, monkeypatch):
    for folder in done.distributions.values():
        store = Store(folder)
        tokens = Store(done.tokens).manifest["tokens"]
        payload = sum(
            c.nbytes for s in store.shards() for n, c in store.shard(s).items() if n in ("ids", "logprobs", "ce")
        )
        assert payload < tokens * (4 * 6 + 2)
    monkeypatch.setattr(sources, "load_model", lambda llm: pytest.fail("a source ran again"))
    changed = copy.deepcopy(world)
    changed.alignment.criterion = "em"
    changed.objective.lambda_clm = 0.5
    again = sources.precompute(changed, *paths(changed))
    assert again.tokens == done.tokens
    assert again.distributions["target"] == done.distributions["target"]
    assert again.distributions["piece"] != done.distributions["piece"]


def test_mapping_statistics_are_counted_first(world, done):
    changed = copy.deepcopy(world)
    changed.alignment.criterion = "ms"
    again = sources.precompute(changed, *paths(changed))
    assert 0 < Store(again.distributions["neox"]).manifest["coverage"] <= 1


@pytest.mark.parametrize(("options", "least"), [({"top_p": 0.005}, 0.004), ({"keep": "sample", "top_k": 12}, 0.005)])
def test_ragged_stores_read_back(world, done, options, least):
    changed = copy.deepcopy(world)
    changed.externalize = replace(changed.externalize, **options)
    again = sources.precompute(changed, *paths(changed))
    for folder in again.distributions.values():
        store, tokens, k = Store(folder), Store(again.tokens), Store(folder).manifest["k"]
        entries = 0
        for columns, _, rows, _, (ids, logprobs) in rows_of(store, tokens, k):
            used = logprobs > -np.inf
            np.testing.assert_array_equal(used.sum(1), columns["counts"][rows])
            assert ids[used].max(initial=0) < 700
            entries += used.sum()
        assert entries == store.manifest["entries"] < store.manifest["positions"] * k
        assert store.manifest["kept_mass"] > least


def test_a_text_longer_than_the_context_is_read_in_windows(world, done, tmp_path):
    """A source with a context of 64 tokens: every position is predicted, those of the first window exactly."""
    path = tmp_path / "short"
    model = AutoModelForCausalLM.from_pretrained(world.sources["neox"].path)
    model.config.max_position_embeddings = 64
    model.save_pretrained(path)
    sources.load_tokenizer(world.sources["neox"]).save_pretrained(path)
    changed = replace(world, sources={"neox": LLM(path=str(path))}, artifacts=str(tmp_path / "artifacts"))
    store = Store(sources.externalize(changed, "neox", changed.sources["neox"], done.tokens))
    whole = raw_store(world, done, "neox")
    assert store.manifest["windows"] > 0
    for (a, _, rows, *_), (b, *_) in zip(
        rows_of(store, Store(done.tokens), 6), rows_of(whole, Store(done.tokens), 6), strict=True
    ):
        first = slice(rows.start, min(rows.stop, rows.start + 64))
        np.testing.assert_allclose(a["ce"][first], b["ce"][first], atol=1e-2)
        assert np.isfinite(a["ce"][rows]).all()


def test_head_is_the_models_own(tmp_path):
    """Soft-caps and scales on the logits are kept when the head runs alone."""
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 300}
    shape |= {"intermediate_size": 16, "num_key_value_heads": 1}
    for kind, extra in {
        "gemma2": {"final_logit_softcapping": 0.05, "head_dim": 8},
        "granite": {"logits_scaling": 7.0},
        "gpt2": {"n_inner": 16},
    }.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **extra)).eval()
        model.save_pretrained(tmp_path / kind)
        reader = sources.Reader(LLM(path=str(tmp_path / kind)), "cpu")
        assert reader.cut, kind
        ids, mask = torch.randint(300, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        wanted = torch.rand(2, 9) < 0.7
        with torch.inference_mode():
            expected = model(ids, attention_mask=mask).logits[wanted]
            torch.testing.assert_close(torch.cat(list(reader.logits(ids, mask, wanted, 4))), expected)


# --- bad input


def test_a_source_without_a_tokenizer_is_named(world, done, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world.sources["neox"].path)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare.*tokenizer"):
        sources.precompute(world, world.target.path, {"bare": tmp_path / "bare"})


def test_a_tokenizer_larger_than_the_model_is_named(world, done):
    llm = LLM(path=world.target.path, tokenizer=world.sources["neox"].path)
    with pytest.raises(UserError, match=r"sources.odd: its tokenizer gives token \d+, its model has only 500"):
        sources.externalize(world, "odd", llm, done.tokens)


def test_a_model_wider_than_its_tokenizer_is_fine(world, done, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world.sources["neox"].path)
    model.resize_token_embeddings(768)
    model.save_pretrained(tmp_path / "padded")
    sources.load_tokenizer(world.sources["neox"]).save_pretrained(tmp_path / "padded")
    again = sources.precompute(replace(world, fuse_target=False), world.target.path, {"padded": tmp_path / "padded"})
    store = Store(again.distributions["padded"])
    assert max(int(store.shard(n)["ids"].max()) for n in store.shards()) < 500


def test_nan_weights_and_nan_logits_are_named(world, done, tmp_path):
    for name, value in (("nan", torch.nan), ("huge", 1e38)):
        path = tmp_path / name
        AutoModelForCausalLM.from_pretrained(world.sources["neox"].path).save_pretrained(path)
        sources.load_tokenizer(world.sources["neox"]).save_pretrained(path)
        weights = load_file(path / "model.safetensors")
        key = next(k for k in weights if "mlp" in k and k.endswith("weight"))
        weights[key].fill_(value)
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"NaN"):
            sources.precompute(world, world.target.path, {name: path})


def test_names_and_block_sizes_that_cannot_work_are_named(world):
    with pytest.raises(UserError, match=r"sources.target: the name is taken"):
        sources.precompute(world, world.target.path, {"target": world.target.path})
    longer = replace(world, corpus=replace(world.corpus, block_size=4096))
    with pytest.raises(UserError, match=r"corpus.block_size=4096 is longer than the target's context"):
        sources.precompute(longer, *paths(longer))


def test_a_pretrained_model_knows_its_language(shared, tmp_path):
    """stories260K: its stored cross-entropy on a story is far below the uniform one, its top 10 hold most mass."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 3
    (tmp_path / "story.jsonl").write_text(json.dumps({"text": story}) + "\n")
    path = shared / "data" / "models" / "stories260K"
    config = make_world(tmp_path / "world", 1)
    config.corpus = corpus.Corpus(source="jsonl", path=str(tmp_path / "story.jsonl"), block_size=512, held_out=0)
    config.externalize.top_k = 10
    done = sources.precompute(replace(config, target=replace(config.target, path=str(path))), path, {})
    manifest = Store(done.distributions["target"]).manifest
    assert manifest["cross_entropy"] < 2.0
    assert manifest["kept_mass"] > 0.8
