"""Update of one iteration: minibatches, gradient accumulation, gradient clipping per parameter group, AdamW."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apa_cli.algorithms.base import Algorithm
from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.errors import UserError
from apa_cli.hardware.oom import BatchSizeHalver, OtherRankOutOfMemory, is_out_of_memory
from apa_cli.models.forward import TrainingModel, autocast_to
from apa_cli.models.sharding import gather_full_tensor
from apa_cli.randomness import Stream, sample_permutation
from apa_cli.settings import DType, LRScheduler, OptimizerSettings, RunSettings, UpdateOrder
from apa_cli.tensor_ops import masked_sum
from apa_cli.types import Batch, Rollout

GRAD_NORMS = ("optimizer/grad_norm", "optimizer/critic_grad_norm")
"""Metrics of the gradient norms of the optimizer's groups."""


class NonFiniteUpdate(UserError):
    """Loss or gradient that is not finite.

    `number` is the update's number in its iteration, from 1; `rows` are the rows of its minibatch.
    """

    def __init__(self, message: str, number: int, rows: Tensor):
        super().__init__(message)
        self.number, self.rows = number, rows


def raise_fault(error: NonFiniteUpdate) -> None:
    """Raise the error, which ends the run (the default fault handler)."""
    raise error


def build_optimizer(model: TrainingModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return one fused AdamW; group 0 is the policy, group 1 the critics if there are any."""
    groups = [{"params": model.policy_parameters(), "lr": settings.lr, "base_lr": settings.lr}]
    if model.critic_parameters():
        groups.append({"params": model.critic_parameters(), "lr": settings.critic_lr, "base_lr": settings.critic_lr})
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(
        groups, betas=(beta1, beta2), eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


def compute_lr_factor(settings: OptimizerSettings, step: int, total: int) -> float:
    """Return the factor of the learning rates at optimizer step `step`, counted from 0, of `total`."""
    warmup = round(settings.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.lr_scheduler is LRScheduler.linear:
        return max(0.0, 1 - progress)
    if settings.lr_scheduler is LRScheduler.cosine:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def split_into_minibatches(run: RunSettings, iteration: int) -> Iterator[Tensor]:
    """Yield the rows of each minibatch of an iteration, int64 [minibatch_size], in the order of `update_order`.

    The shuffle is keyed by the seed, the iteration and the epoch.
    """

    def shuffle(epoch: int) -> list[Tensor]:
        order = sample_permutation(run.rollout_batch_size, run.seed, Stream.minibatch_order, iteration, epoch)
        return list(torch.from_numpy(order).split(run.minibatch_size))

    if run.update_order is UpdateOrder.epochs:
        for epoch in range(run.update_epochs):
            yield from shuffle(epoch)
    else:
        for rows in shuffle(0):
            for _ in range(run.update_epochs):
                yield rows


def split_into_microbatches(batch: Batch | Rollout, size: int, world: World = SINGLE_PROCESS) -> tuple[Tensor, ...]:
    """Return the rows of each microbatch of this rank: sequences of similar length, `size` at a time.

    The ranks take turns in the order of lengths, so that they have similar work.
    """
    order = (batch.prompt_mask.sum(-1) + batch.mask.sum(-1)).argsort(stable=True)
    return order[world.rank :: world.size].split(size)


def move_batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`."""

    def move(value):
        if isinstance(value, Tensor):
            return value.to(device)
        return {name: move(entry) for name, entry in value.items()} if isinstance(value, dict) else value

    return batch.replace(**{name: move(value) for name, value in vars(batch).items() if name != "metrics"})


@dataclass
class StepMetrics:
    """Metrics of one optimizer step, or one rank's share of them: sums and maxima by name."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Add `value` to the sum `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + value

    def raise_maximum(self, name: str, value: float) -> None:
        """Set the maximum `name` to `value` if it is lower."""
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def list_nonfinite(self) -> list[str]:
        """Return "NAME is VALUE" for every number that is not finite."""
        values = {**self.sums, **self.maxima}
        return [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]


def reduce_over_ranks(ranks: Sequence[StepMetrics]) -> StepMetrics:
    """Return the metrics of a step from the share of every rank: sums of sums, maxima of maxima."""
    return StepMetrics(
        {name: sum(rank.sums[name] for rank in ranks) for name in ranks[0].sums},
        {name: max(rank.maxima[name] for rank in ranks) for name in ranks[0].maxima},
    )


def average_over_steps(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Return the mean of each sum over the steps that have it, and the largest of each maximum."""
    total = StepMetrics()
    for step in steps:
        for name, value in step.sums.items():
            total.add(name, value)
        for name, value in step.maxima.items():
            total.raise_maximum(name, value)
    counts = Counter(name for step in steps for name in step.sums)
    return {name: value / counts[name] for name, value in total.sums.items()} | total.maxima


@dataclass
class Updater:
    """Optimizer steps on one prepared rollout batch at a time."""

    algorithm: Algorithm
    model: nn.Module
    """The `TrainingModel`, with several ranks under the wrapper that averages its gradients over them."""
    optimizer: torch.optim.AdamW
    run: RunSettings
    settings: OptimizerSettings
    dtype: DType
    device: torch.device
    microbatch: BatchSizeHalver
    """Sequences per forward pass and rank."""
    world: World = SINGLE_PROCESS

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps per iteration."""
        return self.run.update_epochs * self.run.rollout_batch_size // self.run.minibatch_size

    def update(
        self, batch: Batch, iteration: int, on_fault: Callable[[NonFiniteUpdate], None] = raise_fault
    ) -> dict[str, float]:
        """Run all optimizer steps of an iteration, counted from 1, and return the means of their metrics.

        A step whose loss or gradient is not finite changes no weight. `on_fault` gets the error; if it returns, the
        step is left out of the metrics and the next one follows.
        """
        rank_shares, common_metrics = [], []
        for number, rows in enumerate(split_into_minibatches(self.run, iteration)):
            self.set_learning_rates((iteration - 1) * self.steps_per_iteration + number)
            minibatch = self.algorithm.prepare_minibatch(batch.select_rows(rows))
            share = self.accumulate_gradients(minibatch, is_first=number == 0)
            # These metrics are equal on every rank, so they are not part of the share that is summed over ranks.
            common = StepMetrics({**minibatch.metrics, **self.clip_gradients()})
            if all(math.isfinite(common.sums[name]) for name in GRAD_NORMS if name in common.sums):
                self.step_optimizer(iteration)
                rank_shares.append(share)
                common_metrics.append(common)
            else:
                faults = [*self.gather_steps([share])[0].list_nonfinite(), *common.list_nonfinite()]
                message = f"iteration {iteration}, update {number + 1}: {', '.join(faults)}"
                on_fault(NonFiniteUpdate(f"{message}; nothing was changed by this update", number + 1, rows))
            self.optimizer.zero_grad(set_to_none=True)
        metrics = average_over_steps(common_metrics) | average_over_steps(self.gather_steps(rank_shares))
        return metrics | {"optimizer/lr": self.optimizer.param_groups[0]["lr"]}

    def set_learning_rates(self, step: int) -> None:
        """Set the learning rates of optimizer step `step`, counted from 0 over the whole run."""
        factor = compute_lr_factor(self.settings, step, self.run.iterations * self.steps_per_iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def gather_steps(self, shares: list[StepMetrics]) -> list[StepMetrics]:
        """Return the metrics of optimizer steps from the shares of all ranks."""
        return [reduce_over_ranks(ranks) for ranks in zip(*self.world.all_gather(shares), strict=True)]

    def accumulate_gradients(self, minibatch: Batch, is_first: bool) -> StepMetrics:
        """Set the gradients of the whole minibatch, and return this rank's share of the step's metrics.

        Each loss term is summed over microbatches and ranks and divided once by the count of its mask. If memory
        runs out, the minibatch is repeated with smaller microbatches. `is_first`: no step of the iteration precedes.
        """

        def attempt(size: int) -> StepMetrics:
            self.optimizer.zero_grad(set_to_none=True)
            return self.run_backward(minibatch, split_into_microbatches(minibatch, size, self.world), is_first)

        return self.microbatch.run(attempt)

    def run_backward(self, minibatch: Batch, microbatches: Sequence[Tensor], is_first: bool) -> StepMetrics:
        """Run one backward pass per microbatch; the last one averages the gradients over the ranks.

        Before the first step of an iteration the trained policy is the policy that sampled, so their log-probs differ
        by rounding only: policy/sampler_gap. With old log-probs the trainer computes the gap from those.
        """
        counts = {name: max(int(mask.sum()), 1) for name, mask in minibatch.masks.items()}
        share = StepMetrics()
        gap_count = max(int(minibatch.mask.sum()), 1) if is_first and minibatch.old_logprobs is None else 0
        memory_error: RuntimeError | None = None
        try:
            for rows in microbatches[:-1]:
                with self.skip_gradient_sync():
                    self.compute_objective(minibatch.select_rows(rows), counts, gap_count, share).backward()
            objective = self.compute_objective(minibatch.select_rows(microbatches[-1]), counts, gap_count, share)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.microbatch.size <= self.microbatch.min_size:
                raise
            memory_error = error
        if self.world.any_rank(memory_error is not None):
            reducer: Any = getattr(self.model, "reducer", None)
            if reducer is not None:  # DistributedDataParallel's; its last forward pass gets no backward pass
                reducer._reset_state()
            try:
                raise memory_error or OtherRankOutOfMemory("out of memory on another rank")
            finally:
                memory_error = None  # its traceback holds this frame
        try:
            objective.backward()
        except RuntimeError as error:
            if self.world.size > 1 and is_out_of_memory(error):  # the other ranks are exchanging gradients by now
                raise self.microbatch.make_error() from error
            raise
        return share

    def skip_gradient_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes leave gradients on their rank."""
        no_sync: Any = getattr(self.model, "no_sync", nullcontext)
        return no_sync()

    def compute_objective(self, rows: Batch, counts: dict[str, int], gap_count: int, share: StepMetrics) -> Tensor:
        """Return the scalar whose gradients, summed over microbatches and averaged over ranks, are the loss's.

        It is the sum of the loss terms over `rows`, divided by the minibatch's mask `counts` and multiplied by the
        world size. Also add the metrics to `share`; policy/sampler_gap is divided by `gap_count` (0: left out).
        """
        micro = move_batch_to_device(rows, self.device)
        with autocast_to(self.device, self.dtype):
            output = self.model(micro)
        loss = self.algorithm.loss(micro, output)
        objective = output.logprobs.new_zeros(())
        for term in loss.terms:
            value = masked_sum(term.values, micro.masks[term.mask]) / counts[term.mask]
            objective = objective + term.weight * value
            share.add(f"loss/{term.name}", float(value.detach()))
        for name, metric in loss.metrics.items():
            mask = micro.masks[metric.mask]
            if metric.reduction == "max":
                share.raise_maximum(name, float(metric.values[mask].max()) if bool(mask.any()) else -math.inf)
            else:
                share.add(name, float(masked_sum(metric.values, mask)) / counts[metric.mask])
        old = micro.sampler_logprobs if micro.old_logprobs is None else micro.old_logprobs
        difference = (output.logprobs.detach() - old)[micro.mask]
        share.raise_maximum("policy/ratio_max", float(difference.max().exp()) if difference.numel() else -math.inf)
        if gap_count:
            share.add("policy/sampler_gap", float(difference.abs().sum()) / gap_count)
        if not bool(objective.isfinite()):  # its gradient may be finite: make the norm NaN, which every rank sees
            objective = objective * math.nan
        return objective * self.world.size

    def clip_gradients(self) -> dict[str, float]:
        """Clip each group's gradient to `max_grad_norm`; return the norms before clipping, the same on every rank."""
        limit, groups = self.settings.max_grad_norm, self.optimizer.param_groups
        return {
            name: float(gather_full_tensor(nn.utils.clip_grad_norm_(group["params"], limit)))
            for name, group in zip(GRAD_NORMS, groups, strict=False)
        }

    def step_optimizer(self, iteration: int) -> None:
        """Step the optimizer, during the critics' warm-up without the policy. Raise UserError if memory runs out."""
        if iteration <= self.settings.critic_warmup_iterations:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if is_out_of_memory(error):  # half a step cannot be repeated
                raise UserError(f"iteration {iteration}: out of memory in the optimizer's step") from error
            raise
