"""Update of one iteration: minibatches, gradient accumulation, gradient clipping per parameter group, AdamW."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

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
from apa_cli.types import (
    OLD,
    POLICY,
    RESPONSE,
    SAMPLER,
    Batch,
    Loss,
    LossTerm,
    Metric,
    Needs,
    PolicyOutput,
    Sequences,
)

GRAD_NORMS = ("optimizer/grad_norm", "optimizer/critic_grad_norm")
"""Metrics of the gradient norms of the optimizer's groups."""
NO_MAXIMUM = -math.inf
"""The maximum over no value."""


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


def count_steps(rows: int, responses_per_row: int, minibatch_size: int) -> int:
    """Return the number of optimizer steps of one pass over `rows` rows, of about `minibatch_size` responses each.

    At least one and at most one per row; 0 for no row.
    """
    return min(rows, max(1, round(rows * responses_per_row / minibatch_size)))


def split_into_minibatches(run: RunSettings, iteration: int, rows: int, responses_per_row: int = 1) -> list[Tensor]:
    """Return the rows of each minibatch of an iteration, int64 [B] with nearly equal B, in the order of `update_order`.

    No row is left out. The shuffle is keyed by the seed, the iteration and the epoch.
    """
    steps = count_steps(rows, responses_per_row, run.minibatch_size)

    def shuffle(epoch: int) -> list[Tensor]:
        order = sample_permutation(rows, run.seed, Stream.minibatch_order, iteration, epoch)
        return list(torch.from_numpy(order).tensor_split(steps)) if steps else []

    if run.update_order is UpdateOrder.epochs:
        return [part for epoch in range(run.update_epochs) for part in shuffle(epoch)]
    return [part for part in shuffle(0) for _ in range(run.update_epochs)]


