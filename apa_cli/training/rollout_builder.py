"""Rollout of an iteration: prompts, sampled and scored responses, kept responses and texts of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.errors import UserError
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.models.prompting import PromptFormat
from apa_cli.randomness import Stream, make_generator
from apa_cli.rewards.base import CheckedScoreFunction, Scores
from apa_cli.rollout.collect import collect_rollout, concatenate_sequences
from apa_cli.rollout.engine import pad_right
from apa_cli.rollout.response_text import LENGTH
from apa_cli.rollout.samplers import PolicySampler, Sampler
from apa_cli.settings import Config, PenaltySettings
from apa_cli.training.hooks import check_masks, check_rollout_plans, instruct
from apa_cli.training.models import RunModels
from apa_cli.training.responses_per_prompt import ResponsesPerPrompt
from apa_cli.training.row_encoder import RowEncoder, build_sequences, get_example_text
from apa_cli.types import (
    DATA,
    POLICY,
    Example,
    Prompt,
    Rollout,
    RolloutPlan,
    Sequences,
    State,
    require,
)


@dataclass(frozen=True)
class RolloutShard:
    """This rank's responses of an iteration, and their places among those of all ranks."""

    rollout: Rollout
    positions: Tensor
    """[n] int64, place of each response in the rollout batch of all ranks; equal on two ranks if both sampled it."""


