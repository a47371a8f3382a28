"""Tiny LLMs grown on the spot, so that everything runs with nothing downloaded.

A seedling is an untrained model with its own tokenizer, an ordinary Hugging Face folder; it grows up in the same
training stage as any target, on plain text (λ = 1).
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fusion.config import Grow

CONTEXT = 512
EOS, UNKNOWN = "</s>", "<unk>"


def train_tokenizer(texts: list[str], style: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """BPE of at most `vocabulary` tokens, like GPT-2 (`bytes`) or Llama (`sentencepiece`: ▁, byte fallback)."""
    special = [UNKNOWN, EOS]
    if style == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=256 if style == "bytes" else 200,
        show_progress=False,
    )
    if style == "sentencepiece":  # words of ▁ and letters, lines apart: what SentencePiece would merge within
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
        )
    tokenizer.train_from_iterator(texts, trainer)
    if style == "sentencepiece":
        tokenizer = _as_byte_fallback(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token=UNKNOWN, pad_token=EOS)


def _as_byte_fallback(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with its byte tokens as ordinary vocabulary: as special tokens they would match in text."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in (EOS, UNKNOWN)]
    state["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False}
    return Tokenizer.from_str(json.dumps(state))


def architecture(grow: Grow, vocabulary: int) -> Any:
    """The transformers config of a tiny LLM; the field names differ between architectures, the sizes do not."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": grow.hidden,
        "num_hidden_layers": grow.layers,
        "num_attention_heads": grow.heads,
        "intermediate_size": grow.hidden * (4 if grow.architecture == "gpt_neox" else 3),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if grow.architecture == "mistral":
        common["num_key_value_heads"] = grow.heads
    if grow.architecture == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        names |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
        common = {names.get(k, k): v for k, v in common.items()} | dropout
    return AutoConfig.for_model(grow.architecture, **common)


def seedling(grow: Grow, texts: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Write an untrained model and its tokenizer, trained on `texts`, into `folder`; returns its figures."""
    tokenizer = train_tokenizer(texts, grow.tokenizer, grow.vocabulary)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(architecture(grow, len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
