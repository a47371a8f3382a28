"""The plan against what a run really takes, and the tables of the published recipes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from fusion.config import LLM, Corpus, Grow, Lora, Objective, Run, Target, Trainer, UserError
from fusion.plan import architecture, plan, print_plan, store_bytes, survey, training_memory

MEASURE = """
import ctypes, sys, torch
from pathlib import Path
from fusion.config import Run, Target, Trainer
from fusion.sharding import build_target
from fusion.topk import TopK
folder, rows, tokens, recompute = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
def status(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))
torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()
run = Run(target=Target(path=folder), trainer=Trainer(activation_checkpointing=bool(recompute)))
before = status("VmRSS")
target = build_target(run, None)
V = target.lm.config.vocab_size
optimizer = torch.optim.AdamW(target.parameters(), lr=1e-4)
for step in range(2):
    if step:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    ids = torch.randint(V, (rows, tokens))
    fused = TopK(torch.randint(V, (rows, tokens, 10)), torch.randn(rows, tokens, 10).log_softmax(-1))
    target(ids, ids, fused, lambda_clm=0.9).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(status("VmHWM") - before)
"""
SIZES = {  # config, rows, tokens
    "tiny": ({"vocab_size": 2000, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}, 8, 256),
    "100M": ({"vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12}, 2, 256),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident set of Linux")
@pytest.mark.parametrize(("name", "recompute"), [("tiny", False), ("tiny", True), ("100M", False), ("100M", True)])
def test_peak_memory_within_fifteen_percent_of_the_resident_set(tmp_path, name, recompute):
    size, rows, tokens = SIZES[name]
    config = transformers.LlamaConfig(**size, num_attention_heads=size["hidden_size"] // 64)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path), str(rows), str(tokens), str(int(recompute))]
    out = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    measured = int(out.split()[-1])
    trainer = Trainer(accelerator="cpu", micro_batch=rows, global_batch=rows, activation_checkpointing=recompute)
    run = Run(target=Target(path=str(tmp_path)), corpus=Corpus(block_size=tokens), trainer=trainer)
    model = survey(run.target, "target", rows, tokens)
    predicted = training_memory(model, run, 1)["peak"]
    assert predicted == pytest.approx(measured, rel=0.15)


def recipe(**trainer: object) -> Run:
    """FuseLLM's: Llama-2 7B from OpenLLaMA and MPT, MiniPile, blocks of 2,048."""
    options = {"accelerator": "gpu", "devices": "8", "strategy": "fsdp", "precision": "bf16-mixed", "global_batch": 128}
    return Run(
        target=Target(path="meta-llama/Llama-2-7b-hf"),
        sources={"openllama": LLM(path="openlm-research/open_llama_7b"), "mpt": LLM(path="mosaicml/mpt-7b")},
        corpus=Corpus(source="hub", path="JeanKaddour/minipile", block_size=2048),
        trainer=Trainer(**(options | {"activation_checkpointing": True, "micro_batch": 1} | trainer)),
    )


def test_the_recipe_of_fusellm(capsys):
    facts = plan(recipe())
    assert [round(m.parameters / 1e9, 2) for m in facts["models"]] == [6.74, 6.74, 6.65]
    assert facts["steps"] == -(-1.8e9 // (128 * 2048))
    assert facts["memory"]["optimizer"] == pytest.approx(6.74e9 * 8 / 8, rel=0.01)
    assert facts["disk"]["on the target's grid"] == 3 * store_bytes(1.8e9, 10, 32000) == 3 * 1.8e9 * 42
    figures = print_plan(recipe())
    shown = capsys.readouterr().out
    assert "8 × 40 GB: fits" in shown
    assert "known architecture" in shown
    assert figures["peak_memory"] < 36e9


def test_memory_goes_the_right_way():
    """More devices, checkpointing and adapters save memory; replicas and longer blocks cost some."""
    base = recipe(micro_batch=1)
    model = survey(base.target, "target", 1, 2048, torch.bfloat16)

    def peak(run: Run, devices: int = 8) -> float:
        return training_memory(model, run, devices)["peak"]

    assert peak(base, 16) < peak(base) < peak(base, 2)
    assert peak(base) < peak(recipe(activation_checkpointing=False))
    assert peak(base) < peak(recipe(strategy="ddp"))
    assert peak(base) < peak(replace(base, objective=Objective(chunk=8192)), 8) or base.corpus.block_size <= 2048


def test_experts_at_work_are_fewer_than_experts():
    model = survey(LLM(path="NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO"), "mixtral")
    assert model.parameters == pytest.approx(46.7e9, rel=0.01)
    assert model.active == pytest.approx(12.9e9, rel=0.01)


def test_adapters_train_little():
    grow = Grow(architecture="llama", vocabulary=1000)
    full, low = survey(Target(grow=grow), "full"), survey(Target(grow=grow, lora=Lora(rank=4)), "low")
    assert full.trained == full.parameters == low.parameters
    assert low.trained < 0.1 * full.trained


def test_a_model_nobody_knows_is_refused_in_one_line():
    with pytest.raises(UserError, match="nobody/nothing"):
        architecture(LLM(path="nobody/nothing"))
