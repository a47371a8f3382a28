"""The target on one device, replicated, or sharded by FSDP2: any causal LM of transformers.

What is sharded is found from the model, not from a list of classes: the blocks are the largest ModuleList of equals,
everything else (embedding, head, final norm) stays with the root. A sharded target starts on the meta device, is
sharded there, and every rank then reads its own rows from the safetensors files: no rank ever holds the whole model.
"""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from fusion.checkpoint import load_config, load_model
from fusion.config import Lora, Run, Target, UserError
from fusion.head import FusedLM

SHARD_BYTES = 2 << 30
"""Largest file of an exported model: what rank 0 holds at one time."""

Places = dict[str, tuple[nn.Module, str]]
"""Name in the Hugging Face state dict → (module, attribute): stays true when adapters wrap the module."""


def build_target(config: Run, mesh: DeviceMesh | None) -> FusedLM:
    """The target of `config` in training mode: whole on the CPU, or sharded over all ranks of `mesh` on its devices.

    Weights are float32, or bfloat16 for precision=bf16-true; `bf16-mixed` keeps float32 shards and computes in bf16.
    """
    options = config.trainer
    dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    llm = replace(config.target, dtype=str(dtype).removeprefix("torch."))
    lm = load_model(llm) if mesh is None else skeleton(llm, dtype)
    where = places(lm)
    if options.activation_checkpointing:
        recompute_blocks(lm)
    if llm.lora.rank:
        add_adapters(lm, llm.lora)
    target = FusedLM(lm.train())
    target.places = where
    if mesh is None:
        start_adapters(lm, config.seed)
        return target
    shard(target, _line(mesh), torch.bfloat16 if options.precision == "bf16-mixed" else None)
    device = torch.device(mesh.device_type, torch.cuda.current_device() if mesh.device_type == "cuda" else None)
    target._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    lm.tie_weights()
    load_shards(lm, where, llm)
    start_adapters(lm, config.seed)
    return target


