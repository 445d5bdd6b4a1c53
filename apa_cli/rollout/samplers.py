"""Samplers: what gives responses to prompts, behind one interface. The data set is one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.errors import UserError
from apa_cli.models.forward import TrainingModel, autocast_to
from apa_cli.models.sharding import copy_gathered_weights
from apa_cli.randomness import Stream, make_generator, sample_uniforms
from apa_cli.rollout.engine import Sampled, sample_responses
from apa_cli.rollout.response_text import EOS, LENGTH
from apa_cli.settings import DType, SamplingSettings
from apa_cli.types import Prompt


@dataclass(frozen=True)
class Draws:
    """The random numbers of N responses, which depend only on (seed, stream, iteration, place, sample)."""

    seed: int
    stream: Stream
    iteration: int
    places: list[tuple[int, int]]
    """(place of the prompt, number of the sample) of each response."""

    def sample_uniforms(self, length: int) -> np.ndarray:
        """Return one number in (0, 1] per response and token, [N, length] float64."""
        return sample_uniforms(self.seed, self.stream, self.iteration, self.places, length)

    def derive_seeds(self) -> list[int]:
        """Return one seed in [0, 2⁶³ − 1) per response, for engines that take nothing else."""
        generators = (make_generator(self.seed, self.stream, self.iteration, *place) for place in self.places)
        return [int(generator.integers(2**63 - 1)) for generator in generators]


class Sampler(ABC):
    """A source of responses to prompts."""

    @abstractmethod
    def draw(
        self,
        prompts: list[Prompt],
        prefixes: list[list[int]],
        draws: Draws,
        settings: SamplingSettings,
        end_tokens: frozenset[int],
    ) -> Sampled:
        """Return the completion of each prompt's prefix (token ids of the response so far), in order.

        A response does not depend on the other responses, nor on `settings.microbatch_size`.
        """

    def refresh(self, model: TrainingModel) -> None:  # noqa: B027
        """Follow the model under training, which has changed; default: the sampler does not depend on it."""


@dataclass
class ModelSampler(Sampler):
    """A frozen or trained language model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: DType
    """Compute precision."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings that replace those of the run."""
    decoding: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context in which the model's logits are those of the decoded policy."""

    def draw(
        self,
        prompts: list[Prompt],
        prefixes: list[list[int]],
        draws: Draws,
        settings: SamplingSettings,
        end_tokens: frozenset[int],
    ) -> Sampled:
        contexts = [prompt.token_ids + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)]
        uniforms = draws.sample_uniforms(settings.max_new_tokens)
        settings = replace(settings, **self.changes)
        with autocast_to(self.model.device, self.dtype), self.decoding():
            return sample_responses(self.model, self.tokenizer, contexts, uniforms, settings, end_tokens, prefixes)


@dataclass
class PolicySampler(ModelSampler):
    """The policy under training, or a whole copy of it if its weights are sharded."""

    def refresh(self, model: TrainingModel) -> None:
        if self.model is not model.policy:
            copy_gathered_weights(self.model, model.policy)


@dataclass
class DataSampler(Sampler):
    """The data set's logged responses; they have no log-probs, so theirs are 0."""

    def draw(
        self,
        prompts: list[Prompt],
        prefixes: list[list[int]],
        draws: Draws,
        settings: SamplingSettings,
        end_tokens: frozenset[int],
    ) -> Sampled:
        rows = []
        for prompt in prompts:
            if prompt.response_ids is None:
                raise UserError(
                    f"dataset: row {prompt.example_index} has no response, which the plan needs; its prompt is "
                    f"{prompt.text[:80]!r}"
                )
            rows.append(prompt.response_ids[: settings.max_new_tokens])
        endings = [EOS if row and row[-1] in end_tokens else LENGTH for row in rows]
        return Sampled(rows, [[0.0] * len(row) for row in rows], endings)
