"""Objective of one optimizer step: loss terms over microbatches, what they depend on, and the step's metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apa_cli.algorithms.base import Algorithm
from apa_cli.losses import exp_log_ratio
from apa_cli.models.forward import autocast_to
from apa_cli.settings import DType
from apa_cli.tensor_ops import masked_sum
from apa_cli.training.hooks import check_loss
from apa_cli.training.minibatches import mask_out
from apa_cli.types import OLD, POLICY, RESPONSE, SAMPLER, Batch, Loss, Needs, PolicyOutput

NO_MAXIMUM = -math.inf
"""The maximum over no value."""


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
class Objective:
    """The objective of one optimizer step, computed in microbatches, with this rank's share of the step's metrics."""

    algorithm: Algorithm
    needs: Needs
    """Needs of algorithm and plan together."""
    model: nn.Module
    """The `TrainingModel` or its wrapper."""
    dtype: DType
    device: torch.device
    world_size: int
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
        selected = minibatch.select_rows(rows) if len(rows) else mask_out(minibatch.select_rows(torch.tensor([0])))
        micro = selected.map_rows(lambda tensor: tensor.to(self.device))
        with autocast_to(self.device, self.dtype):
            needs = self.needs
            output = self.model(
                micro, entropy=needs.entropy, mean_logprob=needs.mean_logprob, related_critics=needs.passes
            )
        loss = check_loss(self.algorithm, self.algorithm.loss(micro, output), micro.masks)
        outputs, reached = list_trained_outputs(output), set()
        objective = output.logprobs.new_zeros(())
        for term in loss.terms:
            sources, count = find_outputs(term.values, outputs), self.counts[term.mask]
            reached |= sources
            value = masked_sum(term.values, micro.masks[term.mask]) / max(count, 1)
            objective = objective + term.weight * value
            if count and term.weight:
                self.active |= sources
            if count:
                self.share.add(f"loss/{term.name}", float(value.detach()))
        for name in outputs.keys() - reached:
            objective = objective + sum(0.0 * tensor.sum() for tensor in outputs[name])
        self.add_metrics(loss, micro, output)
        if not bool(objective.isfinite()):  # its gradient may be finite: make the norm NaN, which every rank sees
            objective = objective * math.nan
        return objective * self.world_size

    def add_metrics(self, loss: Loss, micro: Batch, output: PolicyOutput) -> None:
        """Add the algorithm's metrics, policy/ratio_max and policy/sampler_gap; over nothing there is no metric."""
        for name, metric in loss.metrics.items():
            mask, count = micro.masks[metric.mask], self.counts[metric.mask]
            if metric.reduction == "max":
                self.share.raise_maximum(name, float(metric.values[mask].max()) if bool(mask.any()) else NO_MAXIMUM)
            elif count:
                self.share.add(name, float(masked_sum(metric.values, mask)) / count)
        for difference in list_ratio_differences(micro, output):
            maximum = float(exp_log_ratio(difference.max())) if difference.numel() else NO_MAXIMUM
            self.share.raise_maximum("policy/ratio_max", maximum)
            if self.gap_count:
                self.share.add("policy/sampler_gap", float(difference.abs().sum()) / self.gap_count)
