"""Alignment: bytes, DTW, spans, maps and projection against naive references, goldens and random input."""

import itertools
import json
import pickle
import pydoc_data.topics
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion.alignment import (
    Aligner,
    Statistics,
    align_tokens,
    byte_ends,
    read_vocabulary,
    span_positions,
    token_bytes,
    vocabulary_map,
)
from fusion.alignment.__main__ import run
from fusion.alignment.dtw import warp
from fusion.alignment.edit import nearest, pack
from fusion.config import Alignment, UserError

TEXTS = (
    "Fusion of knowledge: it's a new technique, isn't it?\n\n  Two  spaces.",
    "def f(x):\n\treturn {'a': x ** 2}  # größer\n",
    "你好，世界。これはテストです。 🙂👩‍👩‍👧 ﷺ שלום עולם",
    " leading space and NUL \x00 and trailing \n",
    "x",
)


def naive_distance(a, b) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def naive_dtw(source, target):
    """(cost, target_to_source) of the full recurrence; ties: diagonal, source-1, target-1."""
    if not source or not target:
        return 0, [[] for _ in target]
    known: dict = {}
    total = np.zeros((len(source), len(target)), int)
    for i, j in np.ndindex(*total.shape):
        pair = source[i], target[j]
        if pair not in known:
            known[pair] = naive_distance(*pair)
        total[i, j] = known[pair] + min((total[p] for p in before(i, j)), default=0)
    i, j = len(source) - 1, len(target) - 1
    matched = [[] for _ in target]
    matched[j].insert(0, i)
    while i or j:
        i, j = min(before(i, j), key=lambda p: total[p])
        matched[j].insert(0, i)
    return total[-1, -1], matched


def before(i, j):
    return [p for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(p) >= 0]


