"""Bits per byte: the one likelihood that models with different tokenizers share.

A token's cost −log2 p depends on how long the token is; the bits of a whole text divided by its bytes do not. All
bytes of a document are paid for, its first token included: from the start token where the tokenizer adds one itself,
else at log2 V bits (uniform), so that no tokenizer gains from a long first token. The end of text is not scored.

Decisions: documents are scored alone; a window of `window` tokens slides by `stride`, each token is scored once, with
at least `window − stride` tokens before it (Hugging Face's and lm-eval's rolling likelihood). Log-probabilities are
kept per token, so an ensemble of models that share a tokenizer costs no forward pass.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from fusion.artifact import fingerprint
from fusion.config import Evaluation, UserError
from fusion.evaluation.cells import Outcome, Task, spread


class Score(NamedTuple):
    """Figures per document: bits paid, UTF-8 bytes, tokens, how many of them unknown (a tokenizer that loses text pays
    too little for it); `logprobs[d]` float32 [T] natural log per token."""

    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    unknown: np.ndarray
    logprobs: list[np.ndarray]

    @property
    def bits_per_byte(self) -> float:
        return float(self.bits.sum() / max(self.bytes.sum(), 1))

    @property
    def perplexity(self) -> float:
        """exp of the mean cost of a token in nats: comparable between models that share a tokenizer only."""
        return math.exp(self.bits.sum() * math.log(2) / max(self.tokens.sum(), 1))


class Window(NamedTuple):
    """Tokens [begin, end) of document `document` go in; the targets [first, end] of it are scored."""

    document: int
    begin: int
    end: int
    first: int


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    *,
    window: int = 0,
    stride: int = 0,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Score:
    """Score `texts` under a causal LM of transformers.

    Args:
        window: tokens of context, 0 for the model's own (at most 2048); `stride`: tokens scored per window, 0 for half.
    """
    window, stride = spans(model.config, window, stride)
    documents = [encode(tokenizer, text) for text in texts]
    logprobs = token_logprobs(
        model, [ids for ids, _ in documents], window=window, stride=stride, batch_size=batch_size, device=device,
        progress=progress,
    )  # fmt: skip
    uniform = np.float32(-math.log(model.config.get_text_config().vocab_size))
    whole = [
        found if started else np.concatenate([[uniform], found]).astype(np.float32)
        for (_, started), found in zip(documents, logprobs, strict=True)
    ]
    unknown = [int((ids == tokenizer.unk_token_id).sum()) for ids, _ in documents]
    return score(whole, [len(text.encode("utf-8", "replace")) for text in texts], unknown)


def score(logprobs: list[np.ndarray], sizes: list[int], unknown: list[int]) -> Score:
    """Figures per document from the cost of its tokens, its UTF-8 bytes and its unknown tokens."""
    bits = [-x.sum(dtype=np.float64) / math.log(2) for x in logprobs]
    return Score(np.array(bits), np.array(sizes), np.array([len(x) for x in logprobs]), np.array(unknown), logprobs)


def ensemble(members: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Log-probability of every gold token when the members' probabilities are averaged: log mean_m p_m.

    `members[m][d]` float32 [T]; the members must share a tokenizer (same T everywhere).
    """
    if any([len(x) for x in one] != [len(x) for x in members[0]] for one in members):
        raise UserError(
            "evaluation.ensemble: its models split the texts into different tokens; give models of one tokenizer"
        )
    stacked = [np.stack([one[d] for one in members]).astype(np.float64) for d in range(len(members[0]))]
    return [(np.logaddexp.reduce(x, axis=0) - math.log(len(members))).astype(np.float32) for x in stacked]


def spans(config: Any, window: int, stride: int) -> tuple[int, int]:
    """(window, stride) with 0 resolved; UserError where they do not fit the model."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    window = window or min(longest, 2048)
    if window > longest:
        raise UserError(f"evaluation.window={window}: the model's context is {longest} tokens")
    stride = stride or max(window // 2, 1)
    if stride > window:
        raise UserError(f"evaluation.stride={stride}: larger than the window of {window} tokens, set it lower")
    return window, stride


def windows(document: int, length: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over a document of `length` tokens, its start token counted; every target 1 … length−1 is in one."""
    done = 0
    while done < length - 1:
        end = min(length - 1, window if done == 0 else done + stride)
        yield Window(document, max(0, end - window), end, done + 1)
        done = end


def encode(tokenizer: Any, text: str) -> tuple[np.ndarray, bool]:
    """Token ids of a text and whether they begin with a start token the tokenizer adds by itself."""
    text = text.encode("utf-8", "replace").decode()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(text, verbose=False)["input_ids"]
    started = tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id] and ids[:1] != whole[:1]
    return np.array([tokenizer.bos_token_id, *ids] if started else ids, dtype=np.int64), started


