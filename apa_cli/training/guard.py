"""Divergence guard: three signs of failing training in the metrics, each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apa_cli.settings import GuardSettings


@dataclass(frozen=True)
class GuardState:
    """State of the guard between iterations. The field names are keys of a checkpoint's state.json."""

    blind: int = 0
    """Consecutive iterations in which the critic explained too little."""
    reported: tuple[str, ...] = ()
    """Keys of the guard whose warnings have been printed."""


def check_metrics(
    settings: GuardSettings, metrics: Mapping[str, float], state: GuardState
) -> tuple[dict[str, str], GuardState]:
    """Return a warning for each guard key whose bound an iteration's metrics exceed, and the state after it."""
    warnings = {}
    kl, entropy = metrics.get("kl/sequence"), metrics.get("policy/entropy")
    explained = metrics.get("value/explained_variance")
    blind = state.blind + 1 if explained is not None and explained <= settings.min_explained_variance else 0
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
            f"value/explained_variance was at most {settings.min_explained_variance:g} for {blind} iterations in a "
            "row: the critic explains nothing, so advantages are mostly noise. Try a higher optimizer.critic_lr, "
            "optimizer.critic_warmup_iterations, or a larger rollout_batch_size"
        )
    return warnings, replace(state, blind=blind)


def select_new_warnings(warnings: Mapping[str, str], state: GuardState) -> tuple[dict[str, str], GuardState]:
    """Return the warnings that have not been printed yet, and the state after printing them."""
    new = {name: text for name, text in warnings.items() if name not in state.reported}
    return new, replace(state, reported=(*state.reported, *new))
