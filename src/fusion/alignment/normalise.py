"""What every token of a tokenizer stands for: bytes of text, or a role.

Decisions:
- A tokenizer is known by what it does, not by its class or name: each way of spelling bytes in tokens (byte-level
  alphabet, ▁ with byte fallback, ## continuation, ...) is tried on probe texts, and the one that gives them back wins.
- Special tokens stand for a role (eos, bos, end of a turn, ...), so `</s>` equals `<|endoftext|>`. Where their text is
  written out in a chat, they also count for the bytes of that text (`spelled`).
- Arrays are as wide as the model's logits, which can be wider than the tokenizer; an id without a token is None.
- SentencePiece's space before the first word is no byte of the text and is taken away (`prefix`, `reprefix`).
"""

import dataclasses
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from fusion.config import UserError

ROLES = ("eos", "bos", "pad", "unk", "mask", "cls", "sep")
CHAT = {
    "end_of_turn": ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<turn|>", "<|eot|>"),
    "start_of_turn": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>", "<|turn>"),
    "user": ("<|user|>", "[INST]"),
    "assistant": ("<|assistant|>", "[/INST]"),
    "system": ("<|system|>",),
}
PROBES = (
    "hello world",
    "a b c",
    "The quick brown fox, it's 42!",
    " two  spaces",
    "def f(a_b):\n\treturn a_b\n",
    "größer 你好 🙂",
    "שלום\r\n",
)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte, read backwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}


ALPHABET = _byte_alphabet()
_READ: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _byte_level(token: str) -> bytes:
    return bytes(ALPHABET[c] for c in token) if all(c in ALPHABET for c in token) else _utf8(token)


def _sentencepiece(token: str) -> bytes:
    byte = _fallback_byte(token)
    return _utf8(token.replace("▁", " ")) if byte is None else bytes([byte])


def _wordpiece(token: str) -> bytes:
    return _utf8(token[2:] if token.startswith("##") else f" {token}")


