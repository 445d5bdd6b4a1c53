"""Responses that are sampled once for each prompt of the data set, kept in a pool, and added to later rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from apa_cli.pool import Pool
from apa_cli.rollout.collect import assemble_rollout
from apa_cli.rollout.engine import Sampled
from apa_cli.settings import SamplingSettings
from apa_cli.types import SAMPLER, Prompt, Rollout, RolloutPlan

ROW_KEYS = {"settings", "sampler", "example", "tokens", "logprobs", "ending", "score"}
"""Keys of a row of the pool."""


@dataclass
class ResponsesPerPrompt:
    """Scored responses by roll-in sampler and row of the data set.

    Responses that other settings gave, in a run of which this one is a fork, stay in the pool and are not used.
    """

    pool: Pool = field(default_factory=Pool)
    """One row per response; checkpointed by the trainer."""
    settings: str = ""
    """Digest of the settings on which responses and scores depend."""
    index: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """(roll-in sampler, row of the data set) → rows of the pool."""

    def __post_init__(self) -> None:
        self.update_index(0)

    def update_index(self, start: int) -> None:
        """Add the pool's rows from `start` on to the index."""
        numbers = range(start, len(self.pool))
        for number, row in zip(numbers, self.pool.rows(numbers), strict=True):
            if row.get("settings") == self.settings:
                self.index.setdefault((row["sampler"], row["example"]), []).append(number)

    def has(self, plan: RolloutPlan, example: int) -> bool:
        """Return True if there are responses to the prompt of row `example` of the data set."""
        return (plan.roll_in, example) in self.index

    def add(self, plan: RolloutPlan, rollout: Rollout) -> None:
        """Add the scored responses of a rollout."""
        assert rollout.scores is not None, "only scored responses are kept"
        start, lengths = len(self.pool), rollout.mask.sum(-1).tolist()
        logprobs = rollout.get_logprobs(SAMPLER)
        self.pool.append([
            {
                "settings": self.settings,
                "sampler": plan.roll_in,
                "example": int(rollout.example_index[i]),
                "tokens": rollout.response_ids[i, :length].tolist(),
                "logprobs": logprobs[i, :length].tolist(),
                "ending": rollout.endings[i],
                "score": float(rollout.scores[i]),
            }
            for i, length in enumerate(lengths)
        ])  # fmt: skip
        self.update_index(start)

    def build_rollout(
        self,
        plan: RolloutPlan,
        prompts: list[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
    ) -> Rollout:
        """Return the scored responses to these prompts as a rollout, prompt by prompt."""
        pairs = [
            (prompt, row)
            for prompt in prompts
            for row in self.pool.rows(self.index[plan.roll_in, prompt.example_index])
        ]
        rows = [row for _, row in pairs]
        sampled = Sampled(*([row[name] for row in rows] for name in ("tokens", "logprobs", "ending")))
        empty: list[list] = [[] for _ in rows]
        rollout = assemble_rollout(tokenizer, [prompt for prompt, _ in pairs], empty, empty, sampled, settings, plan)
        return rollout.replace(scores=torch.tensor([row["score"] for row in rows], dtype=torch.float32))
