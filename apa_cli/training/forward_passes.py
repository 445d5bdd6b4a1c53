"""Forward passes before the update: the log-probs and values that the algorithm and kl/* need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.models.forward import autocast_to, compute_response_logprobs
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.settings import Config, DType
from apa_cli.training.mfu import PhaseHook
from apa_cli.training.minibatches import split_into_microbatches
from apa_cli.training.models import RunModels
from apa_cli.types import GUIDE, INIT, OLD, REFERENCE, RESPONSE, TARGET, Rollout, Sequences

LOGPROBS = (INIT, REFERENCE, GUIDE, OLD)
"""The passes that compute log-probs; all others compute values of the critic of that name."""


@dataclass
class ForwardPasses:
    """The passes of a run's models over the rows to train on."""

    config: Config
    models: RunModels
    microbatch: BatchSizeHalver
    """Sequences per forward pass."""
    device: torch.device
    world: World = SINGLE_PROCESS

    @torch.no_grad()
    def run(self, rollout: Rollout, phase: PhaseHook = nullcontext) -> Rollout:
        """Return the whole rollout with the log-probs and values that the algorithm and kl/* need, on every rank.

        Each rank computes a shard. The phases are "reference", "moving reference", "guide", "old log-probs" and
        "critic NAME".
        """
        if not len(rollout):
            return rollout
        shard = torch.tensor(self.world.shard_indices(len(rollout)))
        names = {RESPONSE: rollout, **rollout.related}
        computed = {
            name: self.compute_passes(sequences, self.list_passes(name, sequences), shard, phase)
            for name, sequences in names.items()
        }
        gathered = self.world.all_gather(computed)
        complete: dict[str, Sequences] = {}
        for name, sequences in names.items():
            logprobs, values = dict(sequences.logprobs), dict(sequences.values)
            for quantity in computed[name]:
                tensor = torch.cat([rank[name][quantity] for rank in gathered])[: len(rollout)]
                (logprobs if quantity in LOGPROBS else values)[quantity] = tensor
            if self.models.moving_reference is None and INIT in logprobs and REFERENCE in logprobs:
                logprobs[REFERENCE] = logprobs[INIT]  # `compute_kl_metrics` compares them by identity
            complete[name] = sequences.replace(logprobs=logprobs, values=values)
        own = complete.pop(RESPONSE)
        return rollout.replace(logprobs=own.logprobs, values=own.values, related=complete)

    def list_passes(self, name: str, sequences: Sequences) -> list[str]:
        """Return what is computed for a sequence before the update: the algorithm's needs, and those of kl/*."""
        passes = list(self.config.needs.passes.get(name, ()))
        if self.config.reference.log_kl and bool(sequences.on_policy.any()):
            passes += [INIT] if self.models.moving_reference is None else [INIT, REFERENCE]
        return list(dict.fromkeys(passes))

    def compute_passes(
        self, sequences: Sequences, passes: list[str], rows: Tensor, phase: PhaseHook
    ) -> dict[str, Tensor]:
        """Return log-probs and values [n, T] float32 of the rows [n], by the names in `passes`."""
        names = ("prompt_ids", "prompt_mask", "response_ids", "mask", "on_policy")
        part = Sequences(**{name: getattr(sequences, name)[rows] for name in names})
        models, computed = self.models, {}
        if INIT in passes or (REFERENCE in passes and models.moving_reference is None):
            with phase("reference"):
                computed[INIT] = self.compute_logprobs(models.reference, part)
        if REFERENCE in passes and models.moving_reference is None:
            computed[REFERENCE] = computed[INIT]
        elif REFERENCE in passes:
            assert models.moving_reference is not None
            with phase("moving reference"):
                computed[REFERENCE] = self.compute_logprobs(models.moving_reference, part)
        if GUIDE in passes:
            with phase("guide"):
                guide = self.config.guide
                computed[GUIDE] = self.compute_logprobs(
                    models.guide or models.reference, part, guide.temperature, guide.dtype
                )
        if OLD in passes:
            with phase("old log-probs"):
                computed[OLD] = self.compute_per_token(part, lambda micro: models.model(micro, critics=()).logprobs)
        for name in passes:
            if name not in LOGPROBS:
                with phase(f"critic {name}"):
                    computed[name] = self.compute_per_token(part, partial(self.compute_values, name))
        return {name: tensor for name, tensor in computed.items() if name in passes}

    def compute_logprobs(
        self,
        model: PreTrainedModel | AdapterDisabledModel,
        sequences: Sequences,
        temperature: float | None = None,
        dtype: DType | None = None,
    ) -> Tensor:
        """Return log π of a model for the response tokens, [N, T] float32; by default as the policy is computed."""
        scale = self.config.sampling.temperature if temperature is None else temperature
        return self.compute_per_token(sequences, lambda part: compute_response_logprobs(model, part, scale), dtype)

    def compute_values(self, critic: str, part: Sequences) -> Tensor:
        """Return the value of a critic, or of its Polyak copy, for each response token of a microbatch [B, T]."""
        name = critic.removesuffix(TARGET)
        return self.models.model(part, with_policy=False, critics=(name, critic)).values[critic]

    def compute_per_token(
        self, sequences: Sequences, compute: Callable[[Sequences], Tensor], dtype: DType | None = None
    ) -> Tensor:
        """Return a forward pass's result per token, [N, T] float32, computed in microbatches of similar length."""

        def attempt(microbatch: int) -> Tensor:
            result = torch.zeros(sequences.mask.shape)
            for rows in split_into_microbatches(sequences, microbatch):
                with autocast_to(self.device, dtype or self.config.model.dtype):
                    part = sequences.select_rows(rows).map_rows(lambda tensor: tensor.to(self.device))
                    result[rows] = compute(part).float().cpu()
            return result

        return self.microbatch.run(attempt)
