"""The training loop of a supervised stage: AdamW, batches of similar length in a keyed order, the best weights kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from apa_cli.errors import UserError
from apa_cli.randomness import Stream, sample_permutation
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.resume import INPUTS
from apa_cli.runs.stopping import GracefulStop, RunStopped
from apa_cli.settings import LRScheduler, SupervisedSettings

BATCHES_PER_POOL = 16
"""Number of batches whose examples are sorted by length together."""
ADAMW_BETAS = (0.9, 0.95)
"""AdamW's decay rates, as in conf/config.yaml for RL."""

SayFunction = Callable[[str], None]
"""Function that shows and logs one line."""
ProgressFunction = Callable[[int, int, float], None]
"""Function of (step, steps, loss), called after each optimizer step."""


@dataclass(frozen=True)
class StageContext:
    """The device of a stage, the folders it writes to, and the functions it reports to."""

    device: torch.device
    model_folder: Path
    """Folder that receives the trained model."""
    say: SayFunction
    report_progress: ProgressFunction
    record: Callable[[dict[str, float]], None] = lambda row: None
    """Function of the metrics of each evaluation."""
    checkpoint_folder: Path | None = None
    """Folder of the checkpoints; None: no checkpoint is saved."""
    resume_from: Path | None = None
    """The checkpoint to continue from; None: training starts at step 0."""
    stopping: GracefulStop | None = None
    """Signal handler that is read after each step; a signal saves and ends the stage. None: signals are not handled."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digest of each input by its key, which checkpoints record."""


