"""The update of one iteration: minibatches, gradient accumulation, two gradient norms, one AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apa_cli.algorithms.base import Algorithm
from apa_cli.distributed.world import ALONE, World
from apa_cli.errors import UserError
from apa_cli.hardware.oom import Halving, OutOfMemoryElsewhere, out_of_memory
from apa_cli.models.forward import TrainingModel, compute_precision
from apa_cli.models.sharding import whole
from apa_cli.randomness import Stream, permutation
from apa_cli.settings import DType, OptimizerSettings, RunSettings, Schedule, UpdateOrder
from apa_cli.tensor_ops import masked_sum
from apa_cli.types import Batch, Rollout


class UnusableUpdate(UserError):
    """Update `number` of an iteration has a loss or gradient that is not finite; `rows` are those of its minibatch."""

    def __init__(self, message: str, number: int, rows: Tensor):
        super().__init__(message)
        self.number, self.rows = number, rows


def stop(error: UserError) -> None:
    """What is done about an unusable update unless something else is asked for: the run ends."""
    raise error


def build_optimizer(model: TrainingModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """One AdamW; group 0 is the policy, group 1 the critics (where there are any). One pass over each tensor."""
    groups = [{"params": model.policy_parameters(), "lr": settings.lr, "base_lr": settings.lr}]
    if model.critic_parameters():
        groups.append({"params": model.critic_parameters(), "lr": settings.critic_lr, "base_lr": settings.critic_lr})
    return torch.optim.AdamW(
        groups, betas=tuple(settings.betas), eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


def schedule_factor(settings: OptimizerSettings, step: int, total: int) -> float:
    """What the learning rates are multiplied by at optimiser step `step` (counted from 0) of `total`."""
    warmup = round(settings.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if settings.lr_scheduler is Schedule.linear:
        return max(0.0, 1 - done)
    if settings.lr_scheduler is Schedule.cosine:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def minibatch_rows(run: RunSettings, iteration: int) -> Iterator[Tensor]:
    """The rows of each minibatch of an iteration, in the order of `update_order`, shuffled by key."""

    def shuffled(epoch: int) -> list[Tensor]:
        order = permutation(run.rollout_batch_size, run.seed, Stream.minibatch_order, iteration, epoch)
        return list(torch.from_numpy(order).split(run.minibatch_size))

    if run.update_order is UpdateOrder.epochs:
        for epoch in range(run.update_epochs):
            yield from shuffled(epoch)
    else:
        for rows in shuffled(0):
            for _ in range(run.update_epochs):
                yield rows


def microbatch_rows(batch: Batch | Rollout, size: int, world: World = ALONE) -> tuple[Tensor, ...]:
    """The rows of each microbatch of this process: sequences of similar length, `size` at a time.

    The processes take turns in the order of lengths, so that each has as much to do.
    """
    order = (batch.prompt_mask.sum(-1) + batch.mask.sum(-1)).argsort(stable=True)
    return order[world.rank :: world.size].split(size)


def to_device(batch: Batch, device: torch.device) -> Batch:
    def moved(value):
        if isinstance(value, Tensor):
            return value.to(device)
        return {name: moved(entry) for name, entry in value.items()} if isinstance(value, dict) else value

    return batch.with_(**{name: moved(value) for name, value in vars(batch).items() if name != "metrics"})


@dataclass
class StepMetrics:
    """Metrics of the optimiser steps of one iteration: means, or maxima."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def largest(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def join(self, other: StepMetrics) -> None:
        """Takes over what another one has gathered."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]
        for name, value in other.maxima.items():
            self.largest(name, value)

    def result(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()} | self.maxima


@dataclass
class Part:
    """What one process adds to the metrics of one optimiser step."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def largest(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)


