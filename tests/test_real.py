"""A real pretrained model and real text, where they are at hand."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fusion import tiny
from fusion.config import LLM, Corpus, Grow, Objective, Optimizer, Run, Target, Trainer
from fusion.stages import train


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["books_en", "chat_mixture"])
def test_a_real_target_learns_from_a_source_of_another_kind(shared: Path, tmp_path: Path, corpus: str) -> None:
    lines = (shared / "data" / "corpora" / f"{corpus}.jsonl").read_text().splitlines()[:60]
    rows = [json.loads(line) for line in lines]
    texts = [row.get("text", "")[:1500] or row["conversations"][-1]["value"] for row in rows]
    chat = corpus == "chat_mixture"
    kept = rows if chat else [{"text": text} for text in texts]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (tmp_path / "source").mkdir()
    grow = Grow("gpt_neox", tokenizer="bytes", vocabulary=900, hidden=32, layers=2, heads=2)
    tiny.seedling(grow, texts, 0, tmp_path / "source")
    template = "openchat_3.5" if chat else ""
    config = Run(
        corpus=Corpus("jsonl", str(tmp_path / "corpus.jsonl"), format="chat" if chat else "text", block_size=256),
        target=Target(path=str(shared / "data" / "models" / "stories260K")),
        sources={"neox": LLM(path=str(tmp_path / "source"))},
        fusion={"function": "fusion.fusing.min_ce"},
        objective=Objective(lambda_clm=0.9),
        optimizer=Optimizer(lr=1e-3),
        trainer=Trainer(
            accelerator="cpu", steps=8, global_batch=8, micro_batch=8, threads=1, log_every=1, progress=False
        ),
        artifacts=str(tmp_path / "artifacts"),
        output=str(tmp_path / "fused"),
    )
    config.corpus.template, config.corpus.held_out, config.alignment.criterion = template, 0.2, "span"
    figures = train(config)
    assert math.isfinite(figures["train/loss"])
    assert figures["train/coverage/neox"] > 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fused").num_parameters() == 260_032
