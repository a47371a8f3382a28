"""Bits per byte against a naive reference, and the stage around it."""

import json
import math

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion.config import Evaluate, Evaluation, UserError
from fusion.evaluation import bits_per_byte as bpb
from fusion.evaluation import evaluate
from fusion.evaluation.statistics import draws, value

TEXTS = ["the cat sat on the mat", "héllo wörld ✓", "x", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3]


@given(length=st.integers(0, 60), window=st.integers(1, 20), stride=st.integers(1, 20))
def test_every_token_is_scored_once_with_enough_context(length, window, stride):
    stride = min(stride, window)
    scored = []
    for w in bpb.windows(0, length, window, stride):
        assert 0 < w.end - w.begin <= window
        for target in range(w.first, w.end + 1):
            scored.append(target)
            assert target - w.begin >= min(target, window - stride + 1)
    assert scored == list(range(1, max(length, 1)))


@pytest.mark.parametrize(("window", "stride", "batch"), [(16, 8, 3), (16, 16, 1), (7, 1, 8), (64, 32, 2)])
def test_against_naive(tiny_models, window, stride, batch):
    model, tokenizer = tiny_models.load("a")
    found = bpb.bits_per_byte(model, tokenizer, TEXTS, window=window, stride=stride, batch_size=batch, progress=False)
    for d, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        costs = [math.log(model.config.vocab_size)]
        done = 1
        while done < len(ids):
            end = min(len(ids) - 1, window if done == 1 else done - 1 + stride)
            begin = max(0, end - window)
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
            costs += [-logits[t - 1 - begin, ids[t]].item() for t in range(done, end + 1)]
            done = end + 1
        assert found.tokens[d] == len(ids) == len(costs)
        assert found.bits[d] == pytest.approx(sum(costs) / math.log(2), rel=1e-5)
        assert found.bytes[d] == len(text.encode())
    assert found.bits_per_byte == pytest.approx(found.bits.sum() / found.bytes.sum())
    assert found.perplexity == pytest.approx(2 ** (found.bits.sum() / found.tokens.sum()))


def test_start_token_of_the_tokenizer_is_used(shared):
    from fusion.evaluation import models

    model, tokenizer = models.load(shared / "data/models/stories260K", dtype="auto", device="cpu")
    text = "Once upon a time, there was a little girl named Lily."
    found = bpb.bits_per_byte(model, tokenizer, [text], progress=False)
    ids = tokenizer(text)["input_ids"]
    if ids[0] != tokenizer.bos_token_id:
        pytest.skip("this tokenizer adds no start token")
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    naive = -sum(logprobs[t - 1, ids[t]].item() for t in range(1, len(ids))) / math.log(2)
    assert found.bits[0] == pytest.approx(naive, rel=1e-5)
    assert found.bits_per_byte < 1.0  # its own kind of text


def test_real_text_under_the_real_model(shared):
    from fusion.evaluation import models

    model, tokenizer = models.load(shared / "data/models/stories260K", dtype="auto", device="cpu")
    texts = bpb.read_texts(shared / "data/corpora/law_en.jsonl", "text", limit=3)
    found = bpb.bits_per_byte(model, tokenizer, texts, progress=False)
    assert 3 < found.bits_per_byte < 6
    finer = bpb.bits_per_byte(model, tokenizer, texts, stride=128, progress=False)
    assert finer.bits_per_byte <= found.bits_per_byte + 0.01  # more context does not hurt


def test_ensemble_is_the_probability_average(tiny_models):
    (first, tokenizer), (second, _) = tiny_models.load("a"), tiny_models.load("b")
    scores = [bpb.bits_per_byte(m, tokenizer, TEXTS[:2], progress=False) for m in (first, second)]
    found = bpb.ensemble([s.logprobs for s in scores])
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        mean = (first(ids).logits.softmax(-1) + second(ids).logits.softmax(-1))[0] / 2
    naive = mean[:-1].gather(-1, ids[0, 1:, None])[:, 0].log()
    np.testing.assert_allclose(found[0][1:], naive, rtol=1e-4)


def test_ensemble_of_different_tokenizers_is_refused():
    with pytest.raises(UserError, match=r"evaluation\.ensemble"):
        bpb.ensemble([[np.zeros(3, np.float32)], [np.zeros(4, np.float32)]])


def test_bootstrap_is_paired_and_reproducible():
    vectors = np.stack([np.random.default_rng(0).random(200), np.ones(200)], 1)
    better = vectors + np.array([0.01, 0])
    one, two = (draws(v, "ratio", 200, 7, "task") for v in (vectors, better))
    np.testing.assert_allclose(two - one, 0.01)  # the same resamples: the difference has no noise
    assert np.array_equal(one, draws(vectors, "ratio", 200, 7, "task"))
    assert one.std() == pytest.approx(vectors[:, 0].std() / math.sqrt(200), rel=0.3)
    assert value(vectors, "ratio") == pytest.approx(one.mean(), abs=0.01)


