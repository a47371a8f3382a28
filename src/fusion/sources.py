"""Running the sources: text blocks in, aligned top-K distributions on disk out (FuseLLM, arXiv 2401.10491, §3.1).

Decisions:
- Logits exist for `chunk_tokens` positions at a time. The model's body runs on a batch, then the model's own head
  (soft-caps and scales included) runs on chunks of the hidden states that count.
- A shard is the unit of work: its batches depend on nothing but its blocks, so any process may make it and the result
  is the same to the bit.
- A text longer than a source's context is read in windows that overlap by half; every position is predicted.
- Alignment is a second artifact, so another alignment never runs a source model again.
"""

import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fusion import corpus
from fusion.artifact import artifact, fingerprint, must_build, read_manifest
from fusion.checkpoint import fingerprint as weights_of
from fusion.checkpoint import load_config, load_model, load_tokenizer
from fusion.config import LLM, Corpus, Externalize, Run, UserError
from fusion.store import Store, dense, fill, reopen_damaged, shard_name, write_shard


class Precomputed(NamedTuple):
    """The folders that training streams from; `distributions` by name, the target's own first."""

    tokens: Path
    distributions: dict[str, Path]


def precompute(config: Run, target: Path | str, sources: dict[str, Path | str]) -> Precomputed:
    """Tokens, and the distribution of every source on the target's grid; what is there already is found again.

    `target` and `sources` are resolved model folders or hub names; their other options come from `config`. The
    target's own distribution is called "target" and stands first, if `config.fuse_target`.

    Raises:
        UserError: see `corpus.blocks`, `externalize`.
    """
    if "target" in sources:
        raise UserError("sources.target: the name is taken by the target's own distribution, choose another one")
    pivot = replace(config.target, path=str(target))
    models = {"target": pivot} if config.fuse_target else {}
    models |= {name: replace(config.sources.get(name, LLM()), path=str(path)) for name, path in sources.items()}
    tokens = tokenize(config, pivot)
    distributions = {}
    for name, llm in models.items():
        raw = externalize(config, name, llm, tokens)
        distributions[name] = raw if name == "target" else align(config, name, llm, pivot, tokens, raw)
        _report(name, distributions[name])
    return Precomputed(tokens, distributions)


def _rank() -> tuple[int, int]:
    """(rank, ranks) of this launch, under torchrun or Slurm."""
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and ranks in os.environ:
            return int(os.environ[rank]), int(os.environ[ranks])
    return 0, 1


def _tokenizer_of(llm: LLM, chat: bool = False) -> tuple[PreTrainedTokenizerBase, str]:
    """(tokenizer, hash of all that decides which ids a text gets)."""
    tokenizer = load_tokenizer(llm)
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    template = tokenizer.chat_template if chat else None
    return tokenizer, fingerprint([backend, tokenizer.bos_token_id, tokenizer.eos_token_id, template])


def _narrow(width: int) -> type:
    return np.uint16 if width <= 1 << 16 else np.uint32


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokenize(config: Run, target: LLM) -> Path:
    """The corpus as blocks of the target's tokens, with their text."""
    options = config.corpus
    tokenizer, identity = _tokenizer_of(target, options.format == "chat")
    model = load_config(target).get_text_config()
    context = getattr(model, "max_position_embeddings", None)
    if context and options.block_size > context:
        raise UserError(
            f"corpus.block_size={options.block_size} is longer than the target's context: set it to {context}"
        )
    where = {"source", "path", "subset", "split", "domains"}
    recipe = {
        "corpus": corpus.fingerprint(options) | {k: v for k, v in asdict(options).items() if k not in where},
        "tokenizer": identity,
        "shard_blocks": config.externalize.shard_blocks,
    }
    root = Path(config.artifacts)
    reopen_damaged(root / "tokens" / fingerprint(recipe))
    build = lambda folder: _write_tokens(folder, options, tokenizer, model.vocab_size, recipe["shard_blocks"])  # noqa: E731
    return artifact(root, "tokens", recipe, build)


