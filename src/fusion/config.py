"""Every key of every config: its type, default, range and meaning, and the checks between keys.

The dataclasses are registered with Hydra, so a misspelt key or a wrong type fails at composition; `check` walks the
ranges, the choices and the cross-field rules afterwards. Code receives these dataclasses, never a DictConfig.
Merge methods and fusion functions are the exception: their keys are the keyword parameters of the function itself
(`options_of`), so that a new one is one function and one YAML.
"""

import dataclasses
import difflib
import inspect
import keyword
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import get_method


class UserError(ValueError):
    """A mistake of the user's. The message is one line that names the option or file and the remedy."""


def key(default: Any, meaning: str, choices: tuple = (), low: float | None = None, high: float | None = None) -> Any:
    """A config key: its default (or a type to build it), what it means, what it may be."""
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)`, or the known names, for an error message."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (one of: {', '.join(sorted(known))})"


@dataclass
class Grow:
    """A tiny LLM grown on the spot from the embedded corpus."""

    architecture: str = key(
        "", "transformers model type; empty: not a grown model", ("", "llama", "gpt_neox", "mistral", "gpt2")
    )
    domains: list[str] = key(list, "domains of the embedded corpus it is trained on")
    tokenizer: str = key(
        "bytes",
        "byte-level BPE, or SentencePiece-like BPE with ▁ and byte fallback",
        ("bytes", "sentencepiece"),
    )
    vocabulary: int = key(1024, "tokenizer size", low=300)
    hidden: int = key(128, "hidden width", low=8)
    layers: int = key(4, "transformer blocks", low=1)
    heads: int = key(4, "attention heads", low=1)
    steps: int = key(400, "optimizer steps", low=1)
    tokens: int = key(2048, "tokens per step", low=1)
    lr: float = key(3e-3, "peak learning rate", low=0)


@dataclass
class LLM:
    """A causal LM of transformers: a source."""

    path: str = key("", "Hugging Face folder or hub name")
    tokenizer: str = key("", "tokenizer folder or hub name; empty: that of `path`")
    revision: str = key("main", "hub revision")
    dtype: str = key("auto", "weights are loaded in", ("auto", "float32", "bfloat16", "float16"))
    device_map: str = key("", "accelerate's device_map ('auto' shards over the GPUs); empty: one device")
    attention: str = key("", "attn_implementation of transformers; empty: its default")
    trust_remote_code: bool = key(False, "run code that comes with the model")
    grow: Grow = key(Grow, "grow it from the embedded corpus instead of loading `path`")


@dataclass
class Lora:
    """Low-rank adapters (peft), merged into the weights on export."""

    rank: int = key(0, "rank; 0: train every weight", low=0)
    alpha: float = key(16.0, "scaling numerator", low=0)
    dropout: float = key(0.0, "dropout on the adapters' input", low=0, high=1)
    modules: list[str] = key(list, "module names; empty: every linear layer but lm_head")


@dataclass
class Target(LLM):
    """The LLM that is trained; its tokenizer is the grid everything is aligned to (FuseChat's pivot)."""

    lora: Lora = key(Lora, "train low-rank adapters only")


@dataclass
class Corpus:
    source: str = key("stdlib", "where it comes from", ("stdlib", "jsonl", "hub"))
    path: str = key("", "jsonl: file, folder or glob; hub: data set name or folder")
    subset: str = key("", "hub: configuration name")
    split: str = key("train", "hub: split; stdlib: train (to grow on), fusion or held_out")
    domains: list[str] = key(list, "stdlib: domains; empty: all")
    format: str = key("text", "one text or one dialogue a line", ("text", "chat"))
    field: str = key("text", "text: the field that holds it")
    template: str = key("", "chat: a named template (openchat_3.5); empty: the target tokenizer's own")
    block_size: int = key(2048, "longest block, in target tokens", low=2)
    documents: int = key(0, "use the first so many documents; 0: all", low=0)
    held_out: float = key(0.02, "share of documents kept for validation, chosen by content", low=0, high=0.5)


@dataclass
class Externalize:
    """Running the sources (FuseLLM §3.1)."""

    keep: str = key("top_k", "the largest entries, or draws from the full distribution", ("top_k", "sample"))
    top_k: int = key(10, "entries kept at most", low=1, high=1024)
    top_p: float = key(1.0, "top_k: the fewest entries that reach this mass", low=0, high=1)
    batch_tokens: int = key(16384, "tokens of one forward pass, padding included", low=1)
    chunk_tokens: int = key(1024, "positions whose logits exist at one time", low=1)
    shard_blocks: int = key(256, "blocks of a shard: the unit of work, of resume and of verification", low=1)
    workers: int = key(0, "alignment processes; 0: one a core", low=0)
    seed: int = key(0, "of keep=sample")


@dataclass
class Alignment:
    criterion: str = key("em", "which positions and candidates match", ("em", "mined", "ms", "span"))
    collision: str = key("sum", "two candidates on one target id: add them, or keep the larger", ("sum", "max"))
    fallback: str = key(
        "next_token",
        "a position without a match: one-hot on the gold next token, or no loss",
        ("next_token", "ignore"),
    )
    normalise: str = key(
        "bytes", "compare the bytes tokens stand for, or the reference code's strings", ("bytes", "reference")
    )


@dataclass
class Objective:
    """λ·CLM + (1−λ)·fusion (FuseLLM eq. 5)."""

    lambda_clm: float = key(0.9, "λ, the weight of plain language modelling", low=0, high=1)
    schedule: str = key("constant", "λ stays, or goes linearly to 1", ("constant", "decay"))
    divergence: str = key("kl", "KL(P‖Q), or cross-entropy −ΣP·log Q", ("kl", "ce"))
    temperature: float = key(1.0, "teacher temperature on P and Q, gradient scaled by T²", low=1e-3)
    tail: str = key(
        "renormalize", "the mass top-K left out: scale to 1, or keep as one bucket", ("renormalize", "bucket")
    )
    chunk: int = key(0, "positions whose logits exist at one time; 0: 256 on a CPU, 2048 on a GPU", low=0)


@dataclass
class Optimizer:
    """AdamW, cosine with warm-up."""

    lr: float = key(1e-5, "peak learning rate", low=0)
    betas: list[float] = key(lambda: [0.9, 0.95], "AdamW's betas")
    eps: float = key(1e-8, "AdamW's epsilon", low=0)
    weight_decay: float = key(0.1, "on matrices, not on norms and biases", low=0)
    schedule: str = key("cosine", "after the warm-up", ("cosine", "linear", "constant"))
    warmup_ratio: float = key(0.008, "share of the steps", low=0, high=1)
    clip: float = key(1.0, "gradient norm; 0: off", low=0)


@dataclass
class Trainer:
    accelerator: str = key("auto", "Lightning's accelerator", ("auto", "cpu", "gpu", "mps"))
    devices: str = key("1", "devices per node: a count or 'auto'")
    nodes: int = key(1, "machines", low=1)
    strategy: str = key("single", "one device, replicas, or FSDP2 shards", ("single", "ddp", "fsdp"))
    precision: str = key("32-true", "Lightning's precision", ("32-true", "bf16-mixed", "bf16-true"))
    epochs: int = key(1, "passes over the corpus", low=1)
    steps: int = key(0, "optimizer steps; 0: as many as `epochs` gives", low=0)
    global_batch: int = key(128, "blocks per optimizer step, over all devices", low=1)
    micro_batch: int = key(4, "blocks per device and forward pass", low=1)
    workers: int = key(0, "data loading processes", low=0)
    activation_checkpointing: bool = key(False, "recompute activations in the backward pass")
    validate_every: int = key(0, "optimizer steps between validations; 0: only at the end", low=0)
    checkpoint_every: int = key(100, "optimizer steps between checkpoints; 0: none", low=0)
    log_every: int = key(10, "optimizer steps between log lines", low=1)
    threads: int = key(0, "torch threads of a process; 0: torch's default", low=0)
    progress: bool = key(True, "progress bars")


@dataclass
class Logger:
    wandb: bool = key(False, "log to Weights & Biases, beside the CSV file that is always written")
    project: str = key("fusion", "W&B project")
    entity: str = key("", "W&B entity")
    name: str = key("", "W&B run name; empty: W&B's choice")
    group: str = key("", "W&B group; empty: the sweep's directory under -m")
    tags: list[str] = key(list, "W&B tags")
    mode: str = key("online", "W&B mode", ("online", "offline"))


@dataclass
class Judge:
    """MT-Bench's grader: any endpoint that speaks OpenAI's chat protocol."""

    base_url: str = key("https://api.openai.com/v1", "endpoint")
    model: str = key("gpt-4-0613", "grader")
    key_variable: str = key("OPENAI_API_KEY", "environment variable that holds the key")
    timeout: float = key(120.0, "seconds per request", low=0)
    retries: int = key(6, "attempts per judgement, with exponential back-off", low=1)
    workers: int = key(4, "requests at a time", low=1)


@dataclass
class Evaluation:
    kind: str = key("bits_per_byte", "what measures", ("bits_per_byte", "harness", "mt_bench"))
    texts: list[str] = key(list, "bits_per_byte: jsonl files, one domain each")
    field: str = key("text", "bits_per_byte: the field that holds the text")
    window: int = key(0, "bits_per_byte: context in tokens; 0: the model's own, at most 2048", low=0)
    stride: int = key(0, "bits_per_byte: tokens scored per window; 0: half a window", low=0)
    ensemble: list[str] = key(list, "bits_per_byte: models whose averaged probabilities make one more row")
    tasks: list[str] = key(list, "harness: lm-eval task or group names")
    fewshot: int = key(-1, "harness: examples in the prompt; -1: the task's own", low=-1)
    data: str = key("", "harness, mt_bench: folder of local files; empty: the Hub")
    limit: int = key(0, "examples per task, evenly spread; 0: all", low=0)
    batch_size: int = key(8, "sequences per forward pass", low=1)
    max_new_tokens: int = key(512, "generation length", low=1)
    allow_code_execution: bool = key(False, "run model-written code in a sandboxed subprocess")
    device: str = key("auto", "cpu, cuda or auto")
    dtype: str = key("auto", "weights are loaded in", ("auto", "float32", "bfloat16", "float16"))
    bootstrap: int = key(1000, "resamples for the 95 % intervals", low=0)
    judge: Judge = key(Judge, "mt_bench: the grader")


@dataclass
class Run:
    """precompute.py, train.py and fuse.py: the whole way, one config."""

    corpus: Corpus = key(Corpus, "texts or dialogues")
    target: Target = key(Target, "the LLM that is trained")
    sources: dict[str, LLM] = key(dict, "the LLMs whose knowledge is fused, by name")
    alignment: Alignment = key(Alignment, "source tokens to target tokens")
    externalize: Externalize = key(Externalize, "running the sources")
    fusion: dict[str, Any] = key(dict, "function: dotted name; the rest: its keyword parameters")
    fuse_target: bool = key(True, "the frozen target's own distribution is one of those fused")
    objective: Objective = key(Objective, "the loss")
    optimizer: Optimizer = key(Optimizer, "AdamW and its schedule")
    trainer: Trainer = key(Trainer, "devices, batches, steps")
    merges: dict[str, dict[str, Any]] = key(dict, "fuse.py: the merges of the pairwise targets, by name")
    granularity: str = key("matrix", "VaRM's parameter unit", ("model", "layer", "matrix", "parameter"))
    arms: list[str] = key(lambda: ["text_only", "fusellm", "fusechat"], "fuse.py: what is trained and compared")
    seeds: list[int] = key(lambda: [0, 1], "fuse.py: training seeds")
    jobs: int = key(0, "fuse.py: models trained at a time; 0: one a core on a CPU, else one", low=0)
    evaluation: Evaluation = key(Evaluation, "fuse.py: what measures")
    logger: Logger = key(Logger, "CSV and W&B")
    artifacts: str = key("artifacts", "folder of everything that is computed once and found again")
    output: str = key("", "train.py: the trained model; fuse.py: the results; empty: inside `artifacts`")
    seed: int = key(0, "of data order and dropout", low=0)
    plan: bool = key(False, "print what it would cost, do nothing")


@dataclass
class Merge:
    """merge.py."""

    base: str = key("", "the common starting point (pivot): Hugging Face folder or hub name")
    models: list[str] = key(list, "the fine-tuned models")
    output: str = key("", "folder of the merged model")
    merge: dict[str, Any] = key(dict, "method: dotted name; the rest: its keyword parameters")
    granularity: str = key("matrix", "VaRM's parameter unit", ("model", "layer", "matrix", "parameter"))
    dtype: str = key("", "of the result; empty: the pivot's", ("", "float32", "bfloat16", "float16"))
    conflicts: str = key("error", "tensors that do not match: stop, or keep the pivot's", ("error", "pivot"))
    shard_gb: float = key(5.0, "size of an output file at most, in GB", low=1e-6)
    device: str = key("cpu", "cpu or cuda")
    threads: int = key(0, "worker threads; 0: one a core", low=0)
    overwrite: bool = key(False, "replace an output folder that holds something else")
    logger: Logger = key(Logger, "CSV and W&B")
    plan: bool = key(False, "print what would be read and written, do nothing")


@dataclass
class Evaluate:
    """evaluate.py."""

    models: list[str] = key(list, "Hugging Face folders or hub names")
    baseline: str = key("", "the model the others are compared with; empty: the first")
    compare: list[str] = key(list, "result or multirun folders: print their comparison instead")
    output: str = key("evaluation", "folder of results.json and results.md")
    evaluation: Evaluation = key(Evaluation, "what measures")
    artifacts: str = key("artifacts", "folder of everything that is computed once and found again")
    logger: Logger = key(Logger, "CSV and W&B")
    seed: int = key(0, "of the bootstrap", low=0)
    plan: bool = key(False, "print what would be measured, do nothing")


ARMS = ("text_only", "fusellm", "fusechat")
ROOTS = {"run": Run, "merge": Merge, "evaluate": Evaluate}
for _name, _schema in ROOTS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, value, field) of every leaf below a config dataclass."""
    for item in dataclasses.fields(node):
        value, name = getattr(node, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        elif isinstance(value, dict) and any(dataclasses.is_dataclass(v) for v in value.values()):
            for child, inner in value.items():
                yield from walk(inner, f"{name}.{child}.")
        else:
            yield name, value, item


def options_of(where: str, chosen: dict[str, Any], role: str) -> tuple[Callable, dict[str, Any]]:
    """The function a merge or fusion config names, and its keyword options checked against its signature.

    `where` is the config key ("merge"), `role` the key inside it that holds the dotted name ("method").
    """
    options = dict(chosen)
    name = options.pop(role, "")
    if not name:
        raise UserError(f"{where}.{role} is empty: pick an option of the group, e.g. {where}=NAME")
    try:
        function = get_method(name)
    except Exception as error:
        raise UserError(f"{where}.{role}={name}: no such function ({error})") from error
    known = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    hints = typing.get_type_hints(function)
    options = {f"{o}_" if keyword.iskeyword(o) else o: v for o, v in options.items()}  # YAML's lambda is lambda_ here
    for option, value in options.items():
        if option not in known:
            keys = [k.rstrip("_") for k in known]
            raise UserError(f"{where}.{option} is no key of {name.rpartition('.')[2]}{nearest(option, keys)}")
        options[option] = _typed(f"{where}.{option}", value, hints.get(option, Any))
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise UserError(f"{where}.{missing[0]} is not set: {name.rpartition('.')[2]} needs it")
    return function, options


def _typed(where: str, value: Any, hint: Any) -> Any:
    """`value` if it is of the annotated type (Literal, bool, int, float, str, list, union of these), else UserError."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for arm in arms:
        origin, inner = typing.get_origin(arm), typing.get_args(arm)
        if arm is Any or (arm is type(None) and value is None):
            return value
        if origin is typing.Literal and value in inner:
            return value
        if origin is list and isinstance(value, (list, tuple)):
            return [_typed(f"{where}[{i}]", v, inner[0] if inner else Any) for i, v in enumerate(value)]
        if arm is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(arm, type) and isinstance(value, arm) and (arm is bool or not isinstance(value, bool)):
            return value
    if typing.get_origin(hint) is typing.Literal:
        raise UserError(f"{where}={value}: not a choice{nearest(str(value), [str(a) for a in typing.get_args(hint)])}")
    raise UserError(f"{where}={value}: should be {getattr(hint, '__name__', hint)}")


def check(config: Run | Merge | Evaluate) -> None:
    """Ranges, choices and the rules between keys.

    Raises:
        UserError: naming the key and what to set it to.
    """
    for name, value, item in walk(config):
        choices, low, high = (item.metadata.get(m) for m in ("choices", "low", "high"))
        if choices and value not in choices:
            raise UserError(f"{name}={value}: not a choice{nearest(str(value), [str(c) for c in choices])}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not ((low is None or value >= low) and (high is None or value <= high)):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{name}={value}: must be {bounds}")
    if isinstance(config, Run):
        _check_run(config)


def _check_run(config: Run) -> None:
    models = {"target": config.target} | {f"sources.{name}": llm for name, llm in config.sources.items()}
    for name, llm in models.items():
        if llm.path and llm.grow.architecture:
            other = "choose target=model" if name == "target" else f"choose another name than {name}"
            raise UserError(f"{name} has both a path and a recipe to grow it: {other}, then set its path")
        if not llm.path and not llm.grow.architecture:
            raise UserError(f"{name}.path is empty: set it to a Hugging Face folder or hub name")
    if config.corpus.source != "stdlib" and not config.corpus.path:
        raise UserError(f"corpus.path is empty: corpus.source={config.corpus.source} needs a file, folder or data set")
    if config.objective.tail == "bucket" and config.objective.temperature != 1:
        raise UserError("objective.tail=bucket is defined at temperature 1: set objective.temperature=1")
    if config.alignment.normalise == "reference" and config.alignment.criterion == "span":
        raise UserError("alignment.normalise=reference has no bytes to span: set alignment.normalise=bytes")
    if config.trainer.global_batch % config.trainer.micro_batch:
        raise UserError(
            f"trainer.global_batch={config.trainer.global_batch} is no multiple of "
            f"trainer.micro_batch={config.trainer.micro_batch}: set one of them"
        )
    if len(config.optimizer.betas) != 2 or not all(0 <= b < 1 for b in config.optimizer.betas):
        raise UserError(f"optimizer.betas={config.optimizer.betas}: must be two numbers in [0, 1)")
    if not config.trainer.devices.isdigit() and config.trainer.devices != "auto":
        raise UserError(f"trainer.devices={config.trainer.devices}: must be a count or 'auto'")
    for arm in config.arms:
        if arm not in ARMS:
            raise UserError(f"arms: {arm!r} is none{nearest(arm, list(ARMS))}")
    options_of("fusion", config.fusion, "function")
    for name, merge in config.merges.items():
        options_of(f"merges.{name}", merge, "method")
