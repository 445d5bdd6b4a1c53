"""The divergence guard: three signs that a run is not going well, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apa_cli.settings import GuardSettings


@dataclass(frozen=True)
class Watch:
    """What the guard remembers from one iteration to the next; a checkpoint holds it."""

    blind: int = 0
    """Iterations in a row in which the critic explained too little."""
    reported: tuple[str, ...] = ()
    """The signs that were said already."""


def signs(settings: GuardSettings, metrics: Mapping[str, float], watch: Watch) -> tuple[dict[str, str], Watch]:
    """What an iteration's metrics are a sign of, by the bound that they pass, and the watch after it."""
    found = {}
    kl, entropy = metrics["kl/sequence"], metrics["policy/entropy"]
    explained = metrics.get("value/explained_variance")
    blind = watch.blind + 1 if explained is not None and explained <= settings.min_explained_variance else 0
    if settings.max_kl is not None and kl > settings.max_kl:
        found["max_kl"] = (
            f"kl/sequence is {kl:.3g} nats, above guard.max_kl {settings.max_kl:g}: the policy has left its reference, "
            "and its score may no longer mean anything. Try another lambda, a lower optimizer.lr, or stop_at_kl"
        )
    if entropy < settings.min_entropy:
        found["min_entropy"] = (
            f"policy/entropy is {entropy:.3f} nats, below guard.min_entropy {settings.min_entropy:g}: the policy says "
            "nearly the same whatever happens, and there is little left to learn from. Try another lambda, or a lower "
            "optimizer.lr"
        )
    if settings.critic_patience is not None and blind >= settings.critic_patience:
        found["critic_patience"] = (
            f"value/explained_variance was at most {settings.min_explained_variance:g} for {blind} iterations in a "
            "row: the critic explains nothing, so advantages are little but noise. Try a higher optimizer.critic_lr, "
            "optimizer.critic_warmup_iterations, or a larger rollout_batch_size"
        )
    return found, replace(watch, blind=blind)


def unreported(found: Mapping[str, str], watch: Watch) -> tuple[dict[str, str], Watch]:
    """Those signs that were not said yet, and the watch once they are."""
    new = {name: text for name, text in found.items() if name not in watch.reported}
    return new, replace(watch, reported=(*watch.reported, *new))