def _line(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks in one row: Lightning's mesh has a second dimension for tensor parallelism."""
    return mesh if mesh.ndim == 1 else init_device_mesh(mesh.device_type, (mesh.size(),))


def blocks(lm: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the ModuleList with the most parameters among those whose members are of one class."""
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1]
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])
    return list(largest)


def shard(target: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None = None) -> None:
    """FSDP2 over `mesh`, in place: a unit for each block, one for the rest.

    `compute` is the dtype of forward and backward; gradients are reduced in float32 then. The inputs of the root are
    not cast: they hold the teachers' log-probabilities.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32) if compute else None
    for block in blocks(target):
        fully_shard(block, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    root = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
    )
    fully_shard(target, mesh=mesh, mp_policy=root)


def recompute_blocks(lm: nn.Module) -> None:
    """Activation checkpointing of every block, by its own forward: names in the state dict stay as they are."""
    for block in blocks(lm):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# --- weights in ------------------------------------------------------------------------------------------------------


def skeleton(llm: Target, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device. Buffers are real: nothing on disk could restore those that
    are computed (rotary frequencies)."""
    from accelerate import init_empty_weights

    options = {"attn_implementation": llm.attention} if llm.attention else {}
    options["trust_remote_code"] = llm.trust_remote_code
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(load_config(llm), dtype=dtype, **options)
    lm.tie_weights()
    return lm


def places(lm: nn.Module) -> Places:
    """Where every tensor of the state dict lives. Tied weights have several names."""
    found = {}
    for name in lm.state_dict():
        path, _, attribute = name.rpartition(".")
        found[name] = (lm.get_submodule(path), attribute)
    return found


def load_shards(lm: PreTrainedModel, where: Places, llm: Target) -> None:
    """Fill the (sharded) tensors of `lm`: each rank reads the rows it owns, nothing else.

    A checkpoint whose tensors transformers converts on loading (experts of one file, one by one, to a stack) cannot be
    read by rows: rank 0 loads it whole and hands out the parts.

    Raises:
        UserError: a weight is missing, has another shape, or is not finite.
    """
    folder = Path(llm.path).expanduser()
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.json"]
        folder = Path(snapshot_download(llm.path, revision=llm.revision, allow_patterns=patterns))
    sources = _sources(lm, where, folder)
    if sources is None:
        warnings.warn(f"{llm.path} is converted on loading: rank 0 holds the whole model for a moment", stacklevel=2)
        _hand_out(lm, where, llm)
        return
    filled: set[int] = set()
    for name, (module, attribute) in where.items():
        tensor = getattr(module, attribute)
        if id(tensor) in filled:
            continue
        names = [n for n, (m, a) in where.items() if getattr(m, a) is tensor]
        known = next((n for n in names if n in sources), None)
        if known is None:
            raise UserError(f"{llm.path}: the weight {name} is in none of its files")
        _fill(tensor, *sources[known], f"{llm.path}: the weight {name}")
        filled.add(id(tensor))


def _sources(lm: PreTrainedModel, where: Places, folder: Path) -> dict[str, tuple[Path, str]] | None:
    """Name in the model → (file, name in the file); None if some tensors are not stored as they are used."""
    rules = get_model_conversion_mapping(lm)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, converted = rename_source_key(key, renamings, converters, lm.base_model_prefix, dict(where))
                if converted is not None:
                    return None
                found[name] = (path, key)
    if not found:
        raise UserError(f"{folder}: no safetensors file (other formats are not read: convert the model)")
    return found


@torch.no_grad()
def _fill(tensor: Tensor, path: Path, key: str, what: str) -> None:
    local, rows = tensor, slice(None)
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local, rows = tensor.to_local(), slice(offset[0], offset[0] + shape[0])
    with safe_open(path, "pt") as file:
        stored = file.get_slice(key)
        if tuple(stored.get_shape()) != tuple(tensor.shape):
            raise UserError(f"{what} has shape {stored.get_shape()}, the config says {list(tensor.shape)}")
        if local.numel():
            local.copy_(stored[rows] if stored.get_shape() else file.get_tensor(key))
    if not local.isfinite().all():
        raise UserError(f"{what} holds NaN or infinite values")


def _hand_out(lm: PreTrainedModel, where: Places, llm: Target) -> None:
    whole = {}
    if distributed.get_rank() == 0:
        whole = dict(load_model(llm).state_dict())
    if any(_plain_name(name) != name for name in lm.state_dict()):
        raise UserError("target.lora.rank is set, and this model's weights are converted on loading: set it to 0")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(lm, whole, options=options)


def _plain_name(name: str) -> str:
    return re.sub(r"\.base_layer|\.lora_\w+(\.default)?", "", name)


# --- adapters --------------------------------------------------------------------------------------------------------


def add_adapters(lm: nn.Module, lora: Lora) -> None:
    """Low-rank adapters in place (LoRA, arXiv 2106.09685); everything else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    wanted = lora.modules or "all-linear"
    recipe = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=wanted)
    try:
        inject_adapter_in_model(recipe, lm)
    except ValueError as error:
        raise UserError(f"target.lora.modules={lora.modules}: {str(error).splitlines()[0]}") from error


def start_adapters(lm: nn.Module, seed: int) -> None:
    """What LoRA starts with, whatever the number of ranks: A uniform, B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in lm.named_parameters():
        if ".lora_" in name:
            full = torch.zeros(tensor.shape)
            if ".lora_A" in name:
                bound = tensor.shape[1] ** -0.5
                full.uniform_(-bound, bound, generator=generator)
            _copy_shard(tensor, full)


@torch.no_grad()
def _copy_shard(tensor: Tensor, full: Tensor) -> None:
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        tensor, full = tensor.to_local(), full[offset[0] : offset[0] + shape[0]]
    tensor.copy_(full)


# --- weights out -----------------------------------------------------------------------------------------------------


def whole_tensors(target: FusedLM) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of the model as transformers stores it, adapters merged, tied weights once.

    Every rank takes part in gathering a tensor, one at a time; ranks other than 0 get an empty tensor.
    """
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    adapters = {id(m.base_layer): m for m in target.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")}
    seen: set[int] = set()
    for name, (module, attribute) in target.places.items():
        tensor = getattr(module, attribute)
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        full = _whole(tensor)
        adapter = adapters.get(id(module))
        if adapter is not None and attribute == "weight":
            a, b = (_whole(getattr(adapter, f"lora_{x}")["default"].weight) for x in "AB")
            delta = (b.float() @ a.float()) * adapter.scaling["default"]
            full = (full.float() + (delta.T if adapter.fan_in_fan_out else delta)).to(full.dtype)
        yield name, full.cpu() if first else torch.empty(0)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export(target: FusedLM, folder: Path) -> None:
    """Write the trained model as a Hugging Face folder; called on every rank, rank 0 writes, a file at a time."""
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    files: list[dict[str, str]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"part-{len(files):05d}"
        save_file(pending, path, metadata={"format": "pt"})
        files.append({name: path.name for name in pending})
        pending.clear()

    size = total = 0
    for name, tensor in whole_tensors(target):
        if not first:
            continue
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if first:
        flush()
        _name_files(folder, files, total)
        target.lm.config.dtype = tensor.dtype
        target.lm.config.save_pretrained(folder)
        if target.lm.can_generate():
            target.lm.generation_config.save_pretrained(folder)
    if distributed.is_initialized():
        distributed.barrier()


def _name_files(folder: Path, files: list[dict[str, str]], total: int) -> None:
    """`model.safetensors`, or the numbered files and their index."""
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
    for number, names in enumerate(files, start=1):
        final = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number - 1:05d}").rename(folder / final)
        index["weight_map"] |= dict.fromkeys(names, final)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
