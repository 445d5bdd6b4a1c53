"""Update of one iteration: optimizer steps with gradient accumulation, gradient clipping per parameter group, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from apa_cli.algorithms.base import Algorithm
from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.errors import UserError
from apa_cli.hardware.oom import BatchSizeHalver, OtherRankOutOfMemory, is_out_of_memory
from apa_cli.models.forward import TrainingModel
from apa_cli.models.sharding import gather_full_tensor
from apa_cli.settings import DType, LRScheduler, OptimizerSettings, RunSettings
from apa_cli.training.hooks import check_batch
from apa_cli.training.minibatches import split_into_microbatches, split_into_minibatches
from apa_cli.training.objective import (
    Objective,
    StepMetrics,
    average_over_steps,
    count_on_policy_tokens,
    reduce_over_ranks,
)
from apa_cli.types import (
    OLD,
    POLICY,
    Batch,
    Needs,
)

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


def compute_lr_factor(settings: OptimizerSettings, step: float, total: int) -> float:
    """Return the factor of the learning rates at optimizer step `step`, counted from 0, of `total`."""
    warmup = round(settings.warmup_ratio * total)
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if settings.lr_scheduler is LRScheduler.linear:
        return max(0.0, 1 - progress)
    if settings.lr_scheduler is LRScheduler.cosine:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


@dataclass
class Updater:
    """Optimizer steps on one prepared rollout batch at a time."""

    algorithm: Algorithm
    needs: Needs
    """Needs of algorithm and plan together."""
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
    steps: int = 0
    """Optimizer steps so far over the whole run, those left out excepted."""

    @property
    def training_model(self) -> TrainingModel:
        """The `TrainingModel` without its wrapper."""
        return cast(TrainingModel, getattr(self.model, "module", self.model))

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps per iteration if it trains on `rollout_batch_size` responses."""
        return self.run.update_epochs * self.run.rollout_batch_size // self.run.minibatch_size

    def update(
        self, batch: Batch, iteration: int, on_fault: Callable[[NonFiniteUpdate], None] = raise_fault
    ) -> dict[str, float]:
        """Run all optimizer steps of an iteration, counted from 1, and return the means of their metrics.

        A step whose loss or gradient is not finite changes no weight. `on_fault` gets the error; if it returns, the
        step is left out of the metrics and the next one follows.
        """
        rank_shares, common_metrics = [], []
        minibatches = split_into_minibatches(self.run, iteration, len(batch), batch.responses_per_row)
        for number, rows in enumerate(minibatches):
            self.set_learning_rates(iteration - 1, number, len(minibatches))
            minibatch = self.algorithm.prepare_minibatch(batch.select_rows(rows))
            minibatch = check_batch(self.algorithm, "prepare_minibatch", minibatch)
            share = self.accumulate_gradients(minibatch, is_first=number == 0)
            # These metrics are equal on every rank, so they are not part of the share that is summed over ranks.
            common = StepMetrics({**minibatch.metrics, **self.clip_gradients(iteration)})
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

    def set_learning_rates(self, iterations: int, number: int, steps: int) -> None:
        """Set the learning rates of step `number` of `steps`, counted from 0, after so many finished iterations.

        The schedule goes by the share of the run, whatever the number of steps in each iteration.
        """
        nominal = self.steps_per_iteration
        step = iterations * nominal + number * nominal / steps
        factor = compute_lr_factor(self.settings, step, self.run.iterations * nominal)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def gather_steps(self, shares: list[StepMetrics]) -> list[StepMetrics]:
        """Return the metrics of optimizer steps from the shares of all ranks."""
        return [reduce_over_ranks(ranks) for ranks in zip(*self.world.all_gather(shares), strict=True)]

    def accumulate_gradients(self, minibatch: Batch, is_first: bool) -> StepMetrics:
        """Set the gradients of the whole minibatch, and return this rank's share of the step's metrics.

        Each loss term is summed over microbatches and ranks and divided once by the count of its mask. Parameters whose
        terms have nothing that counts on any rank get no gradient, so that the optimizer does not move them. If memory
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
        objective = Objective(
            self.algorithm, self.needs, self.model, self.dtype, self.device, self.world.size,
            counts={name: int(mask.sum()) for name, mask in minibatch.masks.items()},
            gap_count=count_on_policy_tokens(minibatch) if is_first and OLD not in minibatch.logprobs else 0,
        )  # fmt: skip
        memory_error: RuntimeError | None = None
        try:
            for rows in microbatches[:-1]:
                with self.skip_gradient_sync():
                    objective.compute(minibatch, rows).backward()
            last = objective.compute(minibatch, microbatches[-1])
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
            last.backward()
        except RuntimeError as error:
            if self.world.size > 1 and is_out_of_memory(error):  # the other ranks are exchanging gradients by now
                raise self.microbatch.make_error() from error
            raise
        self.drop_idle_gradients(objective.active)
        return objective.share

    def skip_gradient_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes leave gradients on their rank."""
        no_sync: Any = getattr(self.model, "no_sync", nullcontext)
        return no_sync()

    def drop_idle_gradients(self, active: set[str]) -> None:
        """Set to None the gradients of the policy or critics that are not `active` on any rank.

        A gradient of zero would still move them: by weight decay, and by AdamW's momentum.
        """
        model = self.training_model
        if self.world.size > 1:
            active = set().union(*self.world.all_gather(active))
        if any(model.critics[name].is_on_trunk for name in active - {POLICY}):
            active = active | {POLICY}
        for name in {POLICY, *model.critics} - active:
            for parameter in model.list_output_parameters(name):
                parameter.grad = None

    def clip_gradients(self, iteration: int) -> dict[str, float]:
        """Clip the gradients to `max_grad_norm`; return each group's norm before clipping, the same on every rank.

        Each group is clipped by itself, or with `joint_clip` all are scaled by one factor, 1 or limit / √Σ norm². A
        group without gradients has no norm.
        """
        limit = self.settings.max_grad_norm
        is_joint = self.settings.joint_clip and iteration > self.settings.critic_warmup_iterations
        norms = {
            name: float(gather_full_tensor(nn.utils.clip_grad_norm_(group["params"], math.inf if is_joint else limit)))
            for name, group in zip(GRAD_NORMS, self.optimizer.param_groups, strict=False)
            if any(parameter.grad is not None for parameter in group["params"])
        }
        factor = limit / (math.hypot(*norms.values()) + 1e-6)  # 1e-6 as in `clip_grad_norm_`
        if is_joint and factor < 1:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        return norms

    def step_optimizer(self, iteration: int) -> None:
        """Step the optimizer, during the critics' warm-up without the policy, and update the critics' Polyak copies.

        Raise UserError if memory runs out.
        """
        if iteration <= self.settings.critic_warmup_iterations:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if is_out_of_memory(error):  # half a step cannot be repeated
                raise UserError(f"iteration {iteration}: out of memory in the optimizer's step") from error
            raise
        self.steps += 1
        self.training_model.update_targets(self.steps)