def _write_tokens(
    folder: Path, options: Corpus, tokenizer: PreTrainedTokenizerBase, width: int, shard_blocks: int
) -> dict[str, Any]:
    for leftover in folder.glob(".*"):  # of a process that was killed while writing
        leftover.unlink()
    skipped: Counter[str] = Counter()
    pending: dict[str, list[corpus.Block]] = {"train": [], "held_out": []}
    written, totals = Counter(), Counter()

    def flush(part: str) -> None:
        path = folder / shard_name(written[part], part)
        columns = _token_columns(pending[part], _narrow(width))
        facts = {"blocks": len(pending[part]), "tokens": len(columns["ids"]), "counted": int(columns["counted"].sum())}
        if not path.exists():
            write_shard(path, columns, facts)
        totals.update({f"{part}/{k}": v for k, v in facts.items()})
        written[part] += 1
        pending[part].clear()

    for part, block in corpus.blocks(options, tokenizer, skipped):
        if block.ids.max() >= width:
            raise UserError(
                f"target.tokenizer gives token {block.ids.max()}, the target has only {width}: resize its embedding"
            )
        pending[part].append(block)
        if len(pending[part]) == shard_blocks:
            flush(part)
    for part in [part for part, blocks in pending.items() if blocks]:
        flush(part)
    if not totals["train/blocks"]:
        raise UserError("corpus.held_out leaves nothing to train on: set corpus.held_out=0 or use more text")
    named = {k.removeprefix("train/").replace("/", "_"): v for k, v in sorted(totals.items())}
    return named | {"skipped": dict(sorted(skipped.items()))}


def _token_columns(blocks: list[corpus.Block], dtype: type) -> dict[str, np.ndarray]:
    texts = [block.text.encode() for block in blocks]
    spans = [np.asarray(block.spans or [], np.int32).reshape(-1, 2) for block in blocks]
    counted_text = [
        t if b.spans is None else "".join(b.text[i:j] for i, j in b.spans).encode()
        for t, b in zip(texts, blocks, strict=True)
    ]
    return {
        "ids": np.concatenate([block.ids for block in blocks]).astype(dtype),
        "counted": np.concatenate([block.counted for block in blocks]),
        "offsets": _offsets([len(block.ids) for block in blocks]),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_offsets": _offsets([len(text) for text in texts]),
        "bytes": np.array([len(text) for text in counted_text], np.int32),
        "flags": np.array([b.begins + 2 * b.ends + 4 * (b.spans is not None) for b in blocks], np.uint8),
        "spans": np.concatenate(spans),
        "span_offsets": _offsets([len(s) for s in spans]),
    }


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _tokenised(shard: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerBase) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids [T], counted [T]) of every block of a tokens shard, on the grid of `tokenizer`."""
    rows, text, at, span_at = [], shard["text"].tobytes(), shard["text_offsets"], shard["span_offsets"]
    for b, flags in enumerate(shard["flags"]):
        spans = shard["spans"][span_at[b] : span_at[b + 1]].tolist() if flags & 4 else None
        block = text[at[b] : at[b + 1]].decode()
        rows.append(corpus.tokenise(tokenizer, block, bool(flags & 1), bool(flags & 2), spans))
    return rows


# --- source models ---------------------------------------------------------------------------------------------------


class Reader:
    """A causal LM cut where its logits begin, so that they can be made for a chunk of positions at a time.

    `logits` runs the model's own forward with its body replaced by given hidden states: whatever the model does to its
    logits (soft-cap, scale, bias) is done. Checked against the whole model once; a model that cannot be cut this way
    makes all logits of a batch at once.
    """

    def __init__(self, llm: LLM, accelerator: str):
        self.model = load_model(llm)
        if not llm.device_map:
            cuda = torch.cuda.is_available() and accelerator in ("auto", "gpu")
            self.model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        self.device = self.model.get_input_embeddings().weight.device
        self.rows = self.model.get_input_embeddings().num_embeddings
        probe = torch.arange(min(8, self.rows), device=self.device)[None]
        with torch.inference_mode():
            whole = self.model(input_ids=probe, use_cache=False).logits[0].float()
            self.width, self.cut = whole.shape[-1], False
            try:
                parts = self._head(self._body(probe, torch.ones_like(probe))[0]).float()
                self.cut = torch.allclose(parts, whole, atol=1e-2, rtol=1e-2)
            except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError):
                pass

    def _body(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)[0]

    def _head(self, hidden_ND: Tensor) -> Tensor:
        body = self.model.base_model
        before = body.__dict__.get("forward")
        body.forward = lambda *_, **__: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_ND[None])
        try:
            dummy = torch.zeros(1, len(hidden_ND), dtype=torch.long, device=self.device)
            return self.model(input_ids=dummy, use_cache=False).logits[0]
        finally:
            del body.forward
            if before is not None:
                body.forward = before

    def logits(self, ids_BT: Tensor, mask_BT: Tensor, wanted_BT: Tensor, chunk: int) -> Iterator[Tensor]:
        """float32 logits [≤ chunk, V] of the wanted positions, row by row."""
        if self.cut:
            hidden_ND = self._body(ids_BT, mask_BT)[wanted_BT.to(self.device)]
            yield from (self._head(hidden_CD).float() for hidden_CD in hidden_ND.split(chunk))
        else:
            logits = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            yield from (logits_CV.float() for logits_CV in logits[wanted_BT.to(logits.device)].split(chunk))


def top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids) [N, k] of the largest logits, in descending order.

    The k largest all lie in the k groups with the largest maxima, so one pass over V and a small search are enough:
    several times faster than torch.topk over a large vocabulary.
    """
    n, v = logits_NV.shape
    group = 64
    groups = v // group
    if groups < 4 * k:
        return logits_NV.topk(k, sorted=True)
    maxima_NG = logits_NV[:, : groups * group].unflatten(1, (groups, group)).amax(-1)
    chosen_NK = maxima_NG.topk(k, sorted=False).indices.sort(-1).values
    inside = torch.arange(group, device=logits_NV.device)
    candidates = (chosen_NK[..., None] * group + inside).flatten(1)
    rest = torch.arange(groups * group, v, device=logits_NV.device).expand(n, -1)
    candidates = torch.cat([candidates, rest], 1)
    values_NK, at_NK = logits_NV.gather(1, candidates).topk(k, sorted=True)
    return values_NK, candidates.gather(1, at_NK)


