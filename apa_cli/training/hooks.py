"""Checks of what the hooks of an algorithm or a plan return, so that a mistake in one is one line that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from apa_cli.algorithms.base import Algorithm
from apa_cli.algorithms.plans import Plan
from apa_cli.errors import UserError
from apa_cli.types import Batch, Example, Loss, LossTerm, Metric, Rollout, RolloutPlan, State

T = TypeVar("T")

TRAINER_PREFIXES = (
    "eval/", "guard/", "kl/", "loss/", "memory/", "optimizer/", "prompt/", "response/", "reward/", "throughput/",
    "time/",
)  # fmt: skip
TRAINER_NAMES = ("iteration", "samples", "policy/entropy", "policy/ratio_max", "policy/sampler_gap")
"""Names of the trainer's own metrics, which an algorithm's must not have, and their prefixes."""


def make_error(owner: Algorithm | Plan, hook: str, problem: str) -> UserError:
    """Return the error of a hook, which names its section, class and method."""
    return UserError(f"{'algo' if isinstance(owner, Algorithm) else 'plan'}: {type(owner).__name__}.{hook} {problem}")


def describe_result(result: object) -> str:
    """Return a result in a few words: "None", "a Batch", "2 values (Rollout, NoneType)"."""
    if result is None:
        return "None"
    if isinstance(result, tuple):
        return f"{len(result)} values ({', '.join(type(value).__name__ for value in result)})"
    return f"a {type(result).__name__}"


def check_result(owner: Algorithm | Plan, hook: str, result: Any, kind: type[T]) -> T:
    """Return the result of a hook that must return a `kind`. Raise UserError for another."""
    if not isinstance(result, kind):
        raise make_error(owner, hook, f"must return a {kind.__name__}, got {describe_result(result)}")
    return result


def check_pair(owner: Algorithm, hook: str, result: Any, kind: type[T]) -> tuple[T, State]:
    """Return the result of a hook that must return a `kind` and the next state. Raise UserError for another."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], kind) and isinstance(result[1], dict):
        return result
    raise make_error(owner, hook, f"must return two values ({kind.__name__}, dict), got {describe_result(result)}")


def check_rollout_plans(plan: Plan, result: Any) -> tuple[RolloutPlan, ...]:
    """Return the result of `Plan.rollout`. Raise UserError for what is no non-empty tuple of rollout plans."""
    if not isinstance(result, tuple) or not result or not all(isinstance(each, RolloutPlan) for each in result):
        raise make_error(plan, "rollout", f"must return a tuple of RolloutPlan, got {describe_result(result)}")
    return result


def check_masks(owner: Algorithm | Plan, hook: str, masks: Any, part: Rollout | Batch) -> None:
    """Raise UserError for masks that are no mapping of bool tensors [N], [N, T] or [N, T′] of a related sequence."""
    if not isinstance(masks, Mapping):
        raise make_error(owner, hook, f"must give masks by name, got {describe_result(masks)}")
    rows = len(part)
    shapes = [[rows], *(list(each.mask.shape) for each in (part, *part.related.values()))]
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else describe_result(mask)
            raise make_error(owner, hook, f"gives the mask {name!r}, {kind}; a bool tensor is needed")
        if list(mask.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise make_error(owner, hook, f"gives the mask {name!r} of shape {list(mask.shape)}; {wanted} is needed")


def check_metric_name(owner: Algorithm, hook: str, name: Any) -> None:
    """Raise UserError for a metric's name that is no text, or that the trainer's own metrics have."""
    if not isinstance(name, str) or name in TRAINER_NAMES or name.startswith(TRAINER_PREFIXES):
        raise make_error(owner, hook, f"gives the metric {name!r}, a name of the trainer's; give another name")


def check_batch(algorithm: Algorithm, hook: str, batch: Any) -> Batch:
    """Return a batch with metrics as floats. Raise UserError for a wrong mask, or a metric that is no number."""
    batch = check_result(algorithm, hook, batch, Batch)
    check_masks(algorithm, hook, batch.masks, batch)
    for name, value in batch.metrics.items():
        check_metric_name(algorithm, hook, name)
        if not isinstance(value, Real):
            kind = describe_result(value)
            raise make_error(algorithm, hook, f"gives the metric {name!r}, {kind}; a number is needed, as of float(…)")
    return batch.replace(metrics={name: float(value) for name, value in batch.metrics.items()})


def check_loss(algorithm: Algorithm, loss: Any, masks: Mapping[str, Tensor]) -> Loss:
    """Return the result of `Algorithm.loss`. Raise UserError, naming the term or metric, for what cannot be reduced."""
    loss = check_result(algorithm, "loss", loss, Loss)
    counts = any(bool(mask.any()) for mask in masks.values())  # where nothing counts, terms may be left out
    if not isinstance(loss.terms, Sequence) or (counts and not loss.terms):
        raise make_error(algorithm, "loss", "returns a Loss without a term; give a list of LossTerm")
    names = set()
    for term in loss.terms:
        name = getattr(term, "name", None)
        check_term(algorithm, term, LossTerm, f"the term {name!r}", masks)
        if name in names:
            raise make_error(algorithm, "loss", f"gives two terms of the name {name!r}; give each its own")
        names.add(name)
    for name, metric in loss.metrics.items():
        check_metric_name(algorithm, "loss", name)
        check_term(algorithm, metric, Metric, f"the metric {name!r}", masks)
        if metric.reduction not in ("mean", "max"):
            raise make_error(
                algorithm, "loss", f"gives the metric {name!r} the reduction {metric.reduction!r}; give mean or max"
            )
    return loss


def check_term(
    algorithm: Algorithm, term: Any, kind: type[LossTerm] | type[Metric], name: str, masks: Mapping[str, Tensor]
) -> None:
    """Raise UserError for what is no `kind`, an unknown mask, or values not of the mask's shape."""
    if not isinstance(term, kind):
        raise make_error(algorithm, "loss", f"gives {name} as {describe_result(term)}, not a types.{kind.__name__}")
    if term.mask not in masks:
        known = ", ".join(sorted(masks))
        raise make_error(algorithm, "loss", f"gives {name} the mask {term.mask!r}; there are {known}")
    if not isinstance(term.values, Tensor) or term.values.shape != masks[term.mask].shape:
        of = f"of shape {list(term.values.shape)}" if isinstance(term.values, Tensor) else describe_result(term.values)
        raise make_error(
            algorithm, "loss",
            f"gives {name} values {of}, but its mask {term.mask!r} has shape {list(masks[term.mask].shape)}; return "
            "one value per token or row, not their mean",
        )  # fmt: skip


def instruct(algorithm: Algorithm, example: Example, step: int | None) -> Example:
    """Return `Algorithm.instruct` of an example. Raise UserError for another result than an example."""
    return check_result(algorithm, "instruct", algorithm.instruct(example, step), Example)
