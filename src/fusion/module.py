"""The LightningModule: λ·CLM + (1−λ)·fusion on a target that may be sharded.

One batch is one optimizer step's share of this rank, as a list of micro-batches: both loss terms are divided once by
the counts of the whole step over all ranks, so neither accumulation nor the number of devices changes the gradient.
"""

import math
import time
from typing import Any

import lightning
import torch
import torch.distributed as distributed
from torch import Tensor

from fusion.config import Run, UserError, options_of
from fusion.data import Batch
from fusion.fusing import weights, winner
from fusion.objective import FusionLoss
from fusion.sharding import build_target
from fusion.topk import TopK


class FusionModule(lightning.LightningModule):
    """Trains `target` (a resolved model folder or hub name) on `steps` batches of the streams called `names`."""

    def __init__(self, config: Run, names: list[str], steps: int):
        super().__init__()
        self.automatic_optimization = False
        self.config, self.names, self.total_steps = config, names, steps
        self.fuse, self.options = options_of("fusion", config.fusion, "function")
        self.target = None
        self.clock = time.perf_counter()
        self.loss_average = math.nan
        self.validated_at = -1

    def configure_model(self) -> None:
        if self.target is None:
            mesh = self.device_mesh if self.config.trainer.strategy == "fsdp" else None
            self.target = build_target(self.config, mesh)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def fused(self, batch: Batch) -> TopK | None:
        """One distribution [B, T, K] out of all sources; None when there is nothing to fuse."""
        if not batch.distributions or self.weight_clm() == 1:
            return None
        streams = batch.distributions
        if self.config.objective.tail == "renormalize":
            streams = [d.renormalize() for d in streams]
        by_token = self.options.get("level") == "token"
        fused = self.fuse(streams, batch.ce_SBT if by_token else batch.ce_SB, **self.options)
        counted_BT = torch.nn.functional.pad(batch.labels_BT[:, 1:] != -100, (0, 1))
        return TopK(fused.ids, fused.logprobs.masked_fill(~counted_BT[..., None], -torch.inf))

    def loss(self, batch: Batch, fused: TopK | None, tokens: Tensor | None, fused_tokens: Tensor | None) -> FusionLoss:
        """The loss of a micro-batch; given counts are those of the whole step, else its own."""
        options = self.config.objective
        return self.target(
            batch.ids_BT,
            batch.labels_BT,
            fused,
            lambda_clm=self.weight_clm(),
            temperature=options.temperature,
            divergence=options.divergence,
            tail=options.tail,
            chunk=options.chunk,
            tokens=tokens,
            fused_tokens=fused_tokens,
        )

    def weight_clm(self) -> float:
        """λ now: constant, or linear from λ to 1 over the run."""
        weight = self.config.objective.lambda_clm
        if self.config.objective.schedule == "decay":
            weight += (1 - weight) * min(1.0, self.global_step / max(1, self.total_steps))
        return weight

    # --- training ----------------------------------------------------------------------------------------------------

    def training_step(self, micro_batches: list[Batch], index: int) -> None:
        waited = time.perf_counter() - self.clock
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        fused = [self.fused(batch) for batch in micro_batches]
        counts = torch.tensor(
            [
                sum(int((b.labels_BT[:, 1:] != -100).sum()) for b in micro_batches),
                sum(int(f.present[:, :-1].sum()) for f in fused if f is not None),
            ],
            dtype=torch.float64 if self.device.type == "cpu" else torch.float32,
            device=self.device,
        )
        counts = self.summed(counts)
        sums = torch.zeros(2, device=self.device, dtype=counts.dtype)
        for batch, f in zip(micro_batches, fused, strict=True):
            loss = self.loss(batch, f, counts[0], counts[1])
            # data-parallel gradients are averaged over the ranks, and ours are already divided by the global count
            self.manual_backward(loss.loss * self.trainer.world_size)
            sums += torch.stack([loss.clm_sum, loss.fusion_sum]).to(sums)
        clm, fusion = (self.summed(sums) / counts.clamp_min(1)).tolist()
        weight = self.weight_clm()
        total = weight * clm + (1 - weight) * fusion
        self.guard(total, micro_batches)
        norm = self.clip(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        now = time.perf_counter()
        figures = {"clm": clm, "fusion": fusion, "loss": total, "gradient_norm": norm, "lambda": weight}
        figures |= {"learning_rate": scheduler.get_last_lr()[0]}
        figures |= {"tokens_per_second": float(counts[0]) / (now - self.clock), "waiting": waited / (now - self.clock)}
        figures |= self.shares(micro_batches)
        if self.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.log_dict({f"train/{k}": v for k, v in figures.items()})
        shown = {"clm": clm, "fusion": fusion, "tokens/s": figures["tokens_per_second"]}
        self.log_dict(shown, prog_bar=True, logger=False)
        self.clock = time.perf_counter()

    def summed(self, value: Tensor) -> Tensor:
        """`value` added up over the ranks."""
        if self.trainer.world_size > 1:
            distributed.all_reduce(value)
        return value

    def guard(self, loss: float, micro_batches: list[Batch]) -> None:
        """Stop at a loss that is no number; say so when it jumps."""
        if not math.isfinite(loss):
            blocks = [int(b) for batch in micro_batches for b in batch.blocks_B]
            raise UserError(
                f"the loss is {loss} at step {self.global_step}, blocks {blocks}: lower optimizer.lr, or look at these "
                "blocks in the store; the last checkpoint is kept"
            )
        if loss > 2 * self.loss_average:
            self.print(f"step {self.global_step}: the loss jumped from {self.loss_average:.3f} to {loss:.3f}")
        self.loss_average = loss if math.isnan(self.loss_average) else 0.95 * self.loss_average + 0.05 * loss

    def clip(self, optimizer: Any) -> float:
        limit = self.config.optimizer.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.target.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def shares(self, micro_batches: list[Batch]) -> dict[str, float]:
        """What each stream contributed: the sequences it won (MinCE), or its mean weight (AvgCE); and its coverage."""
        if not self.names or not micro_batches[0].distributions:
            return {}
        ce_SB = torch.cat([b.ce_SB for b in micro_batches], 1)
        weighting = self.options.get("weighting")
        if weighting:
            share_S = weights(ce_SB, weighting).mean(1)
        else:
            share_S = torch.stack([(winner(ce_SB) == s).float().mean() for s in range(len(self.names))])
        counted = [(b.labels_BT != -100)[:, 1:] for b in micro_batches]
        positions = sum(int(c.sum()) for c in counted)
        figures = {f"share/{n}": float(s) for n, s in zip(self.names, share_S, strict=True)}
        for s, name in enumerate(self.names):
            present = sum(
                int((b.distributions[s].present[:, :-1] & c).sum()) for b, c in zip(micro_batches, counted, strict=True)
            )
            figures[f"coverage/{name}"] = present / max(1, positions)
        return figures

    # --- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device="cpu")

    def validation_step(self, batches: list[Batch], index: int) -> None:
        for batch in batches:
            loss = self.loss(batch, self.fused(batch), None, None)
            row = [loss.clm_sum, loss.fusion_sum, loss.tokens, loss.fused_tokens, batch.bytes_B.sum()]
            self.sums += torch.stack([torch.as_tensor(v).double().cpu() for v in row])

    def on_validation_epoch_end(self) -> None:
        clm, fusion, tokens, fused_tokens, size = self.summed(self.sums.to(self.device, torch.float32)).tolist()
        weight = self.config.objective.lambda_clm
        figures = {"clm": clm / max(1, tokens), "fusion": fusion / max(1, fused_tokens)}
        figures["loss"] = weight * figures["clm"] + (1 - weight) * figures["fusion"]
        figures["bits_per_byte"] = clm / math.log(2) / max(1, size)
        self.log_dict({f"validation/{k}": v for k, v in figures.items()})
        self.validated_at = self.global_step

    # --- optimizer ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.config.optimizer
        decayed = [p for p in self.target.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.target.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=tuple(options.betas), eps=options.eps)
        warmup = math.ceil(options.warmup_ratio * self.total_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
            if options.schedule == "cosine":
                return 0.5 * (1 + math.cos(math.pi * progress))
            return 1.0 if options.schedule == "constant" else 1 - progress

        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}

    # --- exact resume ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = torch.get_rng_state()
        checkpoint["loss_average"] = self.loss_average

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random_state"])
        self.loss_average = checkpoint["loss_average"]