def _suffixed(token: str) -> bytes:
    return _utf8(f"{token[:-4]} " if token.endswith("</w>") else token)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _fallback_byte(token: str) -> int | None:
    """65 for `<0x41>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


# spelling of bytes, the marker of a word boundary that the reference code deletes, how its presence shows
SPELLINGS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "byte-level": (_byte_level, "Ġ"),
    "sentencepiece": (_sentencepiece, "▁"),
    "wordpiece": (_wordpiece, "##"),
    "suffix": (_suffixed, "</w>"),
    "plain": (_utf8, ""),
}


@dataclasses.dataclass
class Vocabulary:
    """What the ids 0..V-1 of one tokenizer stand for. Plain data: picklable, without the tokenizer."""

    tokens: list[str | None]  # as the tokenizer writes them
    text: list[bytes | None]  # None: a special token, or no token
    roles: list[str | None]
    spelling: str  # a key of SPELLINGS, or "bytes"
    lossy: bool  # some probe text did not come back
    prefix: bool  # a space is put before the text
    reprefix: bool  # ... and again after each special token

    def __len__(self) -> int:
        return len(self.text)

    @cached_property
    def keys(self) -> list[bytes | None]:
        """One byte string per id by which tokens compare: the text, or 0xFF and the role; None: no token."""
        return [
            b"\xff" + role.encode() if role is not None else text
            for text, role in zip(self.text, self.roles, strict=True)
        ]

    @property
    def marker(self) -> str:
        """The word-boundary marker in the tokens as they are written."""
        return SPELLINGS[self.spelling][1] if self.spelling in SPELLINGS else ""

    @cached_property
    def spelled(self) -> tuple[np.ndarray, np.ndarray]:
        """(bytes uint8[sum], offsets int64[V+1]): what each id adds to a text, special tokens written out."""
        parts = [
            text if text is not None else _utf8(token or "") for text, token in zip(self.text, self.tokens, strict=True)
        ]
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(p) for p in parts], out=offsets[1:])
        return np.frombuffer(b"".join(parts), np.uint8), offsets

    @cached_property
    def special(self) -> np.ndarray:
        """bool[V]: ids that stand for a role."""
        return np.array([role is not None for role in self.roles], np.bool_)

    def canonical(self) -> dict[bytes, int]:
        """key → the id that the tokenizer itself would use: a whole piece before a fallback byte, then the lowest."""
        first: dict[bytes, int] = {}
        for i, k in enumerate(self.keys):
            if k is not None and (k not in first or (self._is_byte(first[k]) and not self._is_byte(i))):
                first[k] = i
        return first

    def _is_byte(self, i: int) -> bool:
        return self.spelling == "sentencepiece" and _fallback_byte(self.tokens[i] or "") is not None

    def reference(self, marker: str) -> list[str | None]:
        """The strings that the reference code compares: the boundary marker replaced, nothing else decoded."""
        own = self.marker
        return [t.replace(own, marker) if own and t is not None else t for t in self.tokens]


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without any added special token."""
    return [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes each id stands for; None for special tokens and for ids without a token.

    Joined over the ids of a text they give the text's UTF-8, after one leading space where the tokenizer adds it.
    """
    return read_vocabulary(tokenizer).text


def read_vocabulary(tokenizer: Any, width: int | None = None) -> Vocabulary:
    """`Vocabulary` of a tokenizer; read once per tokenizer object and number of tokens."""
    try:
        known = _READ.setdefault(tokenizer, {})
    except TypeError:  # not hashable, or no weak reference to it
        return _read(tokenizer, width)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if (size, width) not in known:
        known[size, width] = _read(tokenizer, width)
    return known[size, width]


def _read(tokenizer: Any, width: int | None) -> Vocabulary:
    """Everything about a transformers tokenizer (fast, slow or remote code) that alignment needs.

    `width` is the number of logits of the model, if it is larger than the tokenizer.

    Raises:
        UserError: the tokenizer has no vocabulary, or more tokens than `width`.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    try:
        vocabulary = tokenizer.get_vocab()
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UserError(f"tokenizer {name}: its vocabulary cannot be read ({error})") from error
    added = {int(i): token for i, token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).items()}
    size = max([*vocabulary.values(), *added, -1]) + 1
    if not vocabulary or size == 0:
        raise UserError(f"tokenizer {name} has no vocabulary: is its tokenizer.json or model file there and whole?")
    if width is not None and width < size:
        raise UserError(
            f"tokenizer {name} has {size} tokens, its model only {width} logits: they do not belong together"
        )
    tokens: list[Any] = [None] * (width or size)
    for token, i in vocabulary.items():
        tokens[i] = token
    for i, token in added.items():
        tokens[i] = token.content
    roles: list[str | None] = [None] * len(tokens)
    special = {i for i, token in added.items() if token.special} | set(getattr(tokenizer, "all_special_ids", []))
    chat = {content: role for role, contents in CHAT.items() for content in contents}
    for i in special:
        roles[i] = chat.get(tokens[i], str(tokens[i]))
    for role in reversed(ROLES):  # so that a token of several roles ends with the first
        i = getattr(tokenizer, f"{role}_token_id", None)
        if i is not None and i < len(tokens):
            roles[i] = role
    literal = set(added) | {i for i, role in enumerate(roles) if role is not None}
    if all(isinstance(t, bytes) for i, t in enumerate(tokens) if t is not None and i not in literal):
        text = [t if isinstance(t, bytes) or t is None else _utf8(t) for t in tokens]
        tokens = [t.decode("utf-8", "backslashreplace") if isinstance(t, bytes) else t for t in tokens]
        spellings = {"bytes": text}
    else:
        spellings = {
            name: [None if t is None else _utf8(t) if i in literal else spell(t) for i, t in enumerate(tokens)]
            for name, (spell, marker) in SPELLINGS.items()
            if not marker or any(t and marker in t for t in tokens)
        }
    rows = encode(tokenizer, list(PROBES))

    def right(text: list[bytes | None]) -> int:
        made = (b"".join(text[i] or b"" for i in row) for row in rows)
        return sum(got in (_utf8(p), _utf8(f" {p}"), _utf8(f"{p} ")) for got, p in zip(made, PROBES, strict=True))

    spelling = max(spellings, key=lambda s: right(spellings[s]))  # ties: in the order of SPELLINGS
    text = spellings[spelling]
    lossy = right(text) < len(PROBES)
    marks = [tokens[i] for i in (getattr(tokenizer, "eos_token_id", None), *sorted(special)) if i is not None][:1]
    starts = encode(tokenizer, ["a", *(f"{m}a" for m in marks)])
    begins = [b"".join(text[i] or b"" for i in row if roles[i] is None).startswith(b" a") for row in starts]
    plain = [None if roles[i] is not None else t for i, t in enumerate(text)]
    return Vocabulary(tokens, plain, roles, spelling, lossy, begins[0], begins[-1])
