"""Hugging Face folders in and out: safetensors only, one line when a folder is no model."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fusion.artifact import checksum
from fusion.config import LLM, UserError

# Progress is ours to show, and transformers' advice on padding is not for us: ours stands on the right.
logging.disable_progress_bar()
logging.set_verbosity_error()


def load_tokenizer(llm: LLM) -> PreTrainedTokenizerBase:
    """The tokenizer of `llm`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    name = llm.tokenizer or llm.path
    tokenizer = _load(AutoTokenizer, name, "tokenizer", revision=llm.revision, trust_remote_code=llm.trust_remote_code)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of a folder without one
        raise UserError(f"{name}: no tokenizer there: set `tokenizer` to a folder or hub name that has one")
    return tokenizer


def load_config(llm: LLM) -> Any:
    return _load(AutoConfig, llm.path, "config", revision=llm.revision, trust_remote_code=llm.trust_remote_code)


def load_model(llm: LLM) -> PreTrainedModel:
    """The causal LM of `llm` with its weights, in evaluation mode.

    Raises:
        UserError: no such model, weights that are missing, not safetensors, or not finite.
    """
    options = {"device_map": llm.device_map} if llm.device_map else {}
    if llm.attention:
        options["attn_implementation"] = llm.attention
    model = _load(
        AutoModelForCausalLM,
        llm.path,
        "model",
        revision=llm.revision,
        trust_remote_code=llm.trust_remote_code,
        dtype=llm.dtype if llm.dtype == "auto" else getattr(torch, llm.dtype),
        use_safetensors=True,
        **options,
    )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{llm.path}: the weight {name} holds NaN or infinite values")
    return model.eval()


def _load(factory: Any, name: str, what: str, **options: Any) -> Any:
    local = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not local.is_dir():
        raise UserError(f"{name}: no such folder (a model is a Hugging Face folder or a hub name)")
    try:
        return factory.from_pretrained(str(local) if local.is_dir() else name, **options)
    except Exception as error:  # transformers raises a dozen types for a folder that is not what it should be
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{name}: cannot load the {what}: {reason}") from error


def fingerprint(llm: LLM) -> dict[str, str]:
    """What identifies a model's weights: checksums of a local folder's files, or the hub name and revision."""
    folder = Path(llm.path).expanduser()
    if not folder.is_dir():
        return {"hub": llm.path, "revision": llm.revision}
    manifest = folder / "manifest.json"  # a folder of ours carries its checksums
    if manifest.exists():
        files = json.loads(manifest.read_text())["files"]
    else:
        files = {p.name: checksum(p) for p in sorted(folder.glob("*.safetensors"))}
        files |= {p.name: checksum(p) for p in sorted(folder.glob("*.json"))}
    return {"weights": hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]}
