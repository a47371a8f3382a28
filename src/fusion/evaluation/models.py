"""Models to evaluate: found, identified by content, loaded."""

from pathlib import Path
from typing import Any

import torch

from fusion.artifact import checksum
from fusion.config import UserError

FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")


def resolve(name: str, where: str = "models") -> Path:
    """The folder of a model: the given one, or a download from the Hub.

    Raises:
        UserError: it is neither, or it is a folder that holds no model.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"{where}: {name}: no such folder; give a Hugging Face folder or a hub name like OWNER/NAME"
            )
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=list(FILES)))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{where}: {name} is no folder here, and the Hub did not give it ({reason})") from error
    missing = next((f for f in ("config.json",) if not (folder / f).is_file()), None)
    if missing:
        raise UserError(f"{where}: {name} is no model folder (no {missing}); give what save_pretrained wrote")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{where}: {name} holds no *.safetensors; save the model with safetensors")
    if not any(
        (folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        raise UserError(f"{where}: {name} holds no tokenizer; save it into the same folder")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Checksum of every file that makes the model and its tokenizer what they are."""
    files = {p for pattern in FILES for p in folder.glob(pattern) if p.name != "manifest.json"}
    return {p.name: checksum(p) for p in sorted(files)}


def labels(names: list[str]) -> list[str]:
    """Short names of models: the last part of each path, longer where two would be the same."""
    parts = [Path(name).parts for name in names]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(p[-depth:]) for p in parts]
        if len(set(short)) == len(set(parts)):
            return short
    return names


def device_of(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("evaluation.device=cuda: this machine has no CUDA device, set evaluation.device=cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load(folder: Path, *, dtype: str, device: str) -> tuple[Any, Any]:
    """(model in evaluation mode on `device`, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"models: {folder} does not load ({str(error).splitlines()[0]})") from error
    return model.to(device_of(device)).eval(), tokenizer
