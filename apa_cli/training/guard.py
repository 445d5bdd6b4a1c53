"""Divergence guard: signs of failing training in the metrics, each with a remedy; and signs of nothing to learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from apa_cli.errors import UserError
from apa_cli.settings import DType, GuardSettings
from apa_cli.tensor_ops import is_rounding

EXPLAINED_VARIANCE = "/explained_variance"
"""End of the metric's name, after that of the critic."""
EQUAL_ITERATIONS = 5
"""Consecutive iterations with equal scores that are worth a warning, once scores have differed."""


MAX_SAMPLER_GAP = {DType.float32: 0.05, DType.bfloat16: 0.5}
"""Nats per token up to which the mean difference of sampling's and training's log-probs may be rounding."""


@dataclass(frozen=True)
class GuardState:
    """State of the guard between iterations. The field names are keys of a checkpoint's state.json."""

    blind: int = 0
    """Consecutive iterations in which the critic explained too little."""
    reported: tuple[str, ...] = ()
    """Keys of the guard, and names of remarks, whose warnings have been printed."""
    equal_scores: int = 0
    """Consecutive iterations in which all scores were equal."""
    equal_groups: int = 0
    """Consecutive iterations in which, for every prompt, all its responses had the same score."""
    scores_differed: bool = False
    """True once an iteration's scores differed."""
    groups_differed: bool = False
    """True once the responses to a prompt had different scores."""


def check_metrics(
    settings: GuardSettings, metrics: Mapping[str, float], state: GuardState
) -> tuple[dict[str, str], GuardState]:
    """Return a warning for each guard key whose bound an iteration's metrics exceed, and the state after it."""
    warnings = {}
    kl, entropy = metrics.get("kl/sequence"), metrics.get("policy/entropy")
    explained = {name: value for name, value in metrics.items() if name.endswith(EXPLAINED_VARIANCE)}
    worst = min(explained, key=explained.__getitem__, default="")
    blind = state.blind + 1 if explained and explained[worst] <= settings.min_explained_variance else 0
    if settings.max_kl is not None and kl is not None and kl > settings.max_kl:
        warnings["max_kl"] = (
            f"kl/sequence is {kl:.3g} nats, above guard.max_kl {settings.max_kl:g}: the policy is far from its "
            "reference, and its score may be meaningless. Try another lambda, a lower optimizer.lr, or stop_at_kl"
        )
    if entropy is not None and entropy < settings.min_entropy:
        warnings["min_entropy"] = (
            f"policy/entropy is {entropy:.3f} nats, below guard.min_entropy {settings.min_entropy:g}: the policy "
            "samples nearly the same response every time, which leaves little to learn from. Try another lambda, or a "
            "lower optimizer.lr"
        )
    if settings.critic_patience is not None and blind >= settings.critic_patience:
        warnings["critic_patience"] = (
            f"{worst} was at most {settings.min_explained_variance:g} for {blind} iterations in a "
            "row: the critic explains nothing, so advantages are mostly noise. Try a higher optimizer.critic_lr, "
            "optimizer.critic_warmup_iterations, or a larger rollout_batch_size"
        )
    return warnings, replace(state, blind=blind)


def find_remarks(
    metrics: Mapping[str, float], state: GuardState, compares_groups: bool
) -> tuple[dict[str, str], GuardState]:
    """Return a remark for each sign that an iteration gave nothing to learn from, by name, and the state after it.

    Remarks never end a run. `compares_groups`: the algorithm compares the responses to a prompt with one another.
    """
    remarks = {
        f"nonfinite {name}": f"{name} is {value}, not a finite number; it is left out wherever it is not finite"
        for name, value in metrics.items()
        if not math.isfinite(value)
    }
    mean, std = metrics.get("reward/mean", 0.0), metrics.get("reward/std")
    is_equal = std is not None and is_rounding(std, mean) and "reward/penalty" not in metrics
    count = state.equal_scores + 1 if is_equal else 0
    if count and (count >= EQUAL_ITERATIONS or not state.scores_differed):
        spread = f"; a deviation of {std:.2g} may be rounding" if std else ""
        when = _count_iterations(count, state.scores_differed)
        remarks["equal_scores"] = (
            f"reward/std: all scores were equal ({mean:.4g}{spread}) {when}: the reward prefers no response, so there "
            "is nothing to learn from it, and scores that do not differ are not scaled. Check the reward, or give it a "
            "larger unit"
        )
    is_equal_in_groups = metrics.get("reward/equal_groups") == 1 and not is_equal
    groups = state.equal_groups + 1 if is_equal_in_groups else 0
    if compares_groups and groups and (groups >= EQUAL_ITERATIONS or not state.groups_differed):
        remarks["equal_groups"] = (
            "reward/equal_groups: for every prompt, all its responses had the same score "
            f"{_count_iterations(groups, state.groups_differed)}: the algorithm compares the responses to a prompt, so "
            "the scores give no gradient. Try a reward with finer steps, or a larger samples_per_prompt"
        )
    return remarks, replace(
        state,
        equal_scores=count,
        equal_groups=groups,
        scores_differed=state.scores_differed or (std is not None and not is_equal),
        groups_differed=state.groups_differed or metrics.get("reward/equal_groups", 1) < 1,
    )


def _count_iterations(count: int, is_in_a_row: bool) -> str:
    if is_in_a_row:
        return f"in {count} iterations in a row"
    return "in the first iteration" if count == 1 else f"in all {count} iterations so far"


def drop_nonfinite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are finite numbers, which alone can be recorded."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def select_new_warnings(warnings: Mapping[str, str], state: GuardState) -> tuple[dict[str, str], GuardState]:
    """Return the warnings that have not been printed yet, and the state after printing them."""
    new = {name: text for name, text in warnings.items() if name not in state.reported}
    return new, replace(state, reported=(*state.reported, *new))


def check_sampler_gap(metrics: Mapping[str, float], dtype: DType) -> None:
    """Raise UserError if policy/sampler_gap, measured before the first update, is more than rounding in `dtype`."""
    gap, limit = metrics.get("policy/sampler_gap", 0.0), MAX_SAMPLER_GAP[dtype]
    if not gap <= limit:
        raise UserError(
            f"policy/sampler_gap is {gap:.3g} nats per token, more than rounding ({limit:g} in {dtype.value}): the "
            "log-probs of sampling are not those of training for the same weights, so ratios and KL are wrong. The "
            "sampler or the model is at fault, not lambda or the learning rate; choose another model.path"
        )