@dataclass
class RolloutBuilder:
    """Builder of an iteration's rollout; the trainer adds the scores."""

    config: Config
    models: RunModels
    samplers: Mapping[str, Sampler]
    """The samplers that plans may name, "policy" among them."""
    prompt_format: PromptFormat
    end_tokens: frozenset[int]
    examples: list[Example]
    sampling_batch: BatchSizeHalver
    """Sequences sampled in parallel."""
    world: World = SINGLE_PROCESS
    kept: ResponsesPerPrompt = field(default_factory=ResponsesPerPrompt)
    """Responses of the plans that sample once per prompt."""

    @property
    def policy_sampler(self) -> PolicySampler:
        """The sampler of the policy under training."""
        return cast(PolicySampler, self.samplers[POLICY])

    # --- sampling -------------------------------------------------------------------------------------------

    def sample(self, iteration: int, state: State) -> tuple[RolloutShard, float]:
        """Sample this rank's shard of an iteration's responses; return it with the share of truncated prompts.

        `state` is the algorithm's.
        """
        rng = make_generator(self.config.run.seed, Stream.plan, iteration)
        plans = check_rollout_plans(self.config.plan, self.config.plan.rollout(iteration, rng, state))
        once = [plan.roll_in for plan in plans if plan.once_per_prompt]
        if len(set(once)) < len(once):  # their responses would be kept as one
            raise ValueError(f"plan {self.config.plan.name}: two plans sample once per prompt from {once[0]}")
        parts, positions, start, number = [], [], 0, 0
        truncated_rate = 0.0
        for index, plan in enumerate(plans):
            samples = plan.samples or self.config.run.samples_per_prompt
            prompts, rate = self.select_prompts(iteration, plan, samples, first_sample=number)
            truncated_rate = rate if index == 0 else truncated_rate
            number += 0 if plan.once_per_prompt else samples
            shard = self.world.shard_indices(len(prompts))
            if shard:
                rollout = self.sample_responses([prompts[i] for i in shard], iteration, plan)
                parts.append(rollout.replace(plan_index=torch.full_like(rollout.plan_index, index)))
                positions += [start + i for i in shard]
            start += len(prompts)
        pad = self.prompt_format.tokenizer.pad_token_id
        if not parts:
            raise ValueError(f"plan {self.config.plan.name}: iteration {iteration} has no response to sample")
        rollout = concatenate_sequences(parts, pad).replace(plans=plans, iteration=iteration)
        return RolloutShard(rollout, torch.tensor(positions)), truncated_rate

    def sample_responses(self, prompts: list[Prompt], iteration: int, plan: RolloutPlan) -> Rollout:
        """Return a response to each prompt under a plan."""
        run, settings = self.config.run, self.config.sampling
        stream, number = (Stream.once_per_prompt, 0) if plan.once_per_prompt else (Stream.rollout, iteration)

        def attempt(microbatch: int) -> Rollout:
            return collect_rollout(
                self.samplers, self.prompt_format.tokenizer, prompts, replace(settings, microbatch_size=microbatch),
                self.end_tokens, run.seed, stream, number, plan,
            )  # fmt: skip

        return self.sampling_batch.run(attempt)

    def select_prompts(
        self, iteration: int, plan: RolloutPlan, samples: int, first_sample: int = 0
    ) -> tuple[list[Prompt], float]:
        """Return an iteration's prompts, each `samples` times, and the share that was truncated.

        Under a plan that samples once per prompt, only prompts without responses so far; their place is then the row of
        the data set, so that the responses do not depend on when the prompt first comes up.
        """
        rows = self.list_rows(iteration)
        places = list(enumerate(rows))
        if plan.once_per_prompt:
            places = [(row, row) for row in dict.fromkeys(rows) if not self.kept.has(plan, row)]
        prompts: list[Prompt] = []
        truncated = 0
        for place, row in places:
            for number in range(first_sample, first_sample + samples):
                prompt, is_truncated = self.encode_prompt(row, iteration, place, number)
                prompts.append(prompt)
                truncated += is_truncated
        return prompts, truncated / len(prompts) if prompts else 0.0

    def list_rows(self, iteration: int) -> list[int]:
        """Return the rows of the data set whose prompts are those of an iteration."""
        run = self.config.run
        count = run.rollout_batch_size // run.samples_per_prompt
        return self.config.plan.rows(iteration, len(self.examples), count, run.seed)

    def encode_prompt(self, row: int, iteration: int, place: int, number: int) -> tuple[Prompt, bool]:
        """Return the prompt of a row of the data set, with the logged response if one is needed, and if it was cut."""
        example, longest = self.examples[row], self.config.sampling.max_prompt_tokens
        instructed = instruct(self.config.algo, example, iteration)
        prompt, is_truncated = self.prompt_format.encode_instructed(example, instructed, place, number, longest)
        prompt = replace(prompt, example_index=row)
        text = example.chosen if example.response is None else example.response
        if DATA not in self.samplers or text is None:
            return prompt, is_truncated
        ids = self.prompt_format.encode_response(instructed, text, self.config.sampling.max_new_tokens)
        return replace(prompt, response_ids=ids), is_truncated

    # --- the whole rollout ----------------------------------------------------------------------------------

    def score(self, rollout: Rollout, score: CheckedScoreFunction) -> Scores:
        """Return the scores of this rank's responses: the reward's, or the data set's own of its logged responses.

        If the data set gives some of them, there are no scores of the reward's parts and none per token. Raise
        UserError if a response has another number of scores per token than of tokens.
        """
        logged = [self.find_logged_score(rollout, i) for i in range(len(rollout))]
        rest = [i for i, value in enumerate(logged) if value is None]
        if any(is_logged(plan) for plan in rollout.plans):
            # Every rank scores equally many responses, because a sharded reward model needs all ranks at every step.
            count = max(self.world.all_gather(len(rest)))
            rest += [i for i, value in enumerate(logged) if value is not None][: count - len(rest)]
        if not rest:
            return Scores([value for value in logged if value is not None])
        prompts, responses = [rollout.prompts[i] for i in rest], [rollout.responses[i] for i in rest]
        scores = score(prompts, responses, [rollout.columns[i] for i in rest])
        if all(value is None for value in logged):
            check_token_counts(scores, rollout)
            return scores
        by_row = dict(zip(rest, scores.values, strict=True))
        return Scores([by_row[i] if value is None else value for i, value in enumerate(logged)])

    def find_logged_score(self, rollout: Rollout, row: int) -> float | None:
        """Return the data set's score of a response, or None if it has none or the response is not all its own."""
        plan = rollout.plans[int(rollout.plan_index[row])]
        return self.examples[int(rollout.example_index[row])].score if is_logged(plan) else None

    def gather(self, shard: RolloutShard, scores: Scores) -> tuple[Rollout, Mapping[str, list[float]]]:
        """Return the scored rollout of all ranks, and the scores of a reward's parts."""
        rollout = shard.rollout.replace(
            scores=torch.tensor(scores.values, dtype=torch.float32), token_scores=build_token_scores(scores, shard)
        )
        if self.world.size == 1:
            return average_equal_responses(rollout), scores.parts
        shards = self.world.all_gather((rollout, shard.positions, scores.parts))
        pad = self.prompt_format.tokenizer.pad_token_id
        positions = torch.cat([positions for _, positions, _ in shards])
        order = positions.argsort(stable=True)
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[1:] = positions[order][1:] != positions[order][:-1]
        order = order[is_first]
        # A rank whose responses have logged scores has no parts; then there are none of the whole rollout.
        names = [name for name in shards[0][2] if all(name in part for *_, part in shards)]
        parts = {name: [value for *_, part in shards for value in part[name]] for name in names}
        whole = concatenate_sequences([rollout for rollout, *_ in shards], pad).select_rows(order)
        return (
            average_equal_responses(whole),
            {name: [values[i] for i in order.tolist()] for name, values in parts.items()},
        )

    def complete(self, iteration: int, rollout: Rollout) -> Rollout:
        """Return the whole scored rollout with the kept responses to its prompts, the related texts and the masks."""
        tokenizer = self.prompt_format.tokenizer
        for index, plan in enumerate(rollout.plans):
            if plan.once_per_prompt:
                fresh = (rollout.plan_index == index).nonzero().squeeze(-1)
                self.kept.add(plan, rollout.select_rows(fresh))
                prompts = [
                    self.encode_prompt(row, iteration, place, 0)[0]
                    for place, row in enumerate(self.list_rows(iteration))
                ]
                again = self.kept.build_rollout(plan, prompts, tokenizer, self.config.sampling)
                others = rollout.select_rows((rollout.plan_index != index).nonzero().squeeze(-1))
                again = again.replace(plans=rollout.plans, plan_index=torch.full_like(again.plan_index, index))
                rollout = concatenate_sequences([others, again], tokenizer.pad_token_id)
        texts = {name: self.encode_texts(rollout, name, iteration) for name in self.config.needs.texts}
        rollout = rollout.replace(related=texts)
        masks = self.config.plan.masks(rollout)
        check_masks(self.config.plan, "masks", masks, rollout)
        return rollout.replace(masks=masks)

    def encode_texts(self, rollout: Rollout, name: str, iteration: int) -> Sequences:
        """Return a column of texts of the data set as responses to the rows' prompts; no token if a row has none."""
        examples = [self.examples[row] for row in rollout.example_index.tolist()]
        texts = [get_example_text(example, name) for example in examples]
        longest = self.config.sampling.max_new_tokens
        rows = [
            self.prompt_format.encode_response(instruct(self.config.algo, example, iteration), text, longest)
            if text
            else []
            for example, text in zip(examples, texts, strict=True)
        ]
        pad = self.prompt_format.tokenizer.pad_token_id
        return build_sequences(rollout.prompt_ids, rollout.prompt_mask, rows, pad)

    @property
    def encoder(self) -> RowEncoder:
        """Encoder of an algorithm's own rows."""
        return RowEncoder(self.prompt_format, self.config.sampling, self.examples)


