"""Texts and dialogues become blocks: the target's token ids, which of them count as labels, and the text itself.

Decisions:
- The embedded corpus is the Python installation: three domains that share little (code without docstrings, the
  English of the docstrings and help topics, the Unicode and encoding tables). Nothing is downloaded.
- A document belongs to a split by the hash of the file it comes from, so held-out text never shares a file with
  text that was trained on.
"""

import ast
import glob
import hashlib
import html.entities
import inspect
import json
import os
import sys
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fusion.artifact import checksum
from fusion.config import Corpus, UserError, nearest

DOMAINS = ("code", "docs", "tables")
SPLITS = {"train": 3_000_000, "fusion": 160_000, "held_out": 50_000}
"""Characters of each split, per domain, at most."""

_LIBRARY = Path(os.__file__).parent
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
_DOCUMENT = 3_000


@lru_cache
def _stdlib(domain: str, split: str) -> tuple[str, ...]:
    earlier = {"held_out": [], "fusion": ["held_out"], "train": ["held_out", "fusion"]}[split]
    seen = {document for other in earlier for document in _stdlib(domain, other)}  # files repeat one another
    budget, documents = SPLITS[split], []
    for digest, read in sorted(_files(domain), key=lambda file: file[0]):
        share = int(digest[-8:], 16) / 2**32
        if split != ("held_out" if share < 0.1 else "fusion" if share < 0.25 else "train"):
            continue
        room = min(budget, max(SPLITS[split] // 20, 2 * _DOCUMENT))
        for document in _pieces(read()):
            if len(document) > room:
                break
            if document in seen:
                continue
            seen.add(document)
            documents.append(document)
            room, budget = room - len(document), budget - len(document)
        if budget < _DOCUMENT:
            break
    return tuple(documents)


def stdlib(domain: str, split: str) -> list[str]:
    """Documents of one domain of the embedded corpus: the same list on every call with one Python version.

    `split` is train (to grow models on), fusion (the corpus of the fusion itself) or held_out (measured on). No file
    gives more than a twentieth of a split, or two documents.
    """
    if domain not in DOMAINS:
        raise UserError(f"the embedded corpus has no domain {domain!r}{nearest(domain, list(DOMAINS))}")
    return list(_stdlib(domain, split))


def _files(domain: str) -> list[tuple[str, Callable[[], str]]]:
    """(hash, text when called) of every file of a domain: parsing them all takes ten seconds, few are asked for."""
    if domain == "tables":
        names = sorted(html.entities.html5)
        parts = [(f"unicode {start:x}", partial(_unicode, start)) for start in range(0, 0x20000, 256)]
        parts += [(f"html {n}", partial(_entities, names[n : n + 128])) for n in range(0, len(names), 128)]
        codecs = sorted((_LIBRARY / "encodings").glob("*.py"))
        parts += [(f"codec {path.stem}", partial(_charmap, path)) for path in codecs]
        return [(hashlib.sha256(name.encode()).hexdigest(), read) for name, read in parts]
    paths = (path for path in sorted(_LIBRARY.rglob("*.py")) if not _LEFT_OUT & {*path.relative_to(_LIBRARY).parts})
    sources = [path.read_bytes() for path in paths if not path.name.startswith("_sysconfigdata")]
    extract = _code if domain == "code" else _docstrings
    files = [(hashlib.sha256(source).hexdigest(), partial(extract, source)) for source in sources]
    if domain == "docs":
        from pydoc_data.topics import topics

        files += [(hashlib.sha256(text.encode()).hexdigest(), partial(str, text)) for text in topics.values()]
    return files


def _documented(source: bytes) -> Iterator[tuple[str, ast.Expr]]:
    """(name, docstring node) of everything documented in a Python file, in the order of the file."""
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0)):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield getattr(node, "name", ""), first


def _code(source: bytes) -> str:
    lines = source.decode("utf-8", "replace").splitlines(keepends=True)
    for _, node in _documented(source):
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines)


def _docstrings(source: bytes) -> str:
    texts = ((name, inspect.cleandoc(node.value.value)) for name, node in _documented(source))
    return "\n\n".join(f"{name}\n\n{text}" if name else text for name, text in texts if len(text) > 40)