def train(kind: str, size: int, texts=TEXTS) -> PreTrainedTokenizerFast:
    """A small tokenizer of each family, trained on the spot."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "sentencepiece":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special += [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=80)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>")
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
    made.train_from_iterator(list(texts) * 3, trainer)
    if kind == "sentencepiece":  # the bytes are pieces, not special tokens
        held = json.loads(made.to_str())
        held["added_tokens"] = [t for t in held["added_tokens"] if not t["content"].startswith("<0x")]
        made = Tokenizer.from_str(json.dumps(held))
    eos = special[0] if kind == "bytes" else "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, unk_token=None if kind == "bytes" else "<unk>")


@pytest.fixture(scope="module")
def trained():
    return {kind: train(kind, 420) for kind in ("bytes", "sentencepiece", "unigram", "wordpiece")}


@pytest.fixture(scope="module")
def real(shared):
    return {p.name: AutoTokenizer.from_pretrained(p) for p in sorted((shared / "data/tokenizers").iterdir())}


def ids_of(tokenizer, text: str, eos: bool = True) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.array(row + [tokenizer.eos_token_id] * (eos and tokenizer.eos_token_id is not None), np.int64)


def spelled(tokenizer, ids) -> bytes:
    held = token_bytes(tokenizer)
    return b"".join(held[i] or b"" for i in ids)


# bytes ---------------------------------------------------------------------------------------------------------------


def test_real_tokens_spell_the_text(real) -> None:
    for (name, tokenizer), text in itertools.product(real.items(), TEXTS):
        got = spelled(tokenizer, ids_of(tokenizer, text))
        vocabulary = read_vocabulary(tokenizer)
        if vocabulary.lossy:
            assert name == "bert-bge-small-en"
        else:
            assert got.removeprefix(b" " if vocabulary.prefix else b"") == text.encode(), (name, text)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_trained_tokens_spell_the_text(trained, kind) -> None:
    for text in TEXTS:
        got = spelled(trained[kind], ids_of(trained[kind], text))
        assert got.removeprefix(b" " if kind == "sentencepiece" else b"") == text.encode()
    assert read_vocabulary(trained[kind]).spelling == ("byte-level" if kind == "bytes" else kind)


def test_unigram_and_wordpiece_are_told_apart(trained) -> None:
    assert read_vocabulary(trained["unigram"]).spelling == "sentencepiece"
    assert read_vocabulary(trained["wordpiece"]).spelling == "wordpiece"
    assert read_vocabulary(trained["wordpiece"]).lossy


def test_slow_tokenizer_reads_like_the_fast_one(shared) -> None:
    from transformers import LlamaTokenizer

    folder = shared / "data/tokenizers/llama2-7b"
    try:
        slow = LlamaTokenizer.from_pretrained(folder, use_fast=False)
    except Exception as error:
        pytest.skip(f"no slow tokenizer in this version of transformers: {error}")
    assert token_bytes(slow)[:32000] == token_bytes(AutoTokenizer.from_pretrained(folder))[:32000]


def test_roles(real) -> None:
    llama, mpt = real["llama2-7b"], real["mpt-7b"]
    assert vocabulary_map(llama, mpt, "em")[llama.eos_token_id] == mpt.eos_token_id
    assert token_bytes(llama)[llama.eos_token_id] is None
    assert vocabulary_map(mpt, llama, "em")[mpt.convert_tokens_to_ids("Ċ")] == llama.convert_tokens_to_ids("<0x0A>")


class Empty:
    name_or_path = "nothing"

    def get_vocab(self):
        return {}


def test_no_vocabulary_is_a_users_error(trained) -> None:
    with pytest.raises(UserError, match="nothing has no vocabulary"):
        token_bytes(Empty())
    with pytest.raises(UserError, match="only 3 logits"):
        read_vocabulary(trained["bytes"], 3)


# DTW -----------------------------------------------------------------------------------------------------------------


def test_dtw_golden(shared) -> None:
    for case in json.loads((shared / "golden/alignment_dtw.json").read_text())["cases"]:
        source = [t.replace("Ġ", "") for t in case["blending_tokens"]]
        target = [t.replace("▁", "") for t in case["base_tokens"]]
        got = align_tokens(source, target)
        if case.get("error"):
            assert got == (0, [])
            continue
        assert got.cost == case["total_cost"], case["id"]
        assert got.target_to_source == case["base_to_blending"], case["id"]  # also where the path is not unique


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_dtw_is_the_full_recurrence(data) -> None:
    words = data.draw(st.lists(st.text("ab é你\x00\ud800", max_size=5), min_size=1, max_size=8, unique=True))
    source, target = (data.draw(st.lists(st.sampled_from(words), max_size=40)) for _ in range(2))
    want = naive_dtw(source, target)
    assert align_tokens(source, target) == want
    known: dict = {}
    rows = [np.array([known.setdefault(x, len(known)) for x in side], np.int32) for side in (source, target)]
    for band in (0, 2):  # however narrow it starts, the result is exact
        assert warp(*rows, pack(known), band=band)[0] == want[0]


def test_dtw_drifting_rows() -> None:
    """Equal text far off the diagonal: the first bands cannot prove anything."""
    words = [f"{i:x}" for i in range(120)]
    source, target = ["zz"] * 60 + words, words + ["zz"] * 60
    assert align_tokens(source, target) == naive_dtw(source, target)


def test_edit_distance_and_nearest() -> None:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 101, rng.choice([0, 1, 2, 3, 5, 9, 70, 130]))) for _ in range(150)]
    found = nearest(np.arange(50), np.arange(50, 150), pack(words))
    for word, at in zip(words[:50], found, strict=True):
        distances = [Levenshtein.distance(word, other) for other in words[50:]]
        assert at == distances.index(min(distances))


# maps and projection -------------------------------------------------------------------------------------------------


def test_mined_map_is_the_minimum(trained) -> None:
    for a, b in itertools.permutations(("bytes", "sentencepiece", "unigram"), 2):
        source, target = read_vocabulary(trained[a]), read_vocabulary(trained[b])
        got = vocabulary_map(trained[a], trained[b], "mined")
        exact = vocabulary_map(trained[a], trained[b], "em")
        texts = [b"\0" * 999 if k is None else k for k in target.text]
        for i, text in enumerate(source.text):
            if text is None:
                continue
            distances = [Levenshtein.distance(text, k) for k in texts]
            if exact[i] < 0:
                assert got[i] == distances.index(min(distances))
            else:
                assert got[i] == exact[i]
                assert target.text[got[i]] == text


def test_maps_from_the_cache(trained, tmp_path) -> None:
    for criterion in ("mined", "span"):
        made = vocabulary_map(trained["bytes"], trained["unigram"], criterion, cache=tmp_path)
        assert len(list((tmp_path / "vocabulary_map").glob("*/manifest.json"))) == 1 + (criterion == "span")
        assert made.equal(vocabulary_map(trained["bytes"], trained["unigram"], criterion, cache=tmp_path))


def test_width_beyond_the_tokenizer(trained) -> None:
    size = len(trained["bytes"])
    got = vocabulary_map(trained["bytes"], trained["sentencepiece"], "mined", source_width=size + 60)
    assert len(got) == size + 60
    assert (got[size:] == -1).all()


def test_prefix_map_starts_the_same_text(real) -> None:
    for a, b in (("llama2-7b", "gpt2"), ("mistral-7b-v0.1", "llama2-7b")):
        source, target = read_vocabulary(real[a]), read_vocabulary(real[b])
        got = vocabulary_map(real[a], real[b], "span").tolist()
        wrong = [
            i
            for i, t in enumerate(source.text)
            if t and got[i] >= 0 and not (t.startswith(target.text[got[i]]) or target.text[got[i]].startswith(t))
        ]
        assert not wrong
        assert sum(t >= 0 for t in got) > 0.99 * len(got)


def naive_projection(positions, ids, logprobs, target_ids, mapping, collision, fallback):
    rows = []
    for i, j in enumerate(positions):
        mass: dict = {}
        for s, p in zip(ids[j], np.exp(logprobs[j]), strict=True) if j >= 0 else ():
            if mapping[s] >= 0 and p > 0:
                t = int(mapping[s])
                mass[t] = mass.get(t, 0) + p if collision == "sum" else max(mass.get(t, 0), p)
        if not mass and fallback == "next_token" and i + 1 < len(target_ids):
            mass = {int(target_ids[i + 1]): 1.0}
        rows.append(mass)
    return rows


@pytest.mark.parametrize("collision", ["sum", "max"])
@pytest.mark.parametrize("fallback", ["next_token", "ignore"])
@pytest.mark.parametrize("criterion", ["em", "mined", "span"])
def test_projection_is_the_naive_one(trained, criterion, collision, fallback) -> None:
    aligner = Aligner(
        trained["bytes"],
        trained["sentencepiece"],
        Alignment(criterion=criterion, collision=collision, fallback=fallback),
    )
    rng = np.random.default_rng(1)
    source, target = ids_of(trained["bytes"], TEXTS[0]), ids_of(trained["sentencepiece"], TEXTS[0])
    ids = rng.integers(0, len(aligner.map), (len(source), 10)).astype(np.uint32)
    logprobs = -np.sort(rng.exponential(3, (len(source), 10))).astype(np.float32)
    logprobs[rng.random(logprobs.shape) < 0.2] = -np.inf
    positions = aligner.positions(source, target)
    got = aligner.project(positions, ids, logprobs, target)
    want = naive_projection(positions, ids, logprobs, target, aligner.map, collision, fallback)
    for row, p, kind, mass, j in zip(got.ids, got.logprobs, got.kind, want, positions, strict=True):
        kept = p > -np.inf
        assert dict(zip(row[kept].tolist(), np.exp(p[kept]), strict=True)) == pytest.approx(mass, rel=1e-5)
        assert (np.diff(p[kept]) <= 0).all()
        assert kind == (0 if not mass else 1 if j >= 0 and set(mass) <= set(aligner.map[ids[j]].tolist()) else 2)
    with pytest.raises(UserError, match="logits"):
        aligner.positions(np.array([len(aligner.map)]), target)


def golden_tokenizer(vocab: dict):
    made = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_projection_golden(shared, kind) -> None:
    golden = json.loads((shared / "golden/projection_tiny.json").read_text())
    pair = golden["pairs"]["T1"]
    source, target = (golden_tokenizer(pair[f"{v}_vocab"]) for v in ("blending", "base"))
    aligner = Aligner(
        source,
        target,
        Alignment(criterion="em" if kind == "hard" else "mined", collision="max", normalise="reference"),
    )
    base = pair["base_vocab"]
    if kind == "soft":
        nearest_of = pair["mined_min_distance_and_tie_count"]
        for token, i in pair["blending_vocab"].items():
            ours = aligner.target.tokens[aligner.map[i]]
            least, ties = nearest_of[token.replace("Ġ", "▁")]
            assert naive_distance(token.replace("Ġ", "▁"), ours) == least
            if ties == 1:
                assert ours == pair["mined_map"][token.replace("Ġ", "▁")]
        # from here on with the golden's own choice among ties
        aligner.map = np.full(len(aligner.map), -1, np.int32)
        for token, i in pair["blending_vocab"].items():
            aligner.map[i] = base[pair["mined_map"][token.replace("Ġ", "▁")]]
    for case in (c for c in golden["cases"] if c["align_type"] == kind):
        if case.get("error") or "aligned_indices" not in case or not case["base_ids"]:
            continue
        source_ids, target_ids = np.array(case["blending_ids"]), np.array(case["base_ids"])
        assert aligner.path(source_ids, target_ids)[0] == case["total_cost"]
        logits = np.array(case["blending_logits"], np.float32)
        ids = np.array(case["blending_indices"], np.uint32)
        got = aligner.project(aligner.positions(source_ids, target_ids), ids, logits, target_ids)
        for i, (want_ids, want) in enumerate(zip(case["aligned_indices"], case["aligned_logits"], strict=True)):
            if want == [1.0] and want_ids == [target_ids[i]] and got.kind[i] != 1:  # theirs: token i; ours: i + 1
                assert got.kind[i] == (2 if i + 1 < len(target_ids) else 0)
                continue
            if not want:
                assert got.kind[i] != 1
                continue
            kept = got.logprobs[i] > -np.inf
            assert got.ids[i][kept].tolist() == want_ids
            np.testing.assert_allclose(got.logprobs[i][kept], want, rtol=1e-6)


# positions -----------------------------------------------------------------------------------------------------------


def naive_spans(source, target) -> list[int]:
    """By prefix bytes; both lists of token bytes, eos last."""

    def ends(tokens):
        return [len(b"".join(tokens[: i + 1])) for i in range(len(tokens))]

    s, t = ends(source[:-1]), ends(target[:-1])
    found = [max((j for j, e in enumerate(s) if e == end), default=-1) for end in t]
    return [*found, len(source) - 1]


def test_spans_are_equal_prefixes(real) -> None:
    made = {n: read_vocabulary(t) for n, t in real.items() if n != "bert-bge-small-en"}
    for (a, b), text in itertools.product(itertools.permutations(made, 2), TEXTS):
        rows, ends = [], []
        for n in (a, b):
            ids = ids_of(real[n], text)
            pieces = [made[n].text[i] or b"" for i in ids]
            if made[n].prefix and pieces[0][:1] == b" ":
                pieces[0] = pieces[0][1:]
            rows.append(pieces)
            ends.append(byte_ends(ids[:-1], made[n]))
        got, first, last = span_positions(*ends)
        assert got.tolist() == naive_spans(*rows)[:-1], (a, b, text)
        assert first == last  # nothing was lost


def test_every_pair_every_criterion(trained) -> None:
    for (a, source), (b, target) in itertools.product(trained.items(), repeat=2):
        for criterion in ("em", "mined", "span"):
            aligner = Aligner(source, target, Alignment(criterion=criterion))
            for text in TEXTS:
                got = aligner.positions(ids_of(source, text), ids_of(target, text))
                assert (np.diff(got[got >= 0]) >= 0).all(), (a, b)
                if a == b and criterion == "span":
                    assert got.tolist() == list(range(len(got))), (a, text)
                assert criterion != "span" or got[-1] == len(ids_of(source, text)) - 1  # eos matches eos


def test_lossy_text_goes_by_dtw_with_a_warning(trained, caplog) -> None:
    aligner = Aligner(trained["wordpiece"], trained["bytes"], Alignment(criterion="span"))
    got = aligner.positions(ids_of(trained["wordpiece"], TEXTS[0]), ids_of(trained["bytes"], TEXTS[0]))
    assert aligner.lossy == 1
    assert (got >= 0).any()
    assert "lossy" in caplog.text


def test_odd_texts(trained) -> None:
    for (a, b), criterion in itertools.product(itertools.permutations(trained, 2), ("em", "mined", "span")):
        aligner = Aligner(trained[a], trained[b], Alignment(criterion=criterion))
        for text, eos in itertools.product(
            ("", " ", " \n\t \n", "\x00", "a\x00b", "e\u0301 é", "\ufffd"), (True, False)
        ):
            source, target = ids_of(trained[a], text, eos), ids_of(trained[b], text, eos)
            got = aligner.positions(source, target)
            assert got.shape == target.shape
            assert (got < len(source)).all()


def test_lone_surrogates_are_tokens_like_others() -> None:
    assert align_tokens(["a\ud800", "b"], ["a", "\ud800b"]) == naive_dtw(["a\ud800", "b"], ["a", "\ud800b"])


@pytest.mark.slow
def test_a_hundred_thousand_tokens(trained) -> None:
    """In bounded memory: the band, not the grid, is held."""
    import tracemalloc

    text = "".join(pydoc_data.topics.topics.values())[:200_000]
    source, target = ids_of(trained["bytes"], text), ids_of(trained["sentencepiece"], text)
    assert len(target) > 90_000
    tracemalloc.start()
    spans = Aligner(trained["bytes"], trained["sentencepiece"], Alignment(criterion="span")).positions(source, target)
    aligner = Aligner(trained["bytes"], trained["sentencepiece"], Alignment(criterion="em"))
    got = aligner.positions(source, target)
    assert tracemalloc.get_traced_memory()[1] < 500e6
    tracemalloc.stop()
    assert (np.diff(got[got >= 0]) >= 0).all()
    assert (spans >= 0).mean() > (got >= 0).mean()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.randoms(use_true_random=False))
def test_random_bytes_random_vocabularies(trained, raw, random) -> None:
    """Any two ways of cutting any bytes: spans are what their definition says, DTW is monotone."""
    text = raw.decode("latin-1")

    def cut():
        places = sorted({0, len(text), *(random.randrange(len(text) + 1) for _ in range(len(text) // 2))})
        return [text[a:b] for a, b in itertools.pairwise(places)]

    rows, makers = [], []
    for _ in range(2):
        pieces = cut()
        vocab = {"<eos>": 0} | {p: i + 1 for i, p in enumerate(dict.fromkeys(pieces))}
        made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "<eos>")), eos_token="<eos>")
        rows.append(np.array([vocab[p] for p in pieces] + [0]))
        makers.append(made)
    vocabularies = [read_vocabulary(m) for m in makers]
    same = all(v.spelling == "plain" for v in vocabularies)
    for criterion in ("span", "em", "mined"):
        aligner = Aligner(*makers, Alignment(criterion=criterion))
        got = aligner.positions(*rows)
        assert (np.diff(got[got >= 0]) >= 0).all()
        if criterion == "span" and same:
            cuts = [[v.text[i] or b"" for i in row] for v, row in zip(vocabularies, rows, strict=True)]
            assert got.tolist() == naive_spans(*cuts)


# statistics ----------------------------------------------------------------------------------------------------------


def test_statistics_merge_in_any_order(trained, tmp_path) -> None:
    config = Alignment(criterion="ms")
    make = lambda: Aligner(trained["bytes"], trained["sentencepiece"], config)  # noqa: E731
    whole, parts = make(), [make() for _ in TEXTS]
    want = Counter()
    for part, text in zip(parts, TEXTS, strict=True):
        source, target = ids_of(trained["bytes"], text), ids_of(trained["sentencepiece"], text)
        whole.count(source, target)
        part.count(source, target)
        want.update(zip(*(x.tolist() for x in _pairs(whole, source, target)), strict=True))
    forward, backward = Statistics(), Statistics()
    for part in parts:
        forward = forward + part.statistics
    for part in reversed(parts):
        backward = backward + part.statistics
    assert forward == backward == whole.statistics
    s, t, n = forward.rows()
    assert Counter(dict(zip(zip(s.tolist(), t.tolist(), strict=True), n.tolist(), strict=True))) == want
    forward.save(tmp_path / "counts.safetensors")
    assert Statistics.load(tmp_path / "counts.safetensors") == forward


def _pairs(aligner, source, target):
    _, path = aligner.path(source, target)
    return source[path[:, 0]], target[path[:, 1]]


def test_ms_takes_the_most_frequent(trained) -> None:
    source, target = trained["bytes"], trained["sentencepiece"]
    counts = Statistics()
    counts.add(np.array([50, 50, 50, 51, 51]), np.array([300, 300, 301, 302, 303]))
    got = vocabulary_map(source, target, "ms", statistics=counts)
    assert got[50] == 300
    near = [naive_distance(read_vocabulary(source).keys[51], read_vocabulary(target).keys[t]) for t in (302, 303)]
    assert got[51] == 302 + (near[1] < near[0])
    with pytest.raises(UserError, match="mapping statistics"):
        vocabulary_map(source, target, "ms")


def test_aligner_travels_to_workers(trained) -> None:
    aligner = Aligner(trained["bytes"], trained["unigram"], Alignment(criterion="mined"))
    again = pickle.loads(pickle.dumps(aligner))
    source, target = ids_of(trained["bytes"], TEXTS[0]), ids_of(trained["unigram"], TEXTS[0])
    assert (again.positions(source, target) == aligner.positions(source, target)).all()


# the viewer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["span", "em", "mined", "ms"])
def test_viewer(trained, tmp_path, capsys, criterion) -> None:
    for kind in ("bytes", "sentencepiece"):
        trained[kind].save_pretrained(tmp_path / kind)
    text = "a <b> & 'c'\n\x00 שלום 你好 </script>"
    sides = ["--source", str(tmp_path / "bytes"), "--target", str(tmp_path / "sentencepiece")]
    run([text, *sides, "--criterion", criterion, "--html", str(tmp_path / "page.html")])
    assert "coverage" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 1
    assert "http://www.w3.org/2000/svg" in page.replace("src=", "")
    assert "<script src" not in page


def test_viewer_names_a_broken_tokenizer(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("{ broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        run(["x", "--source", str(tmp_path), "--target", str(tmp_path)])
