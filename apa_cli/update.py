"""The update of one iteration: minibatches, gradient accumulation, two gradient norms, one AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apa_cli.algorithms.base import Algorithm
from apa_cli.models.forward import TrainingModel, compute_precision
from apa_cli.randomness import Stream, permutation
from apa_cli.settings import DType, OptimizerSettings, RunSettings, Schedule, UpdateOrder
from apa_cli.tensor_ops import masked_sum
from apa_cli.types import Batch, Rollout, UserError


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
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    if settings.schedule is Schedule.linear:
        return max(0.0, 1 - done)
    if settings.schedule is Schedule.cosine:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def minibatch_rows(run: RunSettings, iteration: int) -> Iterator[Tensor]:
    """The rows of each minibatch of an iteration, in the order of `update_order`, shuffled by key."""

    def shuffled(epoch: int) -> list[Tensor]:
        order = permutation(run.rollout_batch, run.seed, Stream.minibatch_order, iteration, epoch)
        return list(torch.from_numpy(order).split(run.minibatch))

    if run.update_order is UpdateOrder.epochs:
        for epoch in range(run.epochs):
            yield from shuffled(epoch)
    else:
        for rows in shuffled(0):
            for _ in range(run.epochs):
                yield rows


def microbatch_rows(batch: Batch | Rollout, size: int) -> tuple[Tensor, ...]:
    """The rows of each microbatch: sequences of similar length, `size` at a time."""
    order = (batch.prompt_mask.sum(-1) + batch.mask.sum(-1)).argsort(stable=True)
    return order.split(size)


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

    def result(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()} | self.maxima


@dataclass
class Updater:
    """Trains the models on one prepared rollout batch."""

    algorithm: Algorithm
    model: TrainingModel
    optimizer: torch.optim.AdamW
    run: RunSettings
    settings: OptimizerSettings
    dtype: DType
    device: torch.device

    @property
    def steps_per_iteration(self) -> int:
        return self.run.epochs * self.run.rollout_batch // self.run.minibatch

    def update(self, batch: Batch, iteration: int) -> dict[str, float]:
        """All optimiser steps of one iteration (counted from 1); the metrics are means over them."""
        metrics = StepMetrics()
        for number, rows in enumerate(minibatch_rows(self.run, iteration)):
            step = (iteration - 1) * self.steps_per_iteration + number
            factor = schedule_factor(self.settings, step, self.run.iterations * self.steps_per_iteration)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            minibatch = self.algorithm.prepare_minibatch(batch.rows(rows))
            for name, value in minibatch.metrics.items():
                metrics.add(name, value)
            self.accumulate(minibatch, metrics, first=number == 0)
            self.step(metrics, iteration, number)
        metrics.add("optimizer/lr", self.optimizer.param_groups[0]["lr"])
        return metrics.result()

    def accumulate(self, minibatch: Batch, metrics: StepMetrics, first: bool) -> None:
        """Gradients of the whole minibatch: each term is summed over microbatches and divided by its mask's count.

        Before the first step of an iteration the trained policy is the one that sampled, so the difference
        of their log-probs is rounding: policy/sampler_gap, where the trainer has not measured it already.
        """
        counts = {name: max(int(mask.sum()), 1) for name, mask in minibatch.masks.items()}
        totals: dict[str, float] = {}
        gap = 0.0
        for rows in microbatch_rows(minibatch, self.run.microbatch):
            micro = to_device(minibatch.rows(rows), self.device)
            with compute_precision(self.device, self.dtype):
                output = self.model(micro)
            loss = self.algorithm.loss(micro, output)
            objective = output.logprobs.new_zeros(())
            for term in loss.terms:
                part = masked_sum(term.values, micro.masks[term.mask]) / counts[term.mask]
                objective = objective + term.weight * part
                totals[f"loss/{term.name}"] = totals.get(f"loss/{term.name}", 0.0) + float(part.detach())
            objective.backward()
            for name, metric in loss.metrics.items():
                mask = micro.masks[metric.mask]
                if metric.reduce == "max":
                    metrics.largest(name, float(metric.values[mask].max()) if bool(mask.any()) else -math.inf)
                else:
                    part = float(masked_sum(metric.values, mask)) / counts[metric.mask]
                    totals[name] = totals.get(name, 0.0) + part
            old = micro.sampler_logprobs if micro.old_logprobs is None else micro.old_logprobs
            difference = (output.logprobs.detach() - old)[micro.mask]
            if difference.numel():
                metrics.largest("policy/ratio_max", float(difference.max().exp()))
            gap += float(difference.abs().sum())
        if first and minibatch.old_logprobs is None:
            metrics.add("policy/sampler_gap", gap / max(int(minibatch.mask.sum()), 1))
        for name, value in totals.items():
            metrics.add(name, value)

    def step(self, metrics: StepMetrics, iteration: int, number: int) -> None:
        """Clips each group's gradient norm, steps, and clears the gradients."""
        names = ("optimizer/grad_norm", "optimizer/critic_grad_norm")
        for name, group in zip(names, self.optimizer.param_groups, strict=False):
            norm = float(nn.utils.clip_grad_norm_(group["params"], self.settings.max_grad_norm))
            if not math.isfinite(norm):
                raise UserError(
                    f"iteration {iteration}, update {number + 1}: {name} is {norm}; nothing was changed by this update"
                )
            metrics.add(name, norm)
        if iteration <= self.settings.critic_warmup_iterations:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
