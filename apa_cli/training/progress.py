"""The progress of a run: what a checkpoint holds beside weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from apa_cli.training.guard import Watch
from apa_cli.types import State


@dataclass
class Progress:
    """What has happened so far; with the weights and the optimizer, all that a checkpoint holds."""

    iteration: int = 0
    samples: int = 0
    algorithm: State = field(default_factory=dict)
    sft_scores: dict[str, list[float]] = field(default_factory=dict)
    """The SFT model's scores on the held-out prompts by reward, see `Evaluator.evaluate`."""
    measured_by: str | None = None
    """A digest of the settings that `sft_scores` depend on."""
    best_iteration: int | None = None
    best_reward: float | None = None
    kl: float = 0.0
    """kl/sequence of the last iteration, nats per response."""
    watch: dict[str, Any] = field(default_factory=lambda: asdict(Watch()))
    """What the guard remembers, see `guard.Watch`."""
    unrecorded: dict[str, float] | None = None
    """The metrics of the last iteration, where its evaluation is still to be done because a reward failed in it."""