def split_into_microbatches(batch: Sequences, size: int, world: World = SINGLE_PROCESS) -> list[Tensor]:
    """Return the rows of each microbatch of this rank: rows of similar length, at most `size` sequences if possible.

    The ranks take turns in the order of lengths, so that they have similar work. Each has the same number of
    microbatches, the last of which may have no row.
    """
    related = getattr(batch, "related", {}).values()
    lengths = batch.prompt_mask.sum(-1) + batch.mask.sum(-1)
    for sequences in related:
        lengths = lengths + sequences.prompt_mask.sum(-1) + sequences.mask.sum(-1)
    rows = max(1, size // (1 + len(related)))
    order = lengths.argsort(stable=True)
    parts = list(order[world.rank :: world.size].split(rows))
    count = math.ceil(math.ceil(len(order) / world.size) / rows)
    return parts + [order[:0]] * (count - len(parts))


def mask_out(batch: Batch) -> Batch:
    """Return the batch with nothing that counts: the microbatch of a rank without rows."""

    def clear(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(mask) for name, mask in masks.items()}

    related = {
        name: part.replace(**clear({"mask": part.mask, "on_policy": part.on_policy}))
        for name, part in batch.related.items()
    }
    cleared = clear({"mask": batch.mask, "on_policy": batch.on_policy})
    return batch.replace(**cleared, masks=clear(batch.masks), related=related)


def find_outputs(values: Tensor, outputs: Mapping[str, list[Tensor]]) -> set[str]:
    """Return the names of the outputs on which `values` depends, by the graph that autograd has recorded."""
    nodes = {tensor.grad_fn: name for name, tensors in outputs.items() for tensor in tensors}
    found, seen, queue = set(), set(), [values.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            found.add(nodes[node])
        else:
            queue += [parent for parent, _ in node.next_functions]
    return found


def list_trained_outputs(output: PolicyOutput) -> dict[str, list[Tensor]]:
    """Return the outputs that have a gradient, of related sequences too, by "policy" or the name of the critic."""
    outputs: dict[str, list[Tensor | None]] = {}
    for part in (output, *output.related.values()):
        outputs.setdefault(POLICY, []).extend((part.logprobs, part.entropy, part.mean_logprob))
        for name, tensor in (*part.values.items(), *part.logsumexp.items()):
            outputs.setdefault(name, []).append(tensor)
    return {
        name: [tensor for tensor in tensors if tensor is not None and tensor.grad_fn is not None]
        for name, tensors in outputs.items()
    }


def check_term(term: LossTerm | Metric, name: str, masks: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what is no loss term or metric, an unknown mask, or values not of the mask's shape."""
    if not isinstance(term, LossTerm | Metric):
        raise ValueError(f"loss: {name} is a {type(term).__name__}, not a types.LossTerm or types.Metric")
    if term.mask not in masks:
        raise ValueError(f"loss: {name} names the mask {term.mask!r}; there are {', '.join(sorted(masks))}")
    if term.values.shape != masks[term.mask].shape:
        raise ValueError(
            f"loss: {name} has values of shape {list(term.values.shape)}, but its mask {term.mask!r} has shape "
            f"{list(masks[term.mask].shape)}; return one value per token or row, not their mean"
        )


def list_ratio_differences(batch: Batch, output: PolicyOutput) -> list[Tensor]:
    """Return ℓ_θ − ℓ_old of the tokens that the present policy sampled, [n] for each sequence, without gradient.

    ℓ_old is that of the training forward pass if it was computed, else the sampler's.
    """
    differences = []
    for name, part in {RESPONSE: batch, **batch.related}.items():
        old = part.logprobs.get(OLD, part.logprobs.get(SAMPLER))
        if old is not None:
            logprobs = output.logprobs if name == RESPONSE else output.related[name].logprobs
            differences.append((logprobs.detach() - old)[part.on_policy])
    return differences


def count_on_policy_tokens(batch: Batch) -> int:
    """Return the number of tokens that the present policy sampled, those of related sequences included."""
    return sum(int(part.on_policy.sum()) for part in (batch, *batch.related.values()))


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
        self.maxima[name] = max(self.maxima.get(name, NO_MAXIMUM), value)

    def list_nonfinite(self) -> list[str]:
        """Return "NAME is VALUE" for every number that is not finite."""
        maxima = {name: value for name, value in self.maxima.items() if value != NO_MAXIMUM}
        return [f"{name} is {value}" for name, value in {**self.sums, **maxima}.items() if not math.isfinite(value)]


def reduce_over_ranks(ranks: Sequence[StepMetrics]) -> StepMetrics:
    """Return the metrics of a step from the share of every rank: sums of sums, maxima of maxima.

    A rank may lack a metric: an algorithm may leave out a term of which nothing counts in a microbatch.
    """
    sums = dict.fromkeys(name for rank in ranks for name in rank.sums)
    maxima = dict.fromkeys(name for rank in ranks for name in rank.maxima)
    return StepMetrics(
        {name: sum(rank.sums.get(name, 0.0) for rank in ranks) for name in sums},
        {name: max(rank.maxima.get(name, NO_MAXIMUM) for rank in ranks) for name in maxima},
    )


def average_over_steps(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Return the mean of each sum over the steps that have it, and the largest of each maximum that there is."""
    total = StepMetrics()
    for step in steps:
        for name, value in step.sums.items():
            total.add(name, value)
        for name, value in step.maxima.items():
            total.raise_maximum(name, value)
    counts = Counter(name for step in steps for name in step.sums)
    maxima = {name: value for name, value in total.maxima.items() if value != NO_MAXIMUM}
    return {name: value / counts[name] for name, value in total.sums.items()} | maxima


@dataclass
class Updater:
    """Optimizer steps on one prepared rollout batch at a time."""

    algorithm: Algorithm
    needs: Needs
    """What algorithm and plan need."""
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
            self,
            counts={name: int(mask.sum()) for name, mask in minibatch.masks.items()},
            gap_count=count_on_policy_tokens(minibatch) if is_first and OLD not in minibatch.logprobs else 0,
        )
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

    def clip_gradients(self) -> dict[str, float]:
        """Clip each group's gradient to `max_grad_norm`; return the norms before clipping, the same on every rank.

        A group without gradients has no norm.
        """
        limit, groups = self.settings.max_grad_norm, self.optimizer.param_groups
        return {
            name: float(gather_full_tensor(nn.utils.clip_grad_norm_(group["params"], limit)))
            for name, group in zip(GRAD_NORMS, groups, strict=False)
            if any(parameter.grad is not None for parameter in group["params"])
        }

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


@dataclass
class Objective:
    """The objective of one optimizer step, computed in microbatches, with this rank's share of the step's metrics."""

    updater: Updater
    counts: dict[str, int]
    """True elements of each mask in the minibatch of all ranks."""
    gap_count: int
    """Tokens over which policy/sampler_gap is a mean; 0: it is left out."""
    share: StepMetrics = field(default_factory=StepMetrics)
    active: set[str] = field(default_factory=set)
    """The policy and the critics on which a term with something that counts depends."""

    def compute(self, minibatch: Batch, rows: Tensor) -> Tensor:
        """Return the scalar whose gradients, summed over microbatches and averaged over ranks, are the loss's.

        It is the sum of the loss terms over `rows`, divided by the minibatch's mask counts and multiplied by the world
        size. Every trained output enters it, if only as 0, so that no rank waits for a gradient.
        """
        updater, needs = self.updater, self.updater.needs
        selected = minibatch.select_rows(rows) if len(rows) else mask_out(minibatch.select_rows(torch.tensor([0])))
        micro = selected.map_rows(lambda tensor: tensor.to(updater.device))
        with autocast_to(updater.device, updater.dtype):
            output = updater.model(
                micro, entropy=needs.entropy, mean_logprob=needs.mean_logprob, related_critics=needs.passes
            )
        loss = updater.algorithm.loss(micro, output)
        outputs, reached = list_trained_outputs(output), set()
        objective = output.logprobs.new_zeros(())
        for term in loss.terms:
            check_term(term, f"the term {term.name!r}", micro.masks)
            sources, count = find_outputs(term.values, outputs), self.counts[term.mask]
            reached |= sources
            value = masked_sum(term.values, micro.masks[term.mask]) / max(count, 1)
            objective = objective + term.weight * value
            if count:
                self.active |= sources if term.weight else set()
                self.share.add(f"loss/{term.name}", float(value.detach()))
        for name in outputs.keys() - reached:
            objective = objective + sum(0.0 * tensor.sum() for tensor in outputs[name])
        self.add_metrics(loss, micro, output)
        if not bool(objective.isfinite()):  # its gradient may be finite: make the norm NaN, which every rank sees
            objective = objective * math.nan
        return objective * updater.world.size

    def add_metrics(self, loss: Loss, micro: Batch, output: PolicyOutput) -> None:
        """Add the algorithm's metrics, policy/ratio_max and policy/sampler_gap; over nothing there is no metric."""
        for name, metric in loss.metrics.items():
            check_term(metric, f"the metric {name!r}", micro.masks)
            mask, count = micro.masks[metric.mask], self.counts[metric.mask]
            if metric.reduction == "max":
                self.share.raise_maximum(name, float(metric.values[mask].max()) if bool(mask.any()) else NO_MAXIMUM)
            elif count:
                self.share.add(name, float(masked_sum(metric.values, mask)) / count)
        for difference in list_ratio_differences(micro, output):
            maximum = float(difference.max().exp()) if difference.numel() else NO_MAXIMUM
            self.share.raise_maximum("policy/ratio_max", maximum)
            if self.gap_count:
                self.share.add("policy/sampler_gap", float(difference.abs().sum()) / self.gap_count)
