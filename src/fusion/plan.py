"""What a run would cost: parameters, memory per device, disk, tokens, steps, hours, before a weight is loaded.

The model is built from its config as fake tensors: parameters are counted, and one forward pass of a micro-batch says
what autograd would keep. The rest is arithmetic, each line of it a function here.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM

from fusion import tiny
from fusion.checkpoint import load_config
from fusion.config import LLM, Run, UserError
from fusion.sharding import add_adapters, blocks

GB = 1e9
MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
MIXTRAL |= {"num_key_value_heads": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": ("llama", {}),
    "openlm-research/open_llama_7b_v2": ("llama", {}),
    "openlm-research/open_llama_7b": ("llama", {}),
    "mosaicml/mpt-7b": ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}),
    "openchat/openchat_3.5": ("mistral", {"vocab_size": 32002}),
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": ("mixtral", MIXTRAL | {"vocab_size": 32002}),
    "NousResearch/Nous-Hermes-2-SOLAR-10.7B": (
        "llama",
        MIXTRAL | {"num_hidden_layers": 48, "vocab_size": 32002},
    ),
}
"""Architectures of the published recipes, used only where their config cannot be fetched."""

CORPORA = {"JeanKaddour/minipile": (1.8e9, "FuseLLM §4.1"), "FuseAI/FuseChat-Mixture": (95e3 * 752, "95,000 × 752")}
"""Tokens of the published corpora, and where the number is from."""

FLOPS = {"gpu": 312e12 * 0.4, "cpu": 6e10}
"""Sustained flop/s of a device: 40 % of an A100's bf16 peak; one CPU thread in float32."""


@dataclass
class Model:
    """A causal LM that has no weights: counts are parameters."""

    name: str
    parameters: int
    trained: int
    largest_block: int
    rest: int
    head: int
    vocabulary: int
    active: int
    kept: int
    kept_of_block: int
    blocks: int
    width: int
    note: str = ""


def architecture(llm: LLM) -> tuple[Any, str]:
    """The transformers config of `llm` and where it is from.

    Raises:
        UserError: it can neither be read nor fetched, and is none of the known ones.
    """
    if llm.grow.architecture:
        return tiny.architecture(llm.grow, llm.grow.vocabulary), "grown here"
    try:
        return load_config(llm), "its config.json"
    except UserError:
        if llm.path not in ARCHITECTURES:
            raise
        kind, facts = ARCHITECTURES[llm.path]
        return AutoConfig.for_model(kind, **facts), "known architecture, its config could not be fetched"