def shuffle_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the indices of one epoch's examples in batches of similar length.

    The shuffled examples are sorted by length within pools of BATCHES_PER_POOL batches; then the batches are shuffled.
    """
    order = sample_permutation(len(lengths), seed, Stream.data_order, epoch).tolist()
    pool_size = batch_size * BATCHES_PER_POOL
    pools = [sorted(order[i : i + pool_size], key=lambda j: lengths[j]) for i in range(0, len(order), pool_size)]
    batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in sample_permutation(len(batches), seed, Stream.minibatch_order, epoch)]


def compute_stage_lr_factor(settings: SupervisedSettings, step: int, total: int) -> float:
    """Return the factor of the learning rate at optimizer step `step` (counted from 0) of `total`.

    Unlike the schedule of `training.updater`, warm-up takes at least one step, even at warmup_ratio 0.
    """
    warmup = max(1, round(total * settings.warmup_ratio))
    progress = max(0, step - warmup) / max(1, total - warmup)
    decay = {
        LRScheduler.constant: 1.0,
        LRScheduler.linear: 1 - progress,
        LRScheduler.cosine: 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.lr_scheduler]
    return min((step + 1) / warmup, decay)


class SupervisedTrainer:
    """A model under supervised training: its optimizer, the steps done, and the best weights so far."""

    def __init__(self, model: nn.Module, settings: SupervisedSettings, steps: int, context: StageContext):
        self.model, self.settings, self.context = model, settings, context
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=ADAMW_BETAS, weight_decay=settings.weight_decay, fused=True
        )
        self.steps = steps
        """Total number of optimizer steps."""
        self.step = 0
        """Optimizer steps done."""
        self.best: dict[str, float] = {}
        """Metrics of the evaluation with the lowest eval/loss; empty before the first."""
        self.best_tensors: dict[str, Tensor] = {}
        """The trained weights at that evaluation."""

    def load(self, checkpoint: Path) -> None:
        """Restore weights, optimizer, step and best weights from a checkpoint."""
        tensors, state = checkpoints.load_checkpoint(checkpoint)
        checkpoints.load_module(self.model, tensors["model"], trained_only=True)
        checkpoints.load_optimizer(self.optimizer, tensors["optimizer"])
        self.step, self.best, self.best_tensors = state["step"], state["best"], tensors.get("best", {})

    def save(self, folder: Path) -> None:
        """Save a checkpoint in `folder` and delete the earlier ones."""
        groups = {
            "model": checkpoints.gather_module_tensors(self.model, trained_only=True),
            "optimizer": checkpoints.gather_optimizer_tensors(self.optimizer),
            **({"best": self.best_tensors} if self.best_tensors else {}),
        }
        state = {"step": self.step, "best": self.best, INPUTS: self.context.inputs}
        path = checkpoints.save_checkpoint(folder, self.step, groups, state)
        checkpoints.prune_checkpoints(folder, 1, None)
        self.context.say(f"checkpoint: {path}")

    def train_step(self, compute_loss: Callable[[list[int]], Tensor], rows: list[int]) -> float:
        """Take an optimizer step on examples `rows` and return the loss. Raise UserError for a non-finite gradient."""
        factor = compute_stage_lr_factor(self.settings, self.step, self.steps)
        self.optimizer.param_groups[0]["lr"] = self.settings.lr * factor
        loss = compute_loss(rows)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        if not math.isfinite(norm):
            raise UserError(f"step {self.step + 1}: the gradient norm is {norm}; lower the learning rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def is_evaluation_due(self) -> bool:
        """Return True after every `eval_every` steps and after the last."""
        every = self.settings.eval_every
        return self.step == self.steps or bool(every and self.step % every == 0)

    def evaluate(self, measure: Callable[[], dict[str, float]], train_loss: float) -> None:
        """Record the metrics that `measure` returns and keep the weights if their eval/loss is the lowest so far."""
        metrics = {"iteration": self.step, "loss": train_loss, **measure()}
        self.context.record(metrics)
        if self.settings.eval_every:
            text = ", ".join(f"{name} {metrics[name]:.4g}" for name in metrics if name.startswith("eval/"))
            self.context.say(f"step {self.step}/{self.steps}: {text}")
        if not self.best or metrics["eval/loss"] < self.best["eval/loss"]:
            tensors = checkpoints.gather_module_tensors(self.model, trained_only=True)
            self.best, self.best_tensors = metrics, {name: tensor.clone() for name, tensor in tensors.items()}

    def save_or_stop(self) -> None:
        """Save every `checkpoint_every` steps, and before the last step also on a signal, which raises RunStopped."""
        folder, stopping = self.context.checkpoint_folder, self.context.stopping
        if folder is None:
            return
        signal = stopping.signal_name if stopping is not None and self.step < self.steps else None
        every = self.settings.checkpoint_every
        if signal or (every and self.step % every == 0):
            self.save(folder)
        if signal and stopping is not None:
            raise RunStopped(f"stopped by {signal} after step {self.step} of {self.steps}, saved", stopping.exit_status)


def fit(
    model: nn.Module,
    compute_loss: Callable[[list[int]], Tensor],
    measure: Callable[[], dict[str, float]],
    lengths: list[int],
    settings: SupervisedSettings,
    seed: int,
    context: StageContext,
) -> dict[str, float]:
    """Minimize a loss over the weights that require a gradient; return the metrics of the best evaluation.

    `compute_loss(indices)` returns the scalar loss of a batch of the examples, whose `lengths` are in tokens.
    `measure()` returns held-out metrics, the lower its "eval/loss" the better: every `eval_every` steps and after the
    last step. The model is left with the weights of the best evaluation. Raise RunStopped, after saving, if
    `context.stopping` received a signal before the last step.
    """
    steps_per_epoch = math.ceil(len(lengths) / settings.batch_size)
    trainer = SupervisedTrainer(model, settings, settings.epochs * steps_per_epoch, context)
    if context.resume_from is not None:
        trainer.load(context.resume_from)
    if context.stopping is not None:
        context.stopping.listen()
    while trainer.step < trainer.steps:
        epoch, first = divmod(trainer.step, steps_per_epoch)
        for rows in shuffle_batches(lengths, settings.batch_size, seed, epoch)[first:]:
            loss = trainer.train_step(compute_loss, rows)
            context.report_progress(trainer.step, trainer.steps, loss)
            if trainer.is_evaluation_due():
                trainer.evaluate(measure, loss)
            trainer.save_or_stop()
    checkpoints.load_module(model, trainer.best_tensors, trained_only=True)
    return trainer.best
