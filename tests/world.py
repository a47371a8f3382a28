"""A world of tiny untrained models on disk, for the tests that need folders to run on."""

import json
from pathlib import Path

from fusion import corpus, tiny
from fusion.config import LLM, Corpus, Grow, Run, Target


def make_world(root: Path, documents: int = 24) -> Run:
    """A config with a target, two sources of other architectures and tokenizers, and a text file."""
    texts = [corpus.stdlib("tables", "held_out")[0], *corpus.stdlib("docs", "held_out")[:20]]
    shapes = {
        "target": Grow("llama", tokenizer="bytes", vocabulary=500, hidden=16, layers=2, heads=2),
        "neox": Grow("gpt_neox", tokenizer="bytes", vocabulary=700, hidden=24, layers=1, heads=2),
        "piece": Grow("llama", tokenizer="sentencepiece", vocabulary=600, hidden=16, layers=1, heads=2),
    }
    for seed, (name, grow) in enumerate(shapes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        tiny.seedling(grow, texts, seed, root / name)
    rows = [{"text": text[: 400 + 40 * i]} for i, text in enumerate((texts * 4)[:documents])]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Run(
        corpus=Corpus(source="jsonl", path=str(root / "corpus.jsonl"), block_size=128, held_out=0.1),
        target=Target(path=str(root / "target"), dtype="float32"),
        sources={name: LLM(path=str(root / name), dtype="float32") for name in ("neox", "piece")},
        fusion={"function": "fusion.fusing.min_ce"},
        artifacts=str(root / "artifacts"),
    )
    config.externalize.shard_blocks, config.externalize.top_k, config.externalize.workers = 8, 6, 1
    config.alignment.criterion = "span"
    config.trainer.global_batch, config.trainer.micro_batch, config.trainer.progress = 8, 2, False
    return config


def paths(config: Run) -> tuple[str, dict[str, str]]:
    """What `sources.precompute` takes besides the config."""
    return config.target.path, {name: llm.path for name, llm in config.sources.items()}
