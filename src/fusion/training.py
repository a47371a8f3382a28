"""One training run: the Lightning trainer around module and data, resumed from its last whole checkpoint."""

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch.distributed as distributed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from fusion.artifact import write_atomic
from fusion.checkpoint import load_tokenizer
from fusion.config import Run
from fusion.data import FusionData
from fusion.module import FusionModule
from fusion.sharding import export
from fusion.sources import Precomputed


def fit(config: Run, done: Precomputed, folder: Path) -> dict[str, Any]:
    """Train the target and write it into `folder` as a Hugging Face model; returns the manifest's figures.

    `folder` may hold the checkpoints of a killed run: it continues from the last whole one.
    """
    options = config.trainer
    lightning.seed_everything(config.seed, verbose=False)
    data = FusionData(config, done)
    steps = options.steps or options.epochs * data.steps_per_epoch
    module = FusionModule(config, data.names, steps)
    checkpoints = folder / "checkpoints"
    validated = config.corpus.held_out > 0
    trainer = lightning.Trainer(
        accelerator=options.accelerator,
        devices="auto" if options.devices == "auto" else int(options.devices),
        num_nodes=options.nodes,
        strategy=_strategy(config),
        precision=options.precision,
        max_steps=steps,
        max_epochs=-1,
        logger=_loggers(config, folder),
        callbacks=_callbacks(config, checkpoints, validated),
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        enable_checkpointing=options.checkpoint_every > 0,
        val_check_interval=options.validate_every or steps,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validated else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=options.log_every,
        use_distributed_sampler=False,
        barebones=False,
    )
    trainer.fit(module, data, ckpt_path=newest(checkpoints), weights_only=True)
    if validated and module.validated_at != steps:  # the steps are no multiple, or the run was killed after the last
        trainer.validate(module, data, verbose=False)
    export(module.target, folder)
    figures: dict[str, float] = {}
    if trainer.is_global_zero:
        figures = join_curves(folder)
        figures["score"] = figures.get("validation/bits_per_byte", figures.get("train/loss", 0.0))
        load_tokenizer(config.target).save_pretrained(folder)
        write_atomic(folder / "README.md", _card(config, done, figures).encode())
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {"figures": {"steps": steps, **figures}}


class Bar(RichProgressBar):
    """Lightning's bar without the number of the log folder."""

    def get_metrics(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, module).items() if k != "v_num"}


def _strategy(config: Run) -> Strategy | str:
    if config.trainer.strategy == "fsdp":
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    if config.trainer.strategy == "ddp":
        return DDPStrategy(find_unused_parameters=False)
    return "auto"


def _loggers(config: Run, folder: Path) -> list[Logger]:
    """CSV always, a file of its own for every start; and the job's W&B run if launch opened one."""
    start = len(list((folder / "curves").glob("*")))
    loggers: list[Logger] = [
        CSVLogger(folder, "curves", f"{start:04d}", flush_logs_every_n_steps=config.trainer.log_every)
    ]
    if config.logger.wandb:
        import wandb

        loggers.append(WandbLogger(experiment=wandb.run, prefix=config.logger.name))
    return loggers


def _callbacks(config: Run, checkpoints: Path, validated: bool) -> list[Callback]:
    callbacks: list[Callback] = [Bar(leave=True)] if config.trainer.progress else []
    if config.trainer.checkpoint_every:
        every = config.trainer.checkpoint_every
        callbacks.append(ModelCheckpoint(checkpoints, "last-{step:08d}", save_top_k=1, every_n_train_steps=every))
    if config.trainer.checkpoint_every and validated:
        callbacks.append(
            ModelCheckpoint(checkpoints, "best-{step:08d}", monitor="validation/loss", save_top_k=1, mode="min")
        )
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.CHECKPOINT_EQUALS_CHAR = "-"
    return callbacks


def newest(checkpoints: Path) -> Path | None:
    """The last whole checkpoint. A sharded one is a folder whose `meta.pt` is written last."""
    whole = [p for p in checkpoints.glob("last-*") if p.is_file() or (p / "meta.pt").exists()]
    return max(whole, key=lambda p: p.name, default=None)


def join_curves(folder: Path) -> dict[str, float]:
    """One `metrics.csv` out of the files of every start; where a resumed run repeats a step, the later one counts.

    Returns the last value of every column.
    """
    rows: dict[tuple[int, str], dict[str, str]] = {}
    columns = ["step"]
    for path in sorted((folder / "curves").glob("*/metrics.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                kind = "validation" if row.get("validation/loss") else "train"
                rows[int(row["step"]), kind] = {k: v for k, v in row.items() if v}
                columns += [k for k in row if k not in columns]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
    shutil.rmtree(folder / "curves", ignore_errors=True)
    return {k: float(v) for key in sorted(rows) for k, v in rows[key].items() if "/" in k}


def _card(config: Run, done: Precomputed, figures: dict[str, float]) -> str:
    """The model card: what was fused into what, on what, how, with which result."""
    names = ", ".join(done.distributions) or "none (plain language modelling)"
    lines = [f"| {name} | {value:.4f} |" for name, value in sorted(figures.items()) if name.startswith("validation/")]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [knowledge-fusion]",
            "---",
            "# A fused language model",
            "",
            f"Target: `{config.target.path}`. Distributions fused: {names}.",
            f"Corpus: {config.corpus.source} {config.corpus.path} ({done.tokens.name}).",
            f"λ = {config.objective.lambda_clm}, fusion `{config.fusion.get('function')}`, "
            f"alignment `{config.alignment.criterion}`.",
            "",
            "| measure | value |",
            "|---|---|",
            *lines,
            "",
            "```json",
            json.dumps(asdict(config), indent=1, default=str),
            "```",
            "",
        ]
    )
