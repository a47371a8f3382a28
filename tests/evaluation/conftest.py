"""Two tiny random Llamas that share a byte-level tokenizer, as Hugging Face folders."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}<assistant>"


class Tiny:
    def __init__(self, root):
        self.root = root

    def path(self, name):
        return self.root / name

    def load(self, name):
        return AutoModelForCausalLM.from_pretrained(self.path(name)).eval(), AutoTokenizer.from_pretrained(
            self.path(name)
        )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny_models")
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters | {"</s>": 256}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.chat_template = CHAT
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5, eos_token_id=256,
            pad_token_id=256, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return Tiny(root)