def _unicode(start: int) -> str:
    """256 code points: the character, its number, name, category, direction and decomposition."""
    rows = []
    for code in range(start, start + 256):
        char = chr(code)
        name = unicodedata.name(char, "")
        if name and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "NUSHU")):
            facts = (unicodedata.category(char), unicodedata.bidirectional(char), unicodedata.decomposition(char))
            rows.append(f"{char}\tU+{code:04X}\t{name}\t{' '.join(fact for fact in facts if fact)}\n")
    return "".join(rows)


def _entities(names: list[str]) -> str:
    entity = html.entities.html5
    return "".join(f"&{n}\t{entity[n]}\t{' '.join(f'U+{ord(c):04X}' for c in entity[n])}\n" for n in names)


def _charmap(path: Path) -> str:
    """The table of a one-byte encoding, as the standard library writes it."""
    _, found, table = path.read_text("utf-8", "replace").partition("\ndecoding_table = (\n")
    return f"{path.stem}\n{table}".partition("### Encoding table")[0] if found else ""


def _pieces(text: str, size: int = _DOCUMENT) -> Iterator[str]:
    """The text in pieces of about `size` characters, cut at blank lines where there are any, else at lines."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if len(piece) + len(line) > size or (not line.strip() and len(piece) > size // 2):
            if len(piece.strip()) > 200:
                yield piece.strip("\n") + "\n"
            piece = ""
        piece += line
    if len(piece.strip()) > 200:
        yield piece.strip("\n") + "\n"


class Block(NamedTuple):
    """What one forward pass sees: `ids` [T] in the target's tokens, `counted` [T] the tokens that are labels.

    `text` is what `ids` tokenise, without the special tokens at its ends: every source tokenises the same text, with
    its own bos in front if `begins` and its own eos behind if `ends`. `spans` are the character ranges of the text
    that count; None: all of it.
    """

    ids: np.ndarray
    counted: np.ndarray
    text: str
    begins: bool = False
    ends: bool = True
    spans: list[tuple[int, int]] | None = None


class Dialogue(NamedTuple):
    """Messages of a dialogue, as chat templates take them: [{role, content}]."""

    messages: list[dict[str, str]]


def tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, begins: bool, ends: bool, spans: list[tuple[int, int]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T], counted [T]) of a block's text on any tokenizer's grid; a token counts if it touches a span."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=spans is not None, verbose=False)
    ids = np.asarray(encoded["input_ids"], np.int64)
    counted = np.ones(len(ids), bool)
    if spans is not None:
        start, end = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        counted = np.any([(start < b) & (end > a) for a, b in spans] or [np.zeros(len(ids), bool)], axis=0)
    if begins and tokenizer.bos_token_id is not None:
        ids, counted = np.r_[tokenizer.bos_token_id, ids], np.r_[False, counted]
    if ends and tokenizer.eos_token_id is not None:
        ids, counted = np.r_[ids, tokenizer.eos_token_id], np.r_[counted, True]
    return ids, counted


def blocks(config: Corpus, tokenizer: PreTrainedTokenizerBase, skipped: Counter[str]) -> Iterator[tuple[str, Block]]:
    """("train" or "held_out", block) of the whole corpus, in its order; why a document gave none is counted.

    Raises:
        UserError: no fast tokenizer, no eos, an unreadable file, a chat template that cannot be masked, no text at all.
    """
    if not tokenizer.is_fast:
        raise UserError("target.tokenizer is a slow one without character offsets: convert it to a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("target.tokenizer has no eos token: set eos_token in its tokenizer_config.json")
    made = 0
    for part, document in documents(config, skipped):
        if isinstance(document, Dialogue):
            pieces = _dialogue_blocks(config, tokenizer, document, skipped)
        else:
            pieces = _text_blocks(config, tokenizer, document)
        for block in pieces:
            made += 1
            yield part, block
    if not made:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "no document"
        raise UserError(f"corpus.path={config.path}: no text to train on ({why})")


def _text_blocks(config: Corpus, tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Block]:
    """Nothing is dropped: the pieces join to the text. Cuts prefer the last line end, then the last space.

    Each piece is tokenised on its own, as the sources will see it, so a cut may cost a token or two of the block.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if len(encoded["input_ids"]) < config.block_size:
        ids = np.r_[np.asarray(encoded["input_ids"], np.int64), tokenizer.eos_token_id]
        yield Block(ids, np.ones(len(ids), bool), text)
        return
    starts, begin, token = [a for a, _ in encoded["offset_mapping"]], 0, 0
    while begin < len(text):
        room = config.block_size
        while True:
            last = token + room >= len(starts) + 1
            end = len(text) if last else _cut(text, begin, starts[min(token + room, len(starts) - 1)])
            ids, counted = tokenise(tokenizer, text[begin:end], False, end == len(text), None)
            if len(ids) <= config.block_size:
                break
            room -= max(1, len(ids) - config.block_size)
            if room < 1:
                raise UserError(f"corpus.block_size={config.block_size} is less than one character: set a larger one")
        yield Block(ids, counted, text[begin:end], ends=end == len(text))
        begin, token = end, bisect_left(starts, end)