class Kept(NamedTuple):
    """What is kept of N positions: ids, log-probabilities, entries used [N, K], mass and gold cross-entropy [N]."""

    ids: np.ndarray
    logprobs: np.ndarray
    used: np.ndarray
    mass: np.ndarray
    ce: np.ndarray


def keep(logits_NV: Tensor, gold_N: Tensor, options: Externalize, uniform_NK: Tensor | None = None) -> Kept:
    """The entries to store, with log-probabilities under the full vocabulary, and −log p of the gold token.

    `logits_NV` is used up: its memory holds the exponentials.

    `keep: sample` draws K times from p by inverse transform of `uniform_NK` and gives each distinct id the log of
    (times drawn / K): an unbiased estimate of p, where the top K is not (random-sampling KD, arXiv 2503.16870).
    """
    gold_logit_N = logits_NV.gather(1, gold_N[:, None])[:, 0]
    if options.keep == "sample":
        peak_N = logits_NV.amax(-1)
        cdf_NV = logits_NV.sub_(peak_N[:, None]).exp_().cumsum(-1)
        sum_N = cdf_NV[:, -1]
        ids_NK = torch.searchsorted(cdf_NV, uniform_NK * sum_N[:, None], right=True).clamp_(max=cdf_NV.shape[1] - 1)
        ids_NK = ids_NK.sort(-1).values
        times_NK = (ids_NK[:, :, None] == ids_NK[:, None, :]).sum(-1)
        used_NK = torch.ones_like(ids_NK, dtype=torch.bool)
        used_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
        mass_N = (logits_NV.gather(1, ids_NK) / sum_N[:, None]).masked_fill(~used_NK, 0).sum(-1)
        order = times_NK.masked_fill(~used_NK, 0).sort(dim=-1, descending=True, stable=True).indices
        logprobs_NK = (times_NK / ids_NK.shape[1]).log()
        ids_NK, logprobs_NK, used_NK = (x.gather(1, order) for x in (ids_NK, logprobs_NK, used_NK))
        lse_N = peak_N + sum_N.log()
    else:
        values_NK, ids_NK = top_k(logits_NV, min(options.top_k, logits_NV.shape[1]))
        peak_N = values_NK[:, 0]
        lse_N = peak_N + logits_NV.sub_(peak_N[:, None]).exp_().sum(-1).log()
        logprobs_NK = values_NK - lse_N[:, None]
        p_NK = logprobs_NK.exp()
        used_NK = torch.ones_like(ids_NK, dtype=torch.bool)
        if options.top_p < 1:
            used_NK = p_NK.cumsum(-1) - p_NK < options.top_p
        mass_N = p_NK.masked_fill(~used_NK, 0).sum(-1)
    ce_N = lse_N - gold_logit_N
    return Kept(*(x.cpu().numpy() for x in (ids_NK, logprobs_NK, used_NK, mass_N, ce_N)))