@torch.inference_mode()
def token_logprobs(
    model: Any,
    documents: list[np.ndarray],
    *,
    window: int,
    stride: int,
    batch_size: int,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[np.ndarray]:
    """log p(token t | the tokens before it in its window) for t ≥ 1 of every document: float32 [length − 1] each."""
    device = device or next(model.parameters()).device
    found = [np.full(max(len(ids) - 1, 0), np.nan, np.float32) for ids in documents]
    plan = [w for d, ids in enumerate(documents) for w in windows(d, len(ids), window, stride)]
    plan.sort(key=lambda w: w.begin - w.end)  # the longest first: what does not fit into memory fails at once
    training = model.training
    model.eval()
    for batch in bar([plan[i : i + batch_size] for i in range(0, len(plan), batch_size)], "bits per byte", progress):
        ids_BT = torch.zeros(len(batch), batch[0].end - batch[0].begin, dtype=torch.long)
        gold_BT, mask_BT = ids_BT.clone(), ids_BT.clone()
        for row, w in enumerate(batch):
            span = torch.from_numpy(documents[w.document][w.begin : w.end + 1])
            ids_BT[row, : len(span) - 1], gold_BT[row, : len(span) - 1] = span[:-1], span[1:]
            mask_BT[row, : len(span) - 1] = 1
        logits_BTV = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
        gold_BT = gold_BT.to(device)
        for row, w in enumerate(batch):  # a row at a time: float32 copies of one row's logits, not of the batch's
            first, last = w.first - 1 - w.begin, w.end - w.begin
            logits_TV, gold_T = logits_BTV[row, first:last].float(), gold_BT[row, first:last]
            values_T = logits_TV.gather(-1, gold_T[:, None])[:, 0] - logits_TV.logsumexp(-1)
            found[w.document][w.first - 1 : w.end] = values_T.cpu().numpy()
    model.train(training)
    if any(np.isnan(x).any() for x in found):
        raise UserError("models: one gives NaN probabilities; its weights are damaged or its dtype is too narrow")
    return found


def bar(items: Iterable, what: str, show: bool = True, total: int | None = None) -> Iterator:
    """`items` under a progress bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        yield from progress.track(items, total=total, description=what)


# --- the stage's view: one task a file --------------------------------------------------------------------------------

METRICS = {
    "bits_per_byte": {"formula": "ratio", "higher_is_better": False},
    "token_perplexity": {"formula": "exp", "higher_is_better": False},
}


def read_texts(path: Path, field: str, limit: int = 0) -> list[str]:
    """The texts of a jsonl file (or a .txt file: one text), `limit` of them; texts of zero bytes are left out.

    Raises:
        UserError: naming the file, and the line that is no JSON object with the field.
    """
    where = f"evaluation.texts: {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    texts: list[str] = []
    if path.suffix == ".txt":
        texts = [path.read_text(errors="replace")]
    else:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where}: line {number} is no JSON ({error})") from error
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    known = f", it has {', '.join(row)}" if isinstance(row, dict) else ""
                    raise UserError(f"{where}: line {number} has no text in {field!r}{known}: set evaluation.field")
                texts.append(row[field])
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{where}: no text in it; give a file with at least one")
    return [texts[i] for i in spread(len(texts), limit)]


def plan(config: Evaluation) -> tuple[list[Task], list[str]]:
    """One task per file of `evaluation.texts`."""
    if not config.texts:
        raise UserError("evaluation.texts is empty: give files, e.g. 'evaluation.texts=[file.jsonl]'")
    return [_task(Path(path), name, config) for path, name in zip(config.texts, domains(config.texts), strict=True)], []


def domains(files: list[str]) -> list[str]:
    """A domain is named by its file; by its folder too where two files have one name."""
    stems = [Path(f).stem for f in files]
    names = stems if len(set(stems)) == len(stems) else [str(Path(f).with_suffix("")) for f in files]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"evaluation.texts: {twice} is given twice; give each file once")
    return names


def _task(path: Path, name: str, config: Evaluation) -> Task:
    texts = read_texts(path, config.field, config.limit)

    def run(model: Any, tokenizer: Any, folder: Path) -> Outcome:
        window, stride = spans(model.config, config.window, config.stride)
        found = bits_per_byte(model, tokenizer, texts, window=window, stride=stride, batch_size=config.batch_size)
        facts = {"window": window, "stride": stride, "bytes": int(found.bytes.sum()), "tokens": int(found.tokens.sum())}
        facts |= {"unknown_tokens": int(found.unknown.sum()), "vocabulary": fingerprint(tokenizer.get_vocab())}
        return Outcome(records(found), METRICS, facts)

    recipe = {"texts": fingerprint(texts), "window": config.window, "stride": config.stride}
    return Task(name, recipe, run)


def records(found: Score) -> list[dict[str, Any]]:
    """A row per document for the parquet file."""
    return [
        {
            "example": str(d),
            "metrics": {"bits_per_byte": [bits, size], "token_perplexity": [bits * math.log(2), tokens]},
            "logprobs": logprobs,
        }
        for d, (bits, size, tokens, logprobs) in enumerate(
            zip(found.bits.tolist(), found.bytes.tolist(), found.tokens.tolist(), found.logprobs, strict=True)
        )
    ]
