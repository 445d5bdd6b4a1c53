"""Rollout of an iteration: prompts, sampled responses, and the log-probs and values that the algorithm needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.datasets.base import shuffle_rows
from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.models.forward import autocast_to, compute_response_logprobs
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.models.prompting import PromptFormat
from apa_cli.randomness import Stream, make_generator
from apa_cli.rollout.collect import collect_rollout, concatenate_rollouts
from apa_cli.rollout.engine import LENGTH
from apa_cli.settings import Config, PenaltySettings
from apa_cli.tensor_ops import masked_mean
from apa_cli.training.mfu import PhaseHook
from apa_cli.training.models import RunModels
from apa_cli.training.updater import split_into_microbatches
from apa_cli.types import Example, Prompt, Rollout, Sequences


@dataclass
class RolloutBuilder:
    """Builder of an iteration's rollout; the trainer adds the scores."""

    config: Config
    models: RunModels
    prompt_format: PromptFormat
    end_tokens: frozenset[int]
    examples: list[Example]
    sampling_batch: BatchSizeHalver
    """Sequences sampled in parallel."""
    microbatch: BatchSizeHalver
    """Sequences per forward pass."""
    device: torch.device
    world: World = SINGLE_PROCESS

    def sample(self, iteration: int) -> tuple[Rollout, float]:
        """Sample this rank's shard of an iteration's responses; return it with the share of truncated prompts."""
        run, settings = self.config.run, self.config.sampling
        prompts, truncated_rate = self.select_prompts(iteration)
        plan = self.config.algo.plan(iteration, make_generator(run.seed, Stream.plan, iteration))
        shard = [prompts[i] for i in self.world.shard_indices(len(prompts))]

        def attempt(microbatch: int) -> Rollout:
            with autocast_to(self.device, self.config.model.dtype):
                return collect_rollout(
                    {"policy": self.models.sampler}, self.prompt_format.tokenizer, shard,
                    replace(settings, microbatch_size=microbatch), self.end_tokens, run.seed, Stream.rollout,
                    iteration, plan,
                )  # fmt: skip

        return self.sampling_batch.run(attempt), truncated_rate

    def select_prompts(self, iteration: int) -> tuple[list[Prompt], float]:
        """Return an iteration's prompts, each `samples_per_prompt` times, and the share that was truncated."""
        run, longest = self.config.run, self.config.sampling.max_prompt_tokens
        count = run.rollout_batch_size // run.samples_per_prompt
        rows = shuffle_rows((iteration - 1) * count, count, len(self.examples), run.seed)
        prompts: list[Prompt] = []
        truncated = 0
        for place, row in enumerate(rows):
            for number in range(run.samples_per_prompt):
                prompt, is_truncated = self.prompt_format.encode_prompt(self.examples[row], place, number, longest)
                prompts.append(prompt)
                truncated += is_truncated
        return prompts, truncated / len(prompts)

    @torch.no_grad()
    def run_forward_passes(self, rollout: Rollout, phase: PhaseHook = nullcontext) -> Rollout:
        """Return the rollout with the references' log-probs, and the values and old log-probs that the algorithm needs.

        The phases are "reference", "moving reference", "old log-probs" and "critic NAME".
        """
        models, needs = self.models, self.config.algo.needs()
        with phase("reference"):
            init = self.compute_logprobs(models.reference, rollout)
        anchor, old, values = init, None, {}
        if models.moving_reference is not None:
            with phase("moving reference"):
                anchor = self.compute_logprobs(models.moving_reference, rollout)
        if needs.old_logprobs:
            with phase("old log-probs"):
                old = self.compute_per_token(rollout, lambda part: models.model(part, critics=()).logprobs)
        for name in needs.critics:
            with phase(f"critic {name}"):
                values[name] = self.compute_values(name, rollout)
        return rollout.replace(init_logprobs=init, ref_logprobs=anchor, old_logprobs=old, values=values)

    def compute_logprobs(self, model: PreTrainedModel | AdapterDisabledModel, rollout: Rollout) -> Tensor:
        """Return log π of a model for the response tokens, [N, T] float32."""
        temperature = self.config.sampling.temperature
        return self.compute_per_token(rollout, lambda part: compute_response_logprobs(model, part, temperature))

    def compute_values(self, critic: str, rollout: Rollout) -> Tensor:
        """Return a critic's value before each response token, [N, T] float32."""
        model = self.models.model
        return self.compute_per_token(
            rollout, lambda part: model(part, with_policy=False, critics=(critic,)).values[critic]
        )

    def compute_per_token(self, rollout: Rollout, compute: Callable[[Sequences], Tensor]) -> Tensor:
        """Return a forward pass's result per token, [N, T] float32, computed in microbatches of similar length."""
        tensors = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)

        def attempt(microbatch: int) -> Tensor:
            result = torch.zeros(rollout.mask.shape)
            for rows in split_into_microbatches(rollout, microbatch):
                with autocast_to(self.device, self.config.model.dtype):
                    part = Sequences(*(tensor[rows].to(self.device) for tensor in tensors))
                    result[rows] = compute(part).float().cpu()
            return result

        return self.microbatch.run(attempt)

    def gather(self, rollout: Rollout, parts: Mapping[str, list[float]]) -> tuple[Rollout, Mapping[str, list[float]]]:
        """Return the whole rollout, and the scores of a reward's parts, from the shards of all ranks."""
        if self.world.size == 1:
            return rollout, parts
        rollouts, scores = zip(*self.world.all_gather((rollout, parts)), strict=True)
        count = self.config.run.rollout_batch_size
        all_parts = {name: [value for share in scores for value in share[name]][:count] for name in parts}
        return concatenate_rollouts(list(rollouts), self.prompt_format.tokenizer.pad_token_id, count), all_parts


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


def compute_sampler_gap(rollout: Rollout) -> dict[str, float]:
    """Return policy/sampler_gap, the mean |log-prob of the training forward pass − log-prob of the sampler|, in nats.

    Return {} without old log-probs; the updater then measures the gap.
    """
    if rollout.old_logprobs is None:
        return {}
    gap = (rollout.sampler_logprobs - rollout.old_logprobs).abs()
    return {"policy/sampler_gap": float(masked_mean(gap, rollout.mask))}