def survey(llm: LLM, name: str, rows: int = 0, tokens: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """Count parameters, and the bytes autograd keeps of `rows` sequences of `tokens` tokens."""
    config, note = architecture(llm)
    with FakeTensorMode():
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        total, units, head = sum(p.numel() for p in lm.parameters()), blocks(lm), lm.get_output_embeddings().weight
        by_block = [sum(p.numel() for p in unit.parameters()) for unit in units]
        kept, per_block = kept_by_autograd(lm, rows, tokens) if rows else (0, 0)
        experts = getattr(config, "num_local_experts", 0) or 1
        stacked = sum(p.numel() for n, p in lm.named_parameters() if ".experts." in n)
        active = total - round(stacked * (1 - getattr(config, "num_experts_per_tok", experts) / experts))
        trained = adapters(llm, config) or total
        sizes = (max(by_block, default=0), total - sum(by_block), head.numel(), head.shape[0])
        return Model(name, total, trained, *sizes, active, kept, per_block, len(units), head.shape[1], note)


def adapters(llm: LLM, config: Any) -> int:
    """Parameters of the low-rank adapters; 0 without."""
    lora = getattr(llm, "lora", None)
    if lora is None or not lora.rank:
        return 0
    with unset_fake_temporarily(), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        add_adapters(lm, lora)
    return sum(p.numel() for p in lm.parameters() if p.requires_grad)


def kept_by_autograd(lm: nn.Module, rows: int, tokens: int) -> tuple[int, int]:
    """Bytes kept for the backward pass by the whole body, and by one block. To be called under FakeTensorMode."""
    weights = {p.untyped_storage()._cdata for p in lm.parameters()}
    kept: dict[int, tuple[torch.UntypedStorage, bool]] = {}
    inside = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept.setdefault(storage._cdata, (storage, inside[0] > 0))  # holding it keeps its address from reuse
        return tensor

    for unit in blocks(lm):
        unit.register_forward_pre_hook(lambda *_: inside.__setitem__(0, 1))
        unit.register_forward_hook(lambda *_: inside.__setitem__(0, 0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = lm.base_model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)[0]
    total = sum(storage.nbytes() for storage, _ in kept.values())
    of_blocks = sum(storage.nbytes() for storage, within in kept.values() if within)
    del out
    return total, of_blocks // max(1, len(blocks(lm)))


def training_memory(model: Model, config: Run, devices: int) -> dict[str, float]:
    """Bytes on one device at the three peaks of a step: when the loss is made, in the backward pass, in AdamW.

    Steady state: the optimizer has its moments. Sharded tensors are divided by the devices; the unit at work (a block,
    the next one, the root with embedding and head) is whole.
    """
    options = config.trainer
    sharded = options.strategy == "fsdp" and devices > 1
    gpu = options.accelerator == "gpu"
    low = options.precision != "32-true"
    stored, compute = (2 if options.precision == "bf16-true" else 4), (2 if low else 4)
    share = devices if sharded else 1
    weights = model.parameters * stored / share
    gradients = model.trained * stored / share
    moments = 2 * model.trained * stored / share
    tokens = options.micro_batch * config.corpus.block_size
    whole = (2 * model.largest_block + model.rest) * compute if sharded else 0.0
    if not sharded and options.precision == "bf16-mixed" and gpu:
        whole = model.parameters * compute  # autocast keeps bf16 copies of the weights for the step
    if sharded:  # of the unit whose gradient is being reduced
        whole += model.largest_block * (compute + 4)
    if options.strategy == "ddp" and devices > 1:
        whole += model.trained * stored  # reduction buckets
    activations, recomputed = float(model.kept), 0.0
    if options.activation_checkpointing:
        inputs = (model.blocks + 1) * tokens * model.width * compute
        activations = model.kept - model.blocks * model.kept_of_block + inputs
        recomputed = model.kept_of_block
    chunk = config.objective.chunk or (2048 if gpu else 256)
    head = model.head * 4 if model.trained == model.parameters else 0
    logits = min(chunk, tokens) * model.vocabulary * (6 if low and gpu else 4)
    upcast = model.head * 4 if low and not gpu else 0
    hidden = tokens * model.width * compute
    accumulated = gradients if options.global_batch > options.micro_batch * devices else 0.0
    at_loss = activations + logits + head + upcast + hidden + accumulated
    backward = max(activations + recomputed + head + accumulated, gradients) + model.kept_of_block
    in_adamw = gradients + (model.trained * stored / share if gpu else 0)  # the foreach kernels' scratch
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": moments,
        "activations": activations + recomputed,
        "loss": logits + head + upcast + hidden,
        "units gathered": whole,
        "peak": weights + moments + whole + max(at_loss, backward, in_adamw),
    }


def corpus_tokens(config: Run, vocabulary: int) -> tuple[float, str]:
    """Tokens of the training corpus and how the number was come by. A token of a vocabulary of V is taken for
    1 + log2(V)/5 bytes: 3 at 1k, 4 at 32k."""
    corpus = config.corpus
    if corpus.path in CORPORA:
        return CORPORA[corpus.path]
    size = 1 + math.log2(vocabulary) / 5
    if corpus.source == "stdlib":
        from fusion.corpus import stdlib

        domains = getattr(corpus, "domains", None) or ["code", "docs", "tables"]
        return sum(len(t.encode()) for d in domains for t in stdlib(d, corpus.split)) / size, f"bytes / {size:.1f}"
    path = Path(corpus.path).expanduser()
    files = sorted(path.rglob("*.json*")) if path.is_dir() else sorted(path.parent.glob(path.name))
    return sum(f.stat().st_size for f in files) / size, f"bytes / {size:.1f}"


def store_bytes(tokens: float, kept: int, vocabulary: int) -> float:
    """One distribution store: ids, float16 log-probabilities and the gold cross-entropy of every position."""
    return tokens * (kept * ((2 if vocabulary <= 65536 else 4) + 2) + 2)


def device_count(config: Run) -> tuple[int, str]:
    if config.trainer.devices != "auto":
        return int(config.trainer.devices) * config.trainer.nodes, ""
    found = torch.cuda.device_count()
    return (found or 8) * config.trainer.nodes, "" if found else " (assumed: none is here)"


def plan(config: Run) -> dict[str, Any]:
    """Every figure of the table: models, memory in bytes, tokens, steps, hours."""
    low = config.trainer.precision != "32-true" and config.trainer.accelerator == "gpu"
    dtype = torch.bfloat16 if low else torch.float32
    block = config.corpus.block_size
    target = survey(config.target, "target", config.trainer.micro_batch, block, dtype)
    sources = [survey(llm, name) for name, llm in config.sources.items()]
    devices, assumed = device_count(config)
    tokens, origin = corpus_tokens(config, target.vocabulary)
    per_step = config.trainer.global_batch * block
    steps = config.trainer.steps or config.trainer.epochs * math.ceil(tokens / per_step)
    speed = FLOPS["gpu" if config.trainer.accelerator == "gpu" else "cpu"]
    passes = 8 if config.trainer.activation_checkpointing else 6
    streams = len(sources) + config.fuse_target
    kept = config.externalize.top_k
    disk = {"tokens": tokens * (2 if target.vocabulary <= 65536 else 4)}
    disk |= {f"{s.name}, own grid": store_bytes(tokens, kept, s.vocabulary) for s in sources}
    disk["on the target's grid"] = streams * store_bytes(tokens, kept, target.vocabulary)
    return {
        "models": [target, *sources],
        "memory": training_memory(target, config, devices),
        "devices": devices,
        "devices_note": assumed,
        "tokens": tokens,
        "tokens_note": origin,
        "steps": steps,
        "disk": disk,
        "hours": {
            "running the sources": sum(2 * m.active for m in [target, *sources]) * tokens / speed / 3600,
            "training": passes * target.active * steps * per_step / speed / 3600,
        },
    }


def print_plan(config: Run) -> dict[str, float]:
    """The table of `plan=true`; returns its main figures."""
    facts, console = plan(config), Console()
    memory, devices = facts["memory"], facts["devices"]
    table = Table("what", "estimate", "how", title="plan: nothing is run", title_justify="left")
    for model in facts["models"]:
        active = f", {model.active / GB:.2f}B active" if model.active != model.parameters else ""
        table.add_row(model.name, f"{model.parameters / GB:.3f}B parameters{active}", model.note)
    if config.target.lora.rank:
        table.add_row("adapters", f"{facts['models'][0].trained / 1e6:.2f}M trained", f"rank {config.target.lora.rank}")
    table.add_section()
    options = config.trainer
    how = f"{options.strategy}, {options.precision}, {devices} × {options.accelerator}{facts['devices_note']}"
    for name, size in memory.items():
        table.add_row(f"memory: {name}" + (" per device" if name == "peak" else ""), f"{size / GB:.3f} GB", how)
        how = ""
    if options.accelerator == "gpu":
        room = {size: "fits" if memory["peak"] < 0.92 * size * GB else "DOES NOT FIT" for size in (40, 80)}
        table.add_row("", f"{devices} × 40 GB: {room[40]}", "8 % left for fragments and the driver")
        table.add_row("", f"{devices} × 80 GB: {room[80]}", "")
    table.add_section()
    table.add_row("tokens", f"{facts['tokens'] / 1e6:,.2f}M", facts["tokens_note"])
    table.add_row("steps", f"{facts['steps']:,}", f"{options.global_batch} blocks of {config.corpus.block_size}")
    for name, size in facts["disk"].items():
        table.add_row(f"disk: {name}", f"{size / GB:.3f} GB", f"top-{config.externalize.top_k}")
    checkpoint = facts["models"][0].trained * 12
    table.add_row("disk: checkpoints", f"{2 * checkpoint / GB:.3f} GB", "the last and the best")
    table.add_section()
    unit = "GPU" if options.accelerator == "gpu" else "CPU"
    for name, hours in facts["hours"].items():
        table.add_row(name, f"{hours:,.2f} {unit} hours", "at 125 TFLOP/s" if unit == "GPU" else "at 60 GFLOP/s")
    console.print(table)
    figures = {"parameters": float(facts["models"][0].parameters), "peak_memory": memory["peak"]}
    return figures | {"tokens": facts["tokens"], "steps": float(facts["steps"]), "disk": sum(facts["disk"].values())}
