"""Each stage as one function: config in, folder out, found again by the hash of what made it.

Heavy imports stand inside the functions: a mistake on the command line should not wait for transformers.
"""

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as distributed

from fusion.artifact import MANIFEST, artifact, fingerprint, read_manifest
from fusion.config import LLM, Corpus, Objective, Optimizer, Run, Target, Trainer, UserError

GROWING = Optimizer(lr=3e-3, betas=[0.9, 0.95], weight_decay=0.1, warmup_ratio=0.1)


def precompute(config: Run) -> dict[str, Any]:
    """precompute.py: every source over the corpus, aligned to the target's tokens. Returns its figures."""
    if config.plan:
        return _plan(config)
    done = distributions(resolve(config))
    figures = {"tokens": read_manifest(done.tokens).get("tokens", 0)}
    for name, folder in done.distributions.items():
        facts = read_manifest(folder)
        figures |= {f"{fact}/{name}": facts[fact] for fact in ("coverage", "cross_entropy") if fact in facts}
    return figures


def train(config: Run) -> dict[str, Any]:
    """train.py: the target, trained; `output` is a Hugging Face folder. Returns its figures."""
    if config.plan:
        return _plan(config)
    if config.output:
        refuse_foreign(Path(config.output))
    folder = train_target(resolve(config))
    figures = read_manifest(folder)["figures"]
    output = Path(config.output) if config.output else folder
    if _rank() == 0:  # ranks that published side by side would replace each other's folder
        if config.output:
            _publish(folder, output)
        print(f"the trained model: {output}")
    return figures | {"output": str(output)}


def _plan(config: Run) -> dict[str, Any]:
    from fusion.plan import print_plan

    return print_plan(config)


# --- models ----------------------------------------------------------------------------------------------------------


def resolve(config: Run) -> Run:
    """The same config with every model that is to be grown grown, and its path filled in."""
    sources = {name: grown(llm, config) for name, llm in config.sources.items()}
    return replace(config, target=grown(config.target, config), sources=sources)


def grown(llm: LLM, config: Run) -> LLM:
    if not llm.grow.architecture:
        return llm
    from fusion import corpus, tiny

    recipe = asdict(llm.grow)
    texts = [text for domain in llm.grow.domains for text in corpus.stdlib(domain, "train")]
    digest = fingerprint(texts)
    seedling = artifact(
        Path(config.artifacts),
        "seedling",
        {"grow": recipe, "texts": digest},
        lambda folder: tiny.seedling(llm.grow, texts, 0, folder),
    )
    block = min(config.corpus.block_size, tiny.CONTEXT)
    run = Run(
        corpus=Corpus(domains=llm.grow.domains, split="train", block_size=block, held_out=0.0),
        target=Target(path=str(seedling)),
        fusion=config.fusion,
        objective=Objective(lambda_clm=1.0),
        optimizer=replace(GROWING, lr=llm.grow.lr),
        trainer=Trainer(
            accelerator=config.trainer.accelerator,
            steps=llm.grow.steps,
            global_batch=max(1, llm.grow.tokens // block),
            micro_batch=max(1, llm.grow.tokens // block),
            threads=config.trainer.threads,
            checkpoint_every=0,
            progress=config.trainer.progress,
        ),
        artifacts=config.artifacts,
    )
    return replace(llm, path=str(train_target(run, alone=True)), grow=replace(llm.grow, architecture=""))


# --- distributions ---------------------------------------------------------------------------------------------------


def distributions(config: Run) -> Any:
    """The stores that training streams from; with λ = 1 only the tokens."""
    from fusion.sources import precompute as run_sources

    if config.objective.lambda_clm == 1:
        config = replace(config, sources={}, fuse_target=False)
    return run_sources(config, config.target.path, {name: llm.path for name, llm in config.sources.items()})


# --- training --------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def train_target(config: Run, alone: bool = False) -> Path:
    """The trained target as an artifact: checkpoints live in its partial folder, so the same command continues.

    `alone`: one rank trains, the others wait (a tiny model does not need them all).
    """
    from fusion.checkpoint import fingerprint as weights
    from fusion.training import fit

    done = distributions(config)
    plain = config.objective.lambda_clm == 1
    ignored = {"accelerator", "devices", "nodes", "workers", "log_every", "threads", "progress", "checkpoint_every"}
    recipe = {
        "target": weights(config.target) | {"dtype": config.target.dtype, "lora": asdict(config.target.lora)},
        "tokens": done.tokens.name,
        "distributions": {name: folder.name for name, folder in done.distributions.items()},
        "objective": asdict(config.objective),
        "fusion": None if plain else config.fusion,
        "optimizer": asdict(config.optimizer),
        "trainer": {k: v for k, v in asdict(config.trainer).items() if k not in ignored},
        "seed": config.seed,
        "held_out": config.corpus.held_out,
    }
    root, together = Path(config.artifacts), not alone
    if alone and _rank() != 0:
        distributed.barrier()
    folder = artifact(root, "trained", recipe, lambda folder: fit(config, done, folder), together)
    if alone and _rank() == 0 and distributed.is_initialized():
        distributed.barrier()
    return folder


# --- folders of the user's -------------------------------------------------------------------------------------------


def refuse_foreign(output: Path) -> None:
    """An output folder that holds something we did not write is never touched."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).exists()):
        raise UserError(f"output={output} holds something else: name an empty or a new folder")


def _publish(folder: Path, output: Path) -> None:
    """`folder` under the name the user gave: hard links where the disk allows, else copies; replaced as a whole."""
    refuse_foreign(output)
    if output.exists() and read_manifest(output)["recipe"] == read_manifest(folder)["recipe"]:
        return
    beside = output.with_name(f"{output.name}.{os.getpid()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(folder, beside, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(folder, beside)
    if output.exists():
        shutil.rmtree(output)
    os.replace(beside, output)