def is_logged(plan: RolloutPlan) -> bool:
    """Return True if the responses of a plan are whole logged ones."""
    return plan.roll_in == DATA and plan.roll_out is None


def check_token_counts(scores: Scores, rollout: Rollout) -> None:
    """Raise UserError if a response of the rollout has another number of scores per token than of tokens."""
    lengths = rollout.mask.sum(-1).tolist()
    for i, (row, length) in enumerate(zip(scores.token_scores or [], lengths, strict=False)):
        if len(row) != length:
            raise UserError(f"reward: response {i} has {length} tokens, but {len(row)} token_scores")


def build_token_scores(scores: Scores, shard: RolloutShard) -> Tensor | None:
    """Return the scores per token [n, T] float32, 0 outside the mask; None if the reward gives none."""
    if scores.token_scores is None:
        return None
    return pad_right(scores.token_scores, 0.0, shard.rollout.mask.shape[1], torch.float32)


def average_equal_responses(rollout: Rollout) -> Rollout:
    """Return the scored rollout with the mean score on all equal responses to a prompt.

    A reward model may score a text differently in another batch; the difference would rank equal responses.
    """
    rows: dict[tuple[int, str], list[int]] = {}
    for row, key in enumerate(zip(rollout.example_index.tolist(), rollout.responses, strict=True)):
        rows.setdefault(key, []).append(row)
    scores = require(rollout.scores, "scores").clone()
    for group in rows.values():
        if len(group) > 1:
            scores[group] = scores[group].double().mean().to(scores.dtype)
    return rollout.replace(scores=scores)


def compute_penalties(rollout: Rollout, settings: PenaltySettings) -> Tensor | None:
    """Return the penalties [N] float32 that are subtracted from the scores; None if no penalty is configured."""
    if not settings.per_token and not settings.missing_eos:
        return None
    truncated = torch.tensor([ending == LENGTH for ending in rollout.endings])
    return settings.per_token * rollout.mask.sum(-1) + settings.missing_eos * truncated


def subtract_penalties(rollout: Rollout, penalties: Tensor | None) -> Rollout:
    """Return the scored rollout with `penalties` subtracted from its scores, unless they are None."""
    if penalties is None or rollout.scores is None:
        return rollout
    return rollout.replace(scores=rollout.scores - penalties)
