"""Seedlings: tokenizers that lose nothing, models that load, the same ones every time."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion import corpus
from fusion.artifact import checksum
from fusion.config import Grow
from fusion.tiny import seedling, train_tokenizer

TEXTS = corpus.stdlib("docs", "held_out")[:20]
TOKENIZERS = {style: train_tokenizer(TEXTS, style, 600) for style in ("bytes", "sentencepiece")}


@pytest.mark.parametrize("style", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokenizers_lose_nothing(style: str, text: str) -> None:
    tokenizer = TOKENIZERS[style]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_tokenizers_differ_in_kind_and_size() -> None:
    assert "▁the" in TOKENIZERS["sentencepiece"].get_vocab()
    assert "Ġthe" in TOKENIZERS["bytes"].get_vocab()
    assert len(TOKENIZERS["bytes"]) == 600


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mistral", "gpt2"])
def test_a_seedling_is_an_ordinary_folder(architecture: str, tmp_path: Path) -> None:
    grow = Grow(architecture=architecture, vocabulary=400, hidden=16, layers=2, heads=2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        seedling(grow, TEXTS, 0, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert model.config.model_type == architecture
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert checksum(tmp_path / "one/model.safetensors") == checksum(tmp_path / "two/model.safetensors")
    other = replace(grow, hidden=32)
    (tmp_path / "three").mkdir()
    assert seedling(other, TEXTS, 0, tmp_path / "three")["parameters"] > model.num_parameters()


def test_the_domains_are_far_apart() -> None:
    """Words of one domain are rare in the others: that is what an expert can teach."""
    words = {d: {w for text in corpus.stdlib(d, "fusion") for w in text.split()} for d in corpus.DOMAINS}
    for one in corpus.DOMAINS:
        for other in corpus.DOMAINS:
            if one != other:
                assert len(words[one] & words[other]) < 0.5 * len(words[one])


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_splits_share_no_document(domain: str) -> None:
    train, fusion, held_out = (set(corpus.stdlib(domain, split)) for split in ("train", "fusion", "held_out"))
    assert not train & fusion
    assert not train & held_out
    assert not fusion & held_out
