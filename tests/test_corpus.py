"""Texts and dialogues become blocks: nothing lost, the right tokens count, bad input has one clear line."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import corpus, tiny
from fusion.config import Corpus, UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer(corpus.stdlib("docs", "held_out"), "bytes", 600)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def either(request):
    return tiny.train_tokenizer(corpus.stdlib("docs", "held_out"), request.param, 600)


def blocks(config, tokenizer):
    skipped = Counter()
    return list(corpus.blocks(config, tokenizer, skipped)), skipped


def jsonl(folder, rows, **options):
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(source="jsonl", path=str(path), held_out=0, **options)


# --- the embedded world


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_embedded_domains_have_disjoint_splits_of_the_right_size(domain):
    held_out, fusion = corpus.stdlib(domain, "held_out"), corpus.stdlib(domain, "fusion")
    for split, documents in (("held_out", held_out), ("fusion", fusion)):
        assert 0.7 * corpus.SPLITS[split] <= sum(map(len, documents)) <= corpus.SPLITS[split]
    assert not set(held_out) & set(fusion)
    assert corpus.stdlib(domain, "held_out") == held_out
    assert max(map(len, fusion)) <= 3100


def test_unknown_domain_and_split_are_named():
    with pytest.raises(UserError, match=r"no domain 'cod' .did you mean 'code'"):
        corpus.stdlib("cod", "train")
    with pytest.raises(UserError, match=r"corpus.split=validation"):
        next(corpus.documents(Corpus(source="stdlib", split="validation"), Counter()))


def test_embedded_corpus_takes_its_domains_in_turns(tokenizer):
    config = Corpus(source="stdlib", split="fusion", block_size=64, documents=3)
    made, _ = blocks(config, tokenizer)
    text = "".join(b.text for part, b in made if part == "train")
    assert text == "".join(corpus.stdlib(domain, "fusion")[0] for domain in corpus.DOMAINS)
    assert any(part == "held_out" for part, _ in made)


# --- texts


@settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=400), size=st.integers(16, 64))
def test_blocks_join_to_the_text_and_fit(tmp_path_factory, either, text, size):
    text = text.encode("utf-8", "replace").decode()
    made = list(corpus._text_blocks(Corpus(block_size=size), either, text))
    assert "".join(block.text for block in made) == text
    for number, block in enumerate(made):
        last = number == len(made) - 1
        assert 1 <= len(block.ids) <= size
        assert block.counted.all()
        assert block.ends == last
        assert (block.ids[-1] == either.eos_token_id) == last
        again, _ = corpus.tokenise(either, block.text, block.begins, block.ends, block.spans)
        np.testing.assert_array_equal(again, block.ids)


def test_long_text_fills_its_blocks_and_cuts_at_lines(either):
    text = "".join(corpus.stdlib("docs", "held_out")[:12])
    made = list(corpus._text_blocks(Corpus(block_size=128), either, text))
    assert np.mean([len(b.ids) for b in made[:-1]]) > 100
    assert np.mean([b.text.endswith("\n") for b in made[:-1]]) > 0.5


def test_bad_texts_are_skipped_or_named(tmp_path, tokenizer):
    made, skipped = blocks(jsonl(tmp_path, [{"text": ""}, {"text": "a\ud800b"}, {"text": "c"}]), tokenizer)
    assert [b.text for _, b in made] == ["a?b", "c"]
    assert skipped == {"empty documents": 1}
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    made, skipped = blocks(Corpus(source="jsonl", path=str(path)), tokenizer)
    assert made[0][1].text == "caf\ufffd"
    assert skipped["lines with invalid UTF-8 (bad bytes replaced)"] == 1
    path.write_text("")
    with pytest.raises(UserError, match=r"corpus.path=.*no text to train on"):
        blocks(Corpus(source="jsonl", path=str(path)), tokenizer)
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"corpus.jsonl:2: no JSON"):
        blocks(Corpus(source="jsonl", path=str(path)), tokenizer)
    with pytest.raises(UserError, match=r"corpus.field=body: .*it has: text"):
        blocks(jsonl(tmp_path, [{"text": "a"}], field="body"), tokenizer)
    with pytest.raises(UserError, match="no such file"):
        blocks(Corpus(source="jsonl", path=str(tmp_path / "absent.jsonl")), tokenizer)
    with pytest.raises(UserError, match="block_size=2 is less than one character"):
        blocks(jsonl(tmp_path, [{"text": "🙂🙂🙂"}], block_size=2), tokenizer)


def test_held_out_share_is_chosen_by_content(tmp_path, tokenizer):
    config = jsonl(tmp_path, [{"text": f"document {i}"} for i in range(400)])
    config.held_out = 0.25
    made, _ = blocks(config, tokenizer)
    held_out = {b.text for part, b in made if part == "held_out"}
    assert 60 < len(held_out) < 140
    config = jsonl(tmp_path, [{"text": f"document {i}"} for i in reversed(range(400))])
    config.held_out = 0.25
    assert {b.text for part, b in blocks(config, tokenizer)[0] if part == "held_out"} == held_out


def test_datasets_stream_local_files(tmp_path, tokenizer):
    rows = [{"text": f"document {i} of many"} for i in range(20)]
    local, _ = blocks(jsonl(tmp_path, rows), tokenizer)
    streamed, _ = blocks(Corpus(source="hub", path=str(tmp_path), held_out=0), tokenizer)
    assert [b.text for _, b in streamed] == [b.text for _, b in local]
    with pytest.raises(UserError, match=r"corpus.path="):
        blocks(Corpus(source="hub", path=str(tmp_path), split="absent", held_out=0), tokenizer)


# --- dialogues


def chat(folder, turns, **options):
    return jsonl(folder, [{"conversations": turns}], format="chat", **options)


def said(*values, first="human"):
    names = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": names[i % 2], "value": value} for i, value in enumerate(values)]


def test_replies_and_their_end_of_turn_count(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    made, _ = blocks(chat(tmp_path, said("Hello?", "I am here.", "And now?", "Still here.")), tokenizer)
    (block,) = (b for _, b in made)
    assert block.text == (
        "<|im_start|>user\nHello?</s>\n<|im_start|>assistant\nI am here.</s>\n"
        "<|im_start|>user\nAnd now?</s>\n<|im_start|>assistant\nStill here.</s>\n"
    )
    assert tokenizer.decode(block.ids[block.counted]) == "I am here.</s>Still here.</s>"
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "I am here."}]
    config = jsonl(tmp_path, [{"messages": messages}], format="chat")
    assert blocks(config, tokenizer)[0][0][1].text == block.text.partition("<|im_start|>user\nAnd")[0]


def test_long_dialogues_are_split_at_turn_borders(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    turns = said(*(f"{'word ' * (5 + i)}{i}" for i in range(20)), "x " * 400, "y")
    made, skipped = blocks(chat(tmp_path, turns, block_size=300), tokenizer)
    texts = [b.text for _, b in made]
    assert len(texts) > 3
    assert all(len(b.ids) <= 300 for _, b in made)
    whole = tokenizer.apply_chat_template(
        [{"role": ["user", "assistant"][i % 2], "content": t["value"]} for i, t in enumerate(turns[:20])],
        tokenize=False,
    )
    assert "".join(texts) == whole
    assert skipped == {"turns longer than a block": 1}
    assert all(text.startswith("<|im_start|>user") for text in texts)


def test_what_is_skipped_is_counted_and_why(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    rows = [
        {"conversations": said("a", "b")},
        {"conversations": said("dropped", "a", "b", first="gpt")},
        {"conversations": said("only a question")},
        {"conversations": [*said("a", "b"), *said("c", "d", first="gpt")]},
        {"conversations": []},
        {"conversations": [{"from": "martian", "value": "a"}, *said("b", "c")]},
    ]
    made, skipped = blocks(jsonl(tmp_path, rows, format="chat"), tokenizer)
    assert len(made) == 2
    assert made[0][1].text == made[1][1].text
    assert skipped == {
        "dialogues without a reply": 1,
        "dialogues whose turns do not alternate": 1,
        "dialogues with an unknown speaker": 1,
        "empty documents": 1,
    }


def test_bad_dialogues_are_named(tmp_path, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"corpus.template is empty"):
        blocks(chat(tmp_path, said("a", "b")), tokenizer)
    with pytest.raises(UserError, match=r"corpus.template=openchat: .*did you mean 'openchat_3.5'"):
        blocks(chat(tmp_path, said("a", "b"), template="openchat"), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"rewrites earlier turns"):
        blocks(chat(tmp_path, said("a", "b", "c", "d")), tokenizer)
    with pytest.raises(UserError, match=r"neither conversations nor messages"):
        blocks(jsonl(tmp_path, [{"text": "a"}], format="chat"), tokenizer)


def test_openchat_agrees_with_the_reference(shared):
    from transformers import AutoTokenizer

    golden = json.loads((shared / "golden" / "chat_mask.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / "mistral-7b-v0.1")
    tokenizer.add_tokens(["<|end_of_turn|>", "<|pad_0|>"], special_tokens=True)
    for case in golden["cases"]:
        turns = [{"role": t["from"], "content": t["value"]} for t in case["conversation"]]
        config = Corpus(format="chat", template=case["template"], block_size=case["max_length"])
        (block,) = corpus._dialogue_blocks(config, tokenizer, corpus.Dialogue(turns), Counter())
        size = sum(case["attention_mask"])
        assert block.ids.tolist() == case["input_ids"][:size]
        assert np.where(block.counted, block.ids, -100).tolist() == case["labels"][:size]


def test_a_tokenizer_without_end_or_offsets_is_refused(tmp_path, tokenizer):
    config = jsonl(tmp_path, [{"text": "a"}])
    bare = tiny.train_tokenizer(["a b c"], "bytes", 300)
    bare.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        blocks(config, bare)