@dataclass
class Updater:
    """Trains the models on one prepared rollout batch."""

    algorithm: Algorithm
    model: nn.Module
    """The `TrainingModel`, with several processes under what averages its gradients over them."""
    optimizer: torch.optim.AdamW
    run: RunSettings
    settings: OptimizerSettings
    dtype: DType
    device: torch.device
    microbatch: Halving
    world: World = ALONE

    @property
    def steps_per_iteration(self) -> int:
        return self.run.update_epochs * self.run.rollout_batch_size // self.run.minibatch_size

    def update(
        self, batch: Batch, iteration: int, on_fault: Callable[[UnusableUpdate], None] = stop
    ) -> dict[str, float]:
        """All optimiser steps of one iteration (counted from 1); the metrics are means over them.

        An update whose loss or gradient is not finite changes nothing. `on_fault` is told of it, and unless that ends
        the run, the update is left out of the metrics and the next one follows.
        """
        metrics, parts = StepMetrics(), []
        for number, rows in enumerate(minibatch_rows(self.run, iteration)):
            step = (iteration - 1) * self.steps_per_iteration + number
            factor = schedule_factor(self.settings, step, self.run.iterations * self.steps_per_iteration)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            minibatch = self.algorithm.prepare_minibatch(batch.rows(rows))
            own = StepMetrics()
            for name, value in minibatch.metrics.items():
                own.add(name, value)
            part = self.accumulate(minibatch, first=number == 0)
            if self.step(own, iteration):
                metrics.join(own)
                parts.append(part)
            else:
                found = self.joined([part]).result() | own.result()
                wrong = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
                message = f"iteration {iteration}, update {number + 1}: {', '.join(wrong)}"
                on_fault(UnusableUpdate(f"{message}; nothing was changed by this update", number + 1, rows))
        metrics.join(self.joined(parts))
        metrics.add("optimizer/lr", self.optimizer.param_groups[0]["lr"])
        return metrics.result()

    def joined(self, parts: list[Part]) -> StepMetrics:
        """Metrics of optimiser steps to which every process has added its part."""
        metrics = StepMetrics()
        for step in zip(*self.world.gather(parts), strict=True):
            for name in step[0].sums:
                metrics.add(name, sum(part.sums[name] for part in step))
            for name in step[0].maxima:
                metrics.largest(name, max(part.maxima[name] for part in step))
        return metrics

    def accumulate(self, minibatch: Batch, first: bool) -> Part:
        """Gradients of the whole minibatch: each term is summed over microbatches and divided by its mask's count.

        Returns what this process's sequences add to the metrics. Where memory runs out it is done again with
        smaller microbatches.
        """

        def attempt(size: int) -> Part:
            self.optimizer.zero_grad(set_to_none=True)
            return self.gradients(minibatch, microbatch_rows(minibatch, size, self.world), first)

        return self.microbatch.run(attempt)

    def gradients(self, minibatch: Batch, microbatches: Sequence[Tensor], first: bool) -> Part:
        """One backward pass for each microbatch; in the last the gradients of all processes are averaged.

        Before the first step of an iteration the trained policy is the one that sampled, so the difference
        of their log-probs is rounding: policy/sampler_gap, where the trainer has not measured it already.
        """
        counts = {name: max(int(mask.sum()), 1) for name, mask in minibatch.masks.items()}
        part = Part()
        gap_count = max(int(minibatch.mask.sum()), 1) if first and minibatch.old_logprobs is None else 0
        full: RuntimeError | None = None
        try:
            for rows in microbatches[:-1]:
                with self.alone():
                    self.objective(minibatch.rows(rows), counts, gap_count, part).backward()
            objective = self.objective(minibatch.rows(microbatches[-1]), counts, gap_count, part)
        except RuntimeError as error:
            if not out_of_memory(error) or self.microbatch.size <= self.microbatch.smallest:
                raise
            full = error
        if self.world.any(full is not None):
            if hasattr(self.model, "reducer"):  # DistributedDataParallel, a forward pass of which gets no backward pass
                self.model.reducer._reset_state()
            try:
                raise full or OutOfMemoryElsewhere("out of memory in another process")
            finally:
                full = None  # the traceback holds this frame
        try:
            objective.backward()
        except RuntimeError as error:
            if self.world.size > 1 and out_of_memory(error):  # the others are amid their exchange of gradients
                raise self.microbatch.exhausted() from error
            raise
        return part

    def alone(self) -> AbstractContextManager[None]:
        """Backward passes in the block leave gradients on their process."""
        return self.model.no_sync() if hasattr(self.model, "no_sync") else nullcontext()

    def objective(self, rows: Batch, counts: dict[str, int], gap_count: int, part: Part) -> Tensor:
        """The scalar whose gradients, summed over all microbatches and processes, are the loss's.

        Processes average gradients, so it is multiplied by their number. `part` gets the metrics;
        policy/sampler_gap among them as a sum over `gap_count` tokens (0: not measured).
        """
        micro = to_device(rows, self.device)
        with compute_precision(self.device, self.dtype):
            output = self.model(micro)
        loss = self.algorithm.loss(micro, output)
        objective = output.logprobs.new_zeros(())
        for term in loss.terms:
            value = masked_sum(term.values, micro.masks[term.mask]) / counts[term.mask]
            objective = objective + term.weight * value
            part.add(f"loss/{term.name}", float(value.detach()))
        for name, metric in loss.metrics.items():
            mask = micro.masks[metric.mask]
            if metric.reduce == "max":
                part.largest(name, float(metric.values[mask].max()) if bool(mask.any()) else -math.inf)
            else:
                part.add(name, float(masked_sum(metric.values, mask)) / counts[metric.mask])
        old = micro.sampler_logprobs if micro.old_logprobs is None else micro.old_logprobs
        difference = (output.logprobs.detach() - old)[micro.mask]
        part.largest("policy/ratio_max", float(difference.max().exp()) if difference.numel() else -math.inf)
        if gap_count:
            part.add("policy/sampler_gap", float(difference.abs().sum()) / gap_count)
        if not bool(objective.isfinite()):  # its gradient may be: let all processes see it in the gradient's norm
            objective = objective * math.nan
        return objective * self.world.size

    def step(self, metrics: StepMetrics, iteration: int) -> bool:
        """Clips each group's gradient norm, steps, and clears the gradients.

        Where a norm is not finite there is no step; returns whether there was one. Gradients are those of all
        processes together, so each of them decides the same.
        """
        names = ("optimizer/grad_norm", "optimizer/critic_grad_norm")
        for name, group in zip(names, self.optimizer.param_groups, strict=False):
            metrics.add(name, float(whole(nn.utils.clip_grad_norm_(group["params"], self.settings.max_grad_norm))))
        found = metrics.result()
        usable = all(math.isfinite(found[name]) for name in names if name in found)
        if usable:
            if iteration <= self.settings.critic_warmup_iterations:
                for parameter in self.optimizer.param_groups[0]["params"]:
                    parameter.grad = None
            try:
                self.optimizer.step()
            except RuntimeError as error:
                if out_of_memory(error):  # after half a step there is nothing to do again
                    raise UserError(f"iteration {iteration}: out of memory in the optimizer's step") from error
                raise
        self.optimizer.zero_grad(set_to_none=True)
        return usable