def run(tmp_path, models, **options):
    texts = []
    for name, rows in {"prose": TEXTS, "letters": ["abc def " * 9, "xyz"]}.items():
        texts.append(tmp_path / f"{name}.jsonl")
        texts[-1].write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    evaluation = Evaluation(texts=[str(t) for t in texts], bootstrap=100, device="cpu", **options)
    return Evaluate(
        models=models, evaluation=evaluation, output=str(tmp_path / "out"), artifacts=str(tmp_path / "artifacts")
    )


def test_stage_table(tiny_models, tmp_path, capsys):
    a, b = str(tiny_models.path("a")), str(tiny_models.path("b"))
    config = run(tmp_path, [a, b], ensemble=[a, b])
    figures = evaluate(config)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["columns"]) == ["prose", "letters", "mean", "weighted"]
    assert list(results["rows"]) == ["a", "b", "ensemble of a + b"]
    row = results["rows"]["b"]
    assert row["mean"]["value"] == pytest.approx((row["prose"]["value"] + row["letters"]["value"]) / 2)
    assert figures["score"] == pytest.approx(row["mean"]["value"])
    low, high = row["prose"]["interval"]
    assert low <= row["prose"]["value"] <= high
    base = results["rows"]["a"]["prose"]["value"]
    assert row["prose"]["change"] == pytest.approx(100 * (row["prose"]["value"] / base - 1))
    assert not results["rows"]["a"]["prose"]["significant"]
    records = parquet.read_table(tmp_path / "out/examples.parquet").to_pylist()
    assert len(records) == 3 * (len(TEXTS) + 2)
    sums = np.sum(
        [dict(r["metrics"])["bits_per_byte"] for r in records if (r["model"], r["task"]) == ("b", "prose")], 0
    )
    assert sums[0] / sums[1] == pytest.approx(row["prose"]["value"])
    assert "| b |" in (tmp_path / "out/results.md").read_text()
    assert (tmp_path / "out/results.png").stat().st_size > 5000
    assert "bits_per_byte" in capsys.readouterr().out


def test_finished_cells_are_reused(tiny_models, tmp_path, monkeypatch):
    config = run(tmp_path, [str(tiny_models.path("a"))])
    first = evaluate(config)
    monkeypatch.setattr("fusion.evaluation.models.load", lambda *a, **k: pytest.fail("loaded again"))
    assert evaluate(config) == first


def test_killed_evaluation_continues_with_what_is_missing(tiny_models, tmp_path, monkeypatch):
    config = run(tmp_path, [str(tiny_models.path("a"))])
    real, seen = bpb.bits_per_byte, []

    def dies(model, tokenizer, texts, **options):
        seen.append(len(texts))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(model, tokenizer, texts, **options)

    monkeypatch.setattr(bpb, "bits_per_byte", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert not (tmp_path / "out").exists()
    evaluate(config)
    assert seen == [len(TEXTS), 2, 2]


def test_other_weights_are_another_cell(tiny_models, tmp_path):
    first = evaluate(run(tmp_path, [str(tiny_models.path("a"))]))
    second = evaluate(run(tmp_path, [str(tiny_models.path("b"))]))
    assert first["score"] != second["score"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.models.clear(), "models is empty"),
        (lambda c: c.models.append("/nowhere/model"), "no such folder"),
        (lambda c: c.models.append(c.models[0]), "given twice"),
        (lambda c: setattr(c, "baseline", "zzz"), "baseline=zzz is none of the models"),
        (lambda c: setattr(c.evaluation, "texts", []), "evaluation.texts is empty"),
        (lambda c: setattr(c.evaluation, "texts", ["/nowhere.jsonl"]), "no such file"),
        (lambda c: setattr(c.evaluation, "field", "body"), "no text in 'body'"),
        (lambda c: setattr(c.evaluation, "stride", 999), "evaluation.stride=999"),
        (lambda c: setattr(c.evaluation, "window", 99999), "evaluation.window=99999"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(tiny_models, tmp_path, change, message):
    config = run(tmp_path, [str(tiny_models.path("a"))])
    change(config)
    with pytest.raises(UserError, match=message) as caught:
        evaluate(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_models(tiny_models, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        evaluate(run(tmp_path, [str(tmp_path / "empty")]))
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(UserError, match="safetensors"):
        evaluate(run(tmp_path, [str(tmp_path / "empty")]))


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_texts(tmp_path, content):
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(UserError, match="no text in it"):
        bpb.read_texts(tmp_path / "e.jsonl", "text")


def test_nan_weights(tiny_models):
    model, tokenizer = tiny_models.load("a")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        bpb.bits_per_byte(model, tokenizer, TEXTS, progress=False)


def test_a_limit_takes_examples_from_everywhere():
    from fusion.evaluation.cells import spread

    assert spread(10, 0) == spread(10, 99) == list(range(10))
    assert spread(10, 3) == [0, 3, 6]


def test_plan_measures_nothing(tiny_models, tmp_path, capsys):
    config = run(tmp_path, [str(tiny_models.path("a"))])
    config.plan = True
    assert evaluate(config) == {}
    assert "a: prose, letters" in capsys.readouterr().out
    assert not (tmp_path / "artifacts").exists()
