"""The loop of a supervised stage: AdamW, batches of similar length in a keyed order, the best weights kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apa_cli.errors import UserError
from apa_cli.randomness import Stream, permutation
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.stopping import Stopped, Stopping
from apa_cli.settings import FitSettings, Schedule

POOL = 16
"""Batches whose examples are sorted by length together."""


def batches(lengths: list[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The examples of one epoch in batches: shuffled, sorted by length within pools, the batches shuffled again."""
    order = permutation(len(lengths), seed, Stream.data_order, epoch).tolist()
    pool = batch * POOL
    pooled = [sorted(order[i : i + pool], key=lambda j: lengths[j]) for i in range(0, len(order), pool)]
    cut = [rows[i : i + batch] for rows in pooled for i in range(0, len(rows), batch)]
    return [cut[i] for i in permutation(len(cut), seed, Stream.minibatch_order, epoch)]


@dataclass(frozen=True)
class Workplace:
    """Where a stage computes and writes, and to whom it reports."""

    device: torch.device
    folder: Path
    """Of the finished model."""
    say: Callable[[str], None]
    progress: Callable[[int, int, float], None]
    """Called with (step, steps, loss) after each optimiser step."""
    record: Callable[[dict[str, float]], None] = lambda row: None
    """Takes the figures of each evaluation."""
    checkpoints: Path | None = None
    """Folder for checkpoints; None: none are kept."""
    resume: Path | None = None
    """The checkpoint to go on from."""
    stopping: Stopping | None = None
    """Who asks the stage to end early, after a step, with a checkpoint; None: nobody."""


def factor(settings: FitSettings, step: int, total: int) -> float:
    """What the learning rate is multiplied by at optimiser step `step` (counted from 0) of `total`."""
    warmup = max(1, round(total * settings.warmup_ratio))
    done = max(0, step - warmup) / max(1, total - warmup)
    decay = {
        Schedule.constant: 1.0,
        Schedule.linear: 1 - done,
        Schedule.cosine: 0.5 * (1 + math.cos(math.pi * done)),
    }[settings.lr_scheduler]
    return min((step + 1) / warmup, decay)


def fit(
    model: nn.Module,
    loss: Callable[[list[int]], Tensor],
    measure: Callable[[], dict[str, float]],
    lengths: list[int],
    settings: FitSettings,
    seed: int,
    place: Workplace,
) -> dict[str, float]:
    """Minimises `loss(indices of a batch)`, a scalar, over the weights that require a gradient.

    `measure()` gives held-out figures, the lower its "eval/loss" the better: every `eval_every` steps and at the
    end. The model is left with the weights that measured best, and their figures are returned. `Stopped` where
    `place.stopping` ended it before its last step, saved.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    steps = math.ceil(len(lengths) / settings.batch_size)
    total, step = settings.epochs * steps, 0
    best: dict[str, float] = {}
    best_tensors: dict[str, Tensor] = {}
    if place.resume is not None:
        tensors, state = checkpoints.load(place.resume)
        checkpoints.load_module(model, tensors["model"], trained_only=True)
        checkpoints.load_optimizer(optimizer, tensors["optimizer"])
        step, best, best_tensors = state["step"], state["best"], tensors.get("best", {})

    def save() -> None:
        groups = {
            "model": checkpoints.module_tensors(model, trained_only=True),
            "optimizer": checkpoints.optimizer_tensors(optimizer),
            **({"best": best_tensors} if best_tensors else {}),
        }
        path = checkpoints.save(place.checkpoints, step, groups, {"step": step, "best": best})
        checkpoints.prune(place.checkpoints, 1, None)
        place.say(f"checkpoint: {path}")

    if place.stopping is not None:
        place.stopping.listen()
    while step < total:
        epoch, first = divmod(step, steps)
        for rows in batches(lengths, settings.batch_size, seed, epoch)[first:]:
            optimizer.param_groups[0]["lr"] = settings.lr * factor(settings, step, total)
            value = loss(rows)
            value.backward()
            norm = float(nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
            if not math.isfinite(norm):
                raise UserError(f"step {step + 1}: the gradient norm is {norm}; lower the learning rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            train_loss = float(value.detach())
            place.progress(step, total, train_loss)
            if step == total or (settings.eval_every and step % settings.eval_every == 0):
                figures = {"iteration": step, "loss": train_loss, **measure()}
                place.record(figures)
                if settings.eval_every:
                    shown = ", ".join(f"{name} {figures[name]:.4g}" for name in figures if name.startswith("eval/"))
                    place.say(f"step {step}/{total}: {shown}")
                if not best or figures["eval/loss"] < best["eval/loss"]:
                    best = figures
                    best_tensors = {n: t.clone() for n, t in checkpoints.module_tensors(model, True).items()}
            may_stop = place.stopping is not None and place.checkpoints is not None and step < total
            why = place.stopping.requested if may_stop else None
            due = settings.checkpoint_every and step % settings.checkpoint_every == 0
            if place.checkpoints and (due or why):
                save()
            if why:
                raise Stopped(f"stopped by {why} after step {step} of {total}, saved", place.stopping.status())
    checkpoints.load_module(model, best_tensors, trained_only=True)
    return best