def _cut(text: str, begin: int, end: int) -> int:
    """Where to cut text[begin:], at `end` or less: after a line in the last quarter, else before a word."""
    end = max(end, begin + 1)
    line = text.rfind("\n", begin + (end - begin) * 3 // 4, end)
    if line > begin:
        return line + 1
    word = text.rfind(" ", begin + (end - begin) * 3 // 4, end)
    return word if word > begin else end


TEMPLATES = {
    "openchat_3.5": (
        "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + {'assistant': 'Assistant'}.get(m['role'],"
        " m['role'].title()) + ': ' + m['content'] + '<|end_of_turn|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
    )
}
"""Chat templates by name, for tokenizers that come without one."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _dialogue_blocks(
    config: Corpus, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, skipped: Counter[str]
) -> Iterator[Block]:
    """As many exchanges (human, gpt) a block as fit. A system message stays in front of every block."""
    messages = [m for m in dialogue.messages if m["content"].strip()]
    roles = [ROLES.get(m["role"], "") for m in messages]
    if "" in roles:
        skipped["dialogues with an unknown speaker"] += 1
        return
    system = messages[:1] if roles[:1] == ["system"] else []
    first = next((i for i, role in enumerate(roles) if role == "user"), len(roles))
    messages = [{"role": r, "content": m["content"]} for r, m in zip(roles[first:], messages[first:], strict=True)]
    if "assistant" not in roles[first:]:
        skipped["dialogues without a reply"] += 1
        return
    if any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(messages)):
        skipped["dialogues whose turns do not alternate"] += 1
        return
    exchanges = [messages[i : i + 2] for i in range(0, len(messages), 2)]
    while exchanges:
        low, high, block = 0, len(exchanges), None  # the first `low` fit as `block`, no more than `high` may
        trial = high
        while low < high:
            candidate = _render(config, tokenizer, system + [m for pair in exchanges[:trial] for m in pair])
            if len(candidate.ids) <= config.block_size:
                low, block = trial, candidate
            else:
                high = trial - 1
            trial = (low + high + 1) // 2
        if block is None:
            skipped["turns longer than a block"] += 1
        elif block.counted.any():
            yield block
        exchanges = exchanges[max(low, 1) :]


def _render(config: Corpus, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Block:
    """One block of whole exchanges: what counts is each reply from the end of its prompt to its end-of-turn token."""
    template = TEMPLATES.get(config.template) if config.template else None
    if config.template and template is None:
        raise UserError(f"corpus.template={config.template}: unknown{nearest(config.template, list(TEMPLATES))}")
    if not template and not tokenizer.chat_template:
        raise UserError("corpus.template is empty and the target's tokenizer has no chat template: name one")

    def text_of(messages: list[dict[str, str]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    try:
        text, spans = text_of(messages), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, turn = text_of(messages[:i], prompt=True), text_of(messages[: i + 1])
                if not turn.startswith(prompt) or not text.startswith(turn):
                    raise UserError("corpus.template: the chat template rewrites earlier turns, name another one")
                spans.append((len(prompt), len(turn.rstrip("\n"))))
    except TemplateError as error:
        raise UserError(f"corpus.template: the chat template refuses the dialogue ({error})") from error
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    cut = len(tokenizer.bos_token) if begins else 0
    text, spans = text[cut:], [(a - cut, b - cut) for a, b in spans]
    return Block(*tokenise(tokenizer, text, begins, False, spans), text, begins, False, spans)


# --- documents -------------------------------------------------------------------------------------------------------


def documents(config: Corpus, skipped: Counter[str]) -> Iterator[tuple[str, str | Dialogue]]:
    """("train" or "held_out", text or dialogue): held out is a share chosen by the hash of the content.

    The embedded corpus takes its domains in turns and has a held-out split of its own.
    """
    if config.source == "stdlib":
        if config.split not in SPLITS:
            raise UserError(f"corpus.split={config.split}: not a split{nearest(config.split, list(SPLITS))}")
        domains = config.domains or list(DOMAINS)
        turns = zip_longest(*(stdlib(domain, config.split) for domain in domains))
        texts = (text for turn in turns for text in turn if text is not None)
        yield from (("train", text) for text in islice(texts, config.documents or None))
        if config.held_out:
            yield from (("held_out", text) for domain in domains for text in stdlib(domain, "held_out"))
        return
    for row in islice(_rows(config, skipped), config.documents or None):
        document = _dialogue(row) if config.format == "chat" else _text(row, config)
        if not document:
            skipped["empty documents"] += 1
            continue
        content = json.dumps(document).encode()
        share = int(hashlib.sha256(content).hexdigest()[:8], 16) / 2**32
        yield "held_out" if share < config.held_out else "train", document


def fingerprint(config: Corpus) -> dict[str, Any]:
    """What identifies the text: checksums of local files, the name of a hub data set, or the Python version."""
    if config.source == "stdlib":
        return {"python": sys.version.split()[0], "splits": SPLITS, "domains": config.domains, "split": config.split}
    if config.source == "hub" and not Path(config.path).exists():
        return {"path": config.path, "subset": config.subset, "split": config.split}
    return {"files": {path.name: checksum(path) for path in _local(config)}, "split": config.split}


def _local(config: Corpus) -> list[Path]:
    path = Path(config.path).expanduser()
    pattern = "*.jsonl" if config.source == "jsonl" else "*"
    files = sorted(path.rglob(pattern)) if path.is_dir() else [Path(p) for p in sorted(glob.glob(str(path)))]
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UserError(f"corpus.path={config.path}: no such file, or a folder without any {pattern} file")
    return files


def _rows(config: Corpus, skipped: Counter[str]) -> Iterator[Any]:
    """The records of a JSON Lines file, or of any data set that `datasets` can stream."""
    if config.source == "hub":
        import datasets

        try:
            rows = datasets.load_dataset(config.path, config.subset or None, split=config.split, streaming=True)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"corpus.path={config.path}: {str(error).splitlines()[0]}") from error
        yield from rows
        return
    for path in _local(config):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8", "replace")
                if "\ufffd" in text and b"\xef\xbf\xbd" not in line:
                    skipped["lines with invalid UTF-8 (bad bytes replaced)"] += 1
                if text.strip():
                    try:
                        yield json.loads(text)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{path}:{number}: no JSON object on this line ({error})") from error


def _text(row: Any, config: Corpus) -> str:
    text = row.get(config.field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"corpus.field={config.field}: a record has no such text (it has: {found})")
    return text.encode("utf-8", "replace").decode()  # lone surrogates of JSON escapes have no bytes


def _dialogue(row: Any) -> Dialogue | None:
    turns = row.get("conversations", row.get("messages")) if isinstance(row, dict) else None
    if turns is None:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"corpus.format=chat: a record has neither conversations nor messages (it has: {found})")
    try:
        return (
            Dialogue(
                [
                    {
                        "role": turn.get("from") or turn["role"],
                        "content": str(turn["value"] if "value" in turn else turn["content"])
                        .encode("utf-8", "replace")
                        .decode(),
                    }
                    for turn in turns
                ]
            )
            if turns
            else None
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError("corpus.format=chat: a turn needs from and value, or role and content") from error