def batches(lengths: list[int], tokens: int, waste: float = 0.05) -> list[list[int]]:
    """Rows by length in batches of at most `tokens` padded tokens, with less than `waste` of them padding."""
    made: list[list[int]] = []
    filled = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        padded = lengths[made[-1][0]] * (len(made[-1]) + 1) if made else 0
        if made and padded <= tokens and filled + lengths[row] > (1 - waste) * padded:
            made[-1].append(row)
            filled += lengths[row]
        else:
            made.append([row])
            filled = lengths[row]
    return made


def windows(length: int, context: int | None) -> list[tuple[int, int, int]]:
    """(start, end, first position to keep) of the windows that read a row: one, or overlapping by half a context."""
    if not context or length <= context:
        return [(0, length, 0)]
    half = context // 2
    starts = range(0, length - half, half)
    return [(s, min(s + context, length), s + half if s else 0) for s in starts]


def externalize(config: Run, name: str, llm: LLM, tokens: Path) -> Path:
    """The top-K of one source over all blocks, on its own token grid. The model is loaded only if a shard is missing.

    Raises:
        UserError: no tokenizer, a tokenizer with more tokens than the model, NaN, no room on the disk.
    """
    options = config.externalize
    tokenizer, identity = _tokenizer_of(llm)
    store = Store(tokens)
    unused = {"batch_tokens", "chunk_tokens", "shard_blocks", "workers"} | (
        set() if options.keep == "sample" else {"seed"}
    )
    recipe = {
        "tokens": store.manifest["recipe"],
        "model": weights_of(llm) | {"dtype": llm.dtype, "attention": llm.attention},
        "tokenizer": identity,
        "externalize": {k: v for k, v in asdict(options).items() if k not in unused},
    }
    shards = store.shards("train")
    session = _Session(llm, config.trainer.accelerator)

    with _progress(config, name, "source", store.manifest["tokens"]) as advance:

        def make(path: Path) -> None:
            number = int(path.stem)
            shard = store.shard(shards[number])
            try:
                columns, facts = _externalized(session, shard, tokenizer, options, number)
            except _Unusable as error:
                raise UserError(f"sources.{name}: {error}") from error
            write_shard(path, columns, facts)
            advance(len(shard["ids"]))

        def summary(totals: dict[str, float]) -> dict[str, Any]:
            counted = max(1, totals["counted"])
            figures = {
                "cross_entropy": totals["ce"] / counted,
                "kept_mass": totals["mass"] / max(1, totals["positions"]),
            }
            width = int(totals["width"] / len(names))
            shape = {"k": options.top_k, "width": width, "dtype": np.dtype(_narrow(width)).name, "coverage": 1.0}
            return {k: v for k, v in totals.items() if k not in ("ce", "mass", "width")} | figures | shape

        names = [shard_name(i) for i in range(len(shards))]
        rank, ranks = _rank()
        folder = fill(Path(config.artifacts), "source", recipe, names, make, summary, rank * len(names) // ranks)
    session.close()
    return folder


class _Unusable(ValueError):
    """A source that cannot be read; the message says why and what to do."""


class _Session:
    """A source model that is loaded when it is first needed."""

    def __init__(self, llm: LLM, accelerator: str):
        self.llm, self.accelerator = llm, accelerator

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.llm, self.accelerator)

    def close(self) -> None:
        self.__dict__.pop("reader", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.inference_mode()
def _externalized(
    session: _Session,
    shard: dict[str, np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    options: Externalize,
    number: int,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Columns and facts of one shard of a source store."""
    reader, rows = session.reader, _tokenised(shard, tokenizer)
    if (largest := max(int(ids.max(initial=0)) for ids, _ in rows)) >= reader.rows:
        raise _Unusable(
            f"its tokenizer gives token {largest}, its model has only {reader.rows}: set the right tokenizer"
        )
    offsets = _offsets([max(0, len(ids) - 1) for ids, _ in rows])
    positions, k = int(offsets[-1]), options.top_k
    out = Kept(
        np.zeros((positions, k), _narrow(reader.width)),
        np.full((positions, k), -np.inf, np.float16),
        np.zeros((positions, k), bool),
        np.zeros(positions, np.float32),
        np.zeros(positions, np.float32),
    )
    context = getattr(reader.model.config.get_text_config(), "max_position_embeddings", None)
    pieces = [(b, *window) for b, (ids, _) in enumerate(rows) for window in windows(max(0, len(ids) - 1), context)]
    for batch in batches([end - start for _, start, end, _ in pieces], options.batch_tokens):
        longest = max(pieces[i][2] - pieces[i][1] for i in batch)
        if not longest:
            continue
        ids_BT, gold_BT, where_BT = (np.zeros((len(batch), longest), np.int64) for _ in range(3))
        mask_BT, wanted_BT = (np.zeros((len(batch), longest), bool) for _ in range(2))
        for row, (b, start, end, first) in enumerate(pieces[i] for i in batch):
            ids_BT[row, : end - start], gold_BT[row, : end - start] = (
                rows[b][0][start:end],
                rows[b][0][start + 1 : end + 1],
            )
            where_BT[row, : end - start] = offsets[b] + np.arange(start, end)
            mask_BT[row, : end - start], wanted_BT[row, first - start if first else 0 : end - start] = True, True
        ids, mask, wanted = (
            torch.from_numpy(x).to(reader.device) for x in (ids_BT, mask_BT.astype(np.int64), wanted_BT)
        )
        golds, wheres = torch.from_numpy(gold_BT[wanted_BT]), where_BT[wanted_BT]
        uniforms = _uniforms(options, number, offsets, wheres, k) if options.keep == "sample" else None
        done = 0
        for logits in reader.logits(ids, mask, wanted, options.chunk_tokens):
            part = slice(done, done + len(logits))
            done += len(logits)
            uniform = None if uniforms is None else torch.from_numpy(uniforms[part]).to(logits)
            kept = keep(logits, golds[part].to(logits.device), options, uniform)
            rows_at, entries = wheres[part], slice(0, kept.ids.shape[1])
            out.mass[rows_at], out.ce[rows_at] = kept.mass, kept.ce
            for column, values in zip(out[:3], kept[:3], strict=True):
                column[rows_at, entries] = values
    if np.isnan(out.ce).any():
        raise _Unusable("its logits are NaN: its weights are damaged, or its dtype overflows (set dtype=float32)")
    counted = np.concatenate([c[1:] for _, c in rows])
    columns = _entries(out.ids, out.logprobs, out.used, options.keep == "sample" or options.top_p < 1, offsets)
    columns |= {"ce": out.ce.astype(np.float16), "block_ce": _block_means(out.ce, counted, offsets), "offsets": offsets}
    if "counts" in columns:
        columns["mass"] = out.mass
    facts = {
        "positions": positions,
        "counted": int(counted.sum()),
        "ce": float(out.ce[counted].sum(dtype=np.float64)),
        "mass": float(out.mass.sum(dtype=np.float64)),
        "entries": int(out.used.sum()),
        "windows": len(pieces) - len(rows),
        "width": reader.width,
    }
    return columns, facts


def _uniforms(options: Externalize, number: int, offsets: np.ndarray, wheres: np.ndarray, k: int) -> np.ndarray:
    """[N, k] in [0, 1): the numbers of a position depend on seed, shard and position, not on how it was batched."""
    generator = np.random.Generator(np.random.Philox(key=[options.seed, number]))
    return generator.random((int(offsets[-1]), k), np.float32)[wheres]


def _entries(
    ids_NK: np.ndarray, logprobs_NK: np.ndarray, used_NK: np.ndarray, ragged: bool, offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """The columns that hold the entries: [N, K], or flat with a count per position and a start per block."""
    if not ragged:
        return {"ids": ids_NK, "logprobs": logprobs_NK.astype(np.float16)}
    counts = used_NK.sum(1)
    return {
        "ids": ids_NK[used_NK],
        "logprobs": logprobs_NK[used_NK].astype(np.float16),
        "counts": counts.astype(np.uint8 if ids_NK.shape[1] < 256 else np.uint16),
        "starts": _offsets(counts.tolist())[offsets],
    }


def _block_means(ce: np.ndarray, counted: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[blocks] float32: mean over the counted positions of a block, NaN if it has none."""
    ce = np.where(counted, ce, 0)
    sums, n = (np.concatenate([[0], np.cumsum(x, dtype=np.float64)])[offsets] for x in (ce, counted))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.diff(sums) / np.diff(n)).astype(np.float32)


# --- alignment -------------------------------------------------------------------------------------------------------


def align(config: Run, name: str, llm: LLM, target: LLM, tokens: Path, raw: Path) -> Path:
    """A source's distributions on the target's grid, shard by shard, in as many processes as the work is worth.

    criterion=ms needs the counts of the whole corpus first: one more pass, an artifact of its own.
    """
    kinds = ["statistics", "aligned"] if config.alignment.criterion == "ms" else ["aligned"]
    count = Store(tokens).manifest["tokens"]
    folder = Path()
    for kind in kinds:
        counts = folder if kind == "aligned" and len(kinds) > 1 else None
        job = _Alignment(config, name, llm, target, tokens, raw, kind, counts)
        if not job.done():
            cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            wanted = config.externalize.workers or min(cores, 1 + count // 1_000_000)
            helpers = min(wanted, len(job.names)) - 1
            spawn = multiprocessing.get_context("spawn")
            processes = [spawn.Process(target=job.help, args=(i + 1, helpers + 1), daemon=True) for i in range(helpers)]
            for process in processes:
                process.start()
            with _progress(config, name, kind, count) as advance:
                folder = job.run(advance)
            for process in processes:
                process.join()
        else:
            folder = job.run(lambda tokens: None)
    return folder


class _Alignment:
    """One pass over the shards of a source: mapping statistics, or aligned distributions. Picklable, for helpers."""

    def __init__(
        self, config: Run, name: str, llm: LLM, target: LLM, tokens: Path, raw: Path, kind: str, counts: Path | None
    ):
        self.config, self.name, self.llm, self.target, self.kind, self.counts = config, name, llm, target, kind, counts
        self.tokens, self.raw = Store(tokens), Store(raw)
        made = self.raw.manifest["recipe"]
        if kind == "statistics":  # of the two tokenizers and the text, whatever model ran
            self.recipe = {k: made[k] for k in ("tokens", "tokenizer")} | {"normalise": config.alignment.normalise}
        else:
            self.recipe = {"source": made, "alignment": asdict(config.alignment)}
        self.names = [shard_name(i) for i in range(len(self.tokens.shards("train")))]

    def done(self) -> bool:
        reopen_damaged(folder := Path(self.config.artifacts) / self.kind / fingerprint(self.recipe))
        return not must_build(folder)

    def help(self, helper: int, helpers: int) -> None:
        """A helper process; what goes wrong here goes wrong in the main process too, which reports it."""
        torch.set_num_threads(1)
        with suppress(UserError):
            self.run(lambda tokens: None, helper / helpers)

    def run(self, advance: Callable[[int], None], offset: float = 0.0) -> Path:
        rank, ranks = _rank()
        first = int(len(self.names) * (rank + offset) / ranks)

        def make(path: Path) -> None:
            number = int(path.stem)
            shard = self.tokens.shard(self.tokens.shards("train")[number])
            columns, facts = self.count(shard) if self.kind == "statistics" else self.project(shard, path.name)
            write_shard(path, columns, facts)
            advance(len(shard["ids"]))

        def summary(totals: dict[str, float]) -> dict[str, Any]:
            figures = {k: self.raw.manifest[k] for k in ("cross_entropy", "kept_mass") if k in self.raw.manifest}
            counted = max(1, totals.get("counted", 0))
            if "aligned" in totals:
                figures |= {"coverage": totals["aligned"] / counted, "k": self.raw.manifest["k"]}
                figures["dtype"] = np.dtype(_narrow(self.tools[2])).name
            return totals | figures

        return fill(Path(self.config.artifacts), self.kind, self.recipe, self.names, make, summary, first)

    @cached_property
    def tools(self) -> tuple[PreTrainedTokenizerBase, Any, int]:
        """(source tokenizer, aligner, rows of the target's head), made where they are needed."""
        from fusion.alignment import Aligner, Statistics

        source, target = load_tokenizer(self.llm), load_tokenizer(self.target)
        width = load_config(self.target).get_text_config().vocab_size
        statistics = None
        if self.counts is not None:
            store = Store(self.counts)
            shards = [store.shard(name) for name in store.shards()]
            statistics = sum((Statistics(s["pairs"], s["counts"]) for s in shards), start=Statistics())
        cache = Path(self.config.artifacts) / "vocabulary"
        widths = {"source_width": self.raw.manifest["width"], "target_width": width}
        aligner = Aligner(source, target, self.config.alignment, statistics=statistics, cache=cache, **widths)
        return source, aligner, width

    def count(self, shard: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Columns and facts of one shard of mapping statistics: how often which token met which."""
        from fusion.alignment import Statistics

        tokenizer, aligner, _ = self.tools
        aligner.statistics, at = Statistics(), shard["offsets"]
        for b, (source_ids, _) in enumerate(_tokenised(shard, tokenizer)):
            aligner.count(source_ids, shard["ids"][at[b] : at[b + 1]].astype(np.int64))
        source_N, target_N, counts_N = aligner.statistics.rows()
        pairs_N = source_N.astype(np.uint64) << np.uint64(32) | target_N.astype(np.uint64)
        return {"pairs": pairs_N, "counts": counts_N}, {"tokens": len(shard["ids"])}

    def project(self, shard: dict[str, np.ndarray], name: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Columns and facts of one shard of an aligned store."""
        tokenizer, aligner, width = self.tools
        raw, at = self.raw.shard(name), shard["offsets"]
        offsets = _offsets(np.maximum(np.diff(at) - 1, 0).tolist())
        positions, k = int(offsets[-1]), self.raw.manifest["k"]
        ids_NK, logprobs_NK = np.zeros((positions, k), _narrow(width)), np.full((positions, k), -np.inf, np.float16)
        ce_N, kinds = np.full(positions, np.nan, np.float16), np.zeros(4, np.int64)
        for b, (source_ids, _) in enumerate(_tokenised(shard, tokenizer)):
            target_ids = shard["ids"][at[b] : at[b + 1]].astype(np.int64)
            begin, end = raw["offsets"][b : b + 2]
            if end - begin != max(0, len(source_ids) - 1):
                raise UserError(f"{self.raw.folder / name}: made with another tokenizer: delete the folder")
            n, rows = len(target_ids) - 1, slice(offsets[b], offsets[b + 1])
            if n < 1 or not len(source_ids):
                continue
            given_ids, given = dense(raw, begin, end, b, k)
            given_ids, given = (
                np.pad(given_ids, ((0, 1), (0, 0))),
                np.pad(given, ((0, 1), (0, 0)), constant_values=-np.inf),
            )
            found = aligner.positions(source_ids, target_ids)
            projection = aligner.project(found, given_ids.astype(np.int64), given.astype(np.float32), target_ids)
            ids_NK[rows], logprobs_NK[rows] = projection.ids[:n], projection.logprobs[:n]
            usable = (projection.kind[:n] == 1) & (found[:n] < end - begin)
            ce_N[rows][usable] = raw["ce"][begin:end][found[:n][usable]]
            counted = shard["counted"][at[b] + 1 : at[b + 1]]
            kinds += np.bincount(projection.kind[:n][counted], minlength=4)[:4]
        ragged = "counts" in raw
        columns = _entries(ids_NK, logprobs_NK, logprobs_NK > -np.inf, ragged, offsets)
        columns |= {"ce": ce_N, "block_ce": raw["block_ce"], "offsets": offsets}
        facts = {"positions": positions, "counted": int(kinds.sum()), "aligned": int(kinds[1])}
        facts |= {"one_hot": int(kinds[2]), "none": int(kinds[0]), "entries": int((logprobs_NK > -np.inf).sum())}
        return columns, facts


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(config: Run, name: str, what: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar with tokens/s and the time left, on the first rank; W&B gets the rate if a run is open."""
    shown = config.trainer.progress and _rank()[0] == 0
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
    began, done = time.perf_counter(), 0
    with Progress(*columns, disable=not shown, transient=True) as progress:
        task = progress.add_task(f"{name}: {what}", total=tokens, rate="")

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            rate = done / (time.perf_counter() - began)
            progress.update(task, advance=tokens, rate=f"{rate:,.0f} tokens/s")
            _log({f"precompute/{name}/{what}_tokens_per_second": rate})

        yield advance


@cache
def _report(name: str, folder: Path) -> None:
    """What came out, said once a process."""
    facts = read_manifest(folder)
    figures = {k: facts[k] for k in ("coverage", "cross_entropy", "kept_mass") if k in facts}
    _log({f"precompute/{name}/{k}": v for k, v in figures.items()})
    if _rank()[0] == 0:
        print(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in figures.items()) + f" ({folder})")


def _log(figures: dict[str, float]) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.log(figures)
