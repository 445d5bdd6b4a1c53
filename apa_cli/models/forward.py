"""Forward passes over prompts and responses: log-probs, entropy, values and logits at the response positions.

The outputs for response token t come from the position before it; for the first token, the last prompt token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.errors import ConfigError
from apa_cli.models.critic import CriticDict, CriticModule
from apa_cli.models.lm_head import (
    compute_head_logprobs,
    compute_head_statistics,
    find_linear_head,
    override_forward,
)
from apa_cli.models.lora import (
    AdapterDisabledModel,
    find_adapter_parameters,
    find_lora_layers,
    get_active_adapter,
    use_adapter,
)
from apa_cli.models.sequence_packing import MIN_PADDING_PER_SEQUENCE, can_pack, pack_inputs
from apa_cli.models.structure import get_trunk
from apa_cli.settings import DType
from apa_cli.tensor_ops import apply_temperature, token_entropy, token_logprobs
from apa_cli.types import POLICY, TARGET, Batch, Critic, PolicyOutput, Rollout, Sequences

LOGPROBS, ENTROPY, MEAN_LOGPROB = "logprobs", "entropy", "mean_logprob"
"""Statistics of the policy's distribution and a response token; see `PolicyOutput`."""


@contextmanager
def autocast_to(device: torch.device, dtype: DType) -> Iterator[None]:
    """Autocast to bfloat16 within the block if `dtype` says so; weights keep their precision."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is DType.bfloat16):
        yield


@dataclass(frozen=True)
class PaddedInputs:
    """Prompts and responses joined to one model input, without columns that are padding in every row."""

    input_ids: Tensor
    """[B, S] int64, S = P' + T' − 1, P' ≤ P"""
    attention_mask: Tensor
    """[B, S] int64"""
    position_ids: Tensor
    """[B, S] int64"""
    response_ids: Tensor
    """[B, T'] int64, T' ≤ T"""
    mask: Tensor
    """[B, T'] bool, true on the n response tokens that count"""

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    @property
    def logits_to_keep(self) -> int:
        """Number of last positions, which predict the response; the value of a model's argument of this name."""
        return self.response_ids.shape[1]

    def select_response_outputs(self, outputs: Tensor) -> Tensor:
        """Return the rows of a model's outputs [B, S, …] that predict the mask's tokens, [n, …] in the mask's order."""
        return outputs[:, -self.logits_to_keep :][self.mask]

    @cached_property
    def packed_inputs(self) -> PackedInputs | None:
        """The same sequences without padding; None if there is too little padding, or if a row has no prompt."""
        prompt_columns = self.attention_mask.shape[1] - self.logits_to_keep + 1
        prompt_lengths = self.attention_mask[:, :prompt_columns].sum(1)
        columns = torch.arange(self.logits_to_keep, device=self.mask.device)
        lengths = prompt_lengths + (self.mask * columns).amax(1)
        is_token = self.position_ids < lengths.unsqueeze(1)
        is_token[:, :prompt_columns] &= self.attention_mask[:, :prompt_columns].bool()
        if int((~is_token).sum()) < MIN_PADDING_PER_SEQUENCE * len(is_token) or int(prompt_lengths.min()) == 0:
            return None
        starts = lengths.cumsum(0) - lengths
        return PackedInputs(
            pack_inputs(self.input_ids[is_token], self.position_ids[is_token], lengths.tolist()),
            ((starts + prompt_lengths - 1).unsqueeze(1) + columns)[self.mask],
        )


@dataclass(frozen=True)
class PackedInputs:
    """Prompts and responses packed into one row; see `sequence_packing`."""

    inputs: dict[str, Any]
    """The model's keyword arguments."""
    positions: Tensor
    """[n] int64, the positions whose outputs predict the mask's tokens"""

    logits_to_keep = 0
    """All positions; the value of a model's argument of this name."""

    def select_response_outputs(self, outputs: Tensor) -> Tensor:
        """Return the rows of a model's outputs [1, S, …] that predict the mask's tokens, [n, …] in the mask's order."""
        return outputs[0, self.positions]


def pack_if_faster(model: PreTrainedModel | AdapterDisabledModel, padded: PaddedInputs) -> PaddedInputs | PackedInputs:
    """Return the inputs in packed form if the model supports it and enough padding is saved, else unchanged."""
    return padded.packed_inputs or padded if can_pack(model) else padded


def probe_models(models: Iterable[PreTrainedModel | AdapterDisabledModel]) -> None:
    """Run the probes of `find_linear_head` and `can_pack`, which cannot run once the models are sharded."""
    for model in models:
        find_linear_head(model)
        can_pack(model)


def scatter_to_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Return [B, T'] with values [n] at the true places of mask [B, T'], in their order, and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def build_padded_inputs(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor) -> PaddedInputs:
    """Join prompts [B, P], padded on the left, and responses [B, T], padded on the right, with their masks.

    The last response token is left out of the input, since nothing is predicted from it. If no response has a token,
    even if T is 0, one column stays, false in the mask.
    """
    if not mask.shape[1]:
        response_ids, mask = nn.functional.pad(response_ids, (0, 1)), nn.functional.pad(mask, (0, 1))
    start = int(prompt_mask.any(0).long().argmax())
    length = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1
    prompt_ids, prompt_mask = prompt_ids[:, start:], prompt_mask[:, start:]
    response_ids = response_ids[:, :length]
    attention = torch.cat([prompt_mask, torch.ones_like(response_ids[:, 1:], dtype=torch.bool)], dim=1)
    return PaddedInputs(
        input_ids=torch.cat([prompt_ids, response_ids[:, :-1]], dim=1),
        attention_mask=attention.long(),
        position_ids=(attention.long().cumsum(1) - 1).clamp(min=0),
        response_ids=response_ids,
        mask=mask[:, :length],
    )


def pad_to_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return x [B, T'] as float32 [B, T], 0 outside the mask [B, T]."""
    x = nn.functional.pad(x.float(), (0, mask.shape[1] - x.shape[1]))
    return x.masked_fill(~mask, 0.0)


def compute_response_logits(
    model: PreTrainedModel | AdapterDisabledModel, padded: PaddedInputs, temperature: float
) -> Tensor:
    """Return the logits of the sampling distribution at each response position, [B, T', V] float32."""
    output = model(**padded.inputs, use_cache=False, logits_to_keep=padded.logits_to_keep)
    # Some models ignore `logits_to_keep`.
    return apply_temperature(output.logits[:, -padded.logits_to_keep :], temperature)


def compute_response_logprobs(
    model: PreTrainedModel | AdapterDisabledModel, batch: Batch | Sequences, temperature: float
) -> Tensor:
    """Return log π of each response token, [B, T] float32, 0 outside the mask."""
    padded = build_padded_inputs(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
    return compute_statistics_with_output(model, padded, batch.mask, temperature, [LOGPROBS])[0][LOGPROBS]


def compute_statistics_with_output(
    model: PreTrainedModel | AdapterDisabledModel,
    padded: PaddedInputs,
    mask: Tensor,
    temperature: float,
    names: list[str],
    **options: Any,
) -> tuple[dict[str, Tensor], Any, PaddedInputs | PackedInputs]:
    """Return the named statistics of each response token, the model's output, and the inputs that it had.

    The names are LOGPROBS, ENTROPY and MEAN_LOGPROB; the statistics are [B, T] float32, 0 outside the mask [B, T].
    Only positions of the mask reach a linear output head, see `find_linear_head`. `options` are passed to the model.
    """
    head = find_linear_head(model)
    inputs = padded if head is None else pack_if_faster(model, padded)
    options = {**inputs.inputs, "use_cache": False, "logits_to_keep": inputs.logits_to_keep, **options}
    if head is None:
        output = model(**options)
        logits = apply_temperature(output.logits[:, -padded.logits_to_keep :], temperature)
        statistics = [compute_logit_statistic(name, logits, padded.response_ids) for name in names]
    else:

        def compute_statistics(states: Tensor) -> Tensor:
            # The weights are read here, during the model's forward pass: FSDP gathers them when it begins.
            head_inputs = (inputs.select_response_outputs(states), head.weight, head.bias)
            token_ids = padded.response_ids[padded.mask]
            if names == [LOGPROBS]:
                rows = [compute_head_logprobs(*head_inputs, token_ids, temperature)]
            else:
                every = compute_head_statistics(*head_inputs, token_ids, temperature)
                rows = [getattr(every, name) for name in names]
            return torch.stack([scatter_to_mask(row, padded.mask) for row in rows], dim=-1)

        with override_forward(head, compute_statistics):
            output = model(**options)
        statistics = list(output.logits.unbind(-1))
    return {name: pad_to_mask(x, mask) for name, x in zip(names, statistics, strict=True)}, output, inputs


def compute_logit_statistic(name: str, logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return one statistic [B, T'] of logits [B, T', V] and token_ids [B, T']; see `compute_statistics_with_output`."""
    if name == ENTROPY:
        return token_entropy(logits)
    return logits.log_softmax(dim=-1).mean(dim=-1) if name == MEAN_LOGPROB else token_logprobs(logits, token_ids)


def compute_head_inputs(
    model: PreTrainedModel | AdapterDisabledModel, padded: PaddedInputs
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the output head's input before each token of the mask, [n, h] in the mask's order, and the head itself.

    The head maps m of these rows to logits [m, V]. If `find_linear_head` returns None, the rows are the logits.
    """
    head = find_linear_head(model)
    inputs = padded if head is None else pack_if_faster(model, padded)
    options = {**inputs.inputs, "use_cache": False, "logits_to_keep": inputs.logits_to_keep}
    if head is None:
        return inputs.select_response_outputs(model(**options).logits), lambda logits: logits
    with override_forward(head, inputs.select_response_outputs):
        states = model(**options).logits
    return states, head


class TrainingModel(nn.Module):
    """Policy and critics as one module, so that one wrapper distributes them and one call computes both."""

    policy: PreTrainedModel
    critics: CriticDict
    targets: CriticDict
    """Polyak copies of critics, frozen, by the critic's name."""

    def __init__(
        self,
        policy: PreTrainedModel,
        critics: dict[str, CriticModule],
        temperature: float,
        specs: Iterable[Critic] = (),
    ):
        """Take policy and critics as they are, and copy the critics for which `specs` ask for a Polyak copy.

        Raise ConfigError for a copy of a critic that is an adapter on the policy.
        """
        super().__init__()
        self.policy = policy
        self.critics = CriticDict(critics)
        self.temperature = temperature
        self.polyak = {spec.name: (spec.polyak, spec.polyak_every) for spec in specs if spec.polyak is not None}
        """Critic name → rate τ of its copy and optimizer steps between updates."""
        for name in self.polyak:
            if critics[name].adapter is not None:
                raise ConfigError(
                    f"critic=adapter: the critic {name} needs a Polyak copy, which an adapter cannot have; "
                    "give critic=separate or critic=head"
                )
        self.targets = CriticDict({name: copy.deepcopy(critics[name]).requires_grad_(False) for name in self.polyak})

    def forward(
        self,
        batch: Sequences,
        with_policy: bool = True,
        critics: Collection[str] | None = None,
        entropy: bool = False,
        mean_logprob: bool = False,
        related_critics: Mapping[str, Collection[str]] | None = None,
    ) -> PolicyOutput:
        """Return the outputs for the rows' responses and, each by a pass of its own, for their related sequences.

        `critics` names the critics that are computed, "NAME/target" their Polyak copies; None: all critics and copies.
        For a related sequence only those are computed that `related_critics` has under its name.
        Without the policy, its pass runs only if a critic reads its trunk; otherwise the log-probs are 0.
        """
        names = [name for name in self.list_critics() if critics is None or name in critics]
        statistics = [LOGPROBS, *([ENTROPY] if entropy else []), *([MEAN_LOGPROB] if mean_logprob else [])]
        related = batch.related if isinstance(batch, Batch | Rollout) else {}
        return replace(
            self.compute_outputs(batch, with_policy, names, statistics),
            related={
                key: self.compute_outputs(
                    sequences, with_policy, [name for name in names if name in (related_critics or {}).get(key, ())],
                    statistics,
                )
                for key, sequences in related.items()
            },
        )  # fmt: skip

    def compute_outputs(
        self, sequences: Sequences, with_policy: bool, critics: list[str], statistics: list[str]
    ) -> PolicyOutput:
        """Return the outputs for one sequence of each row, with the named critics and statistics."""
        mask = sequences.mask
        padded = build_padded_inputs(sequences.prompt_ids, sequences.prompt_mask, sequences.response_ids, mask)
        needs_trunk = any(self.get_critic(name).is_on_trunk for name in critics)
        computed, trunk_states = {LOGPROBS: torch.zeros(mask.shape, device=mask.device)}, None
        inputs: PaddedInputs | PackedInputs = padded
        if with_policy or needs_trunk:
            with checkpoint_activations(self.policy):
                computed, output, inputs = compute_statistics_with_output(
                    self.policy, padded, mask, self.temperature, statistics, output_hidden_states=needs_trunk
                )
            trunk_states = output.hidden_states[-1] if needs_trunk else None
        values, logsumexp = {}, {}
        for name in critics:
            with torch.no_grad() if name.endswith(TARGET) else nullcontext():
                values[name], normalizer = self.compute_critic_values(name, padded, mask, inputs, trunk_states)
            if normalizer is not None:
                logsumexp[name] = normalizer
        return PolicyOutput(
            logprobs=computed[LOGPROBS],
            values=values,
            logsumexp=logsumexp,
            entropy=computed.get(ENTROPY),
            mean_logprob=computed.get(MEAN_LOGPROB),
        )

    def compute_critic_values(
        self,
        name: str,
        padded: PaddedInputs,
        mask: Tensor,
        inputs: PaddedInputs | PackedInputs,
        trunk_states: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return one critic's values and an action critic's logsumexp, [B, T], 0 outside the mask [B, T].

        `trunk_states` are the hidden states of the policy's own pass over `inputs`, for a critic on its trunk.
        """
        critic = self.get_critic(name)
        if critic.adapter is not None:
            inputs = pack_if_faster(self.policy, padded)
            with use_adapter(self.policy, critic.adapter), checkpoint_activations(self.policy):
                trunk_states = get_trunk(self.policy)(**inputs.inputs, use_cache=False).last_hidden_state
        elif critic.backbone is not None:
            inputs = pack_if_faster(critic.backbone, padded)
        token_ids = padded.response_ids[padded.mask]
        with checkpoint_activations(critic):
            values, logsumexp = critic(inputs.inputs, inputs.select_response_outputs, token_ids, trunk_states)

        def place(rows: Tensor) -> Tensor:
            return pad_to_mask(scatter_to_mask(rows, padded.mask), mask)

        return place(values), None if logsumexp is None else place(logsumexp)

    def list_critics(self) -> list[str]:
        """Return the names of the critics and, after them, of the Polyak copies: "NAME/target"."""
        return [*self.critics, *(name + TARGET for name in self.targets)]

    def get_critic(self, name: str) -> CriticModule:
        """Return the critic of this name, or the Polyak copy "NAME/target"."""
        return self.targets[name.removesuffix(TARGET)] if name.endswith(TARGET) else self.critics[name]

    @torch.no_grad()
    def update_targets(self, step: int) -> None:
        """Move each Polyak copy towards its critic, copy ← (1 − τ) copy + τ critic, if `polyak_every` divides `step`.

        `step` is the number of optimizer steps so far, the one just taken included.
        """
        for name, (rate, every) in self.polyak.items():
            if step % every == 0:
                pairs = zip(self.targets[name].parameters(), self.critics[name].parameters(), strict=True)
                for target, parameter in pairs:
                    target.lerp_(parameter, rate)

    def critic_backbones(self) -> list[PreTrainedModel]:
        """Return the backbones of the critics and of their Polyak copies, if any."""
        critics = [self.get_critic(name) for name in self.list_critics()]
        return [critic.backbone for critic in critics if critic.backbone is not None]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the policy's trained parameters, without those of critics' adapters on its base."""
        adapters = [critic.adapter for critic in self.critics.values() if critic.adapter is not None]
        others = {id(p) for name in adapters for p in find_adapter_parameters(self.policy, name).values()}
        return [p for p in self.policy.parameters() if p.requires_grad and id(p) not in others]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters that are not the policy's."""
        policy = {id(parameter) for parameter in self.policy_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in policy]

    def list_output_parameters(self, output: str) -> list[nn.Parameter]:
        """Return the trained parameters of one output: "policy", or a critic by its name.

        A critic's are those of its own network or of its adapter on the policy, and of its head.
        """
        if output == POLICY:
            return self.policy_parameters()
        critic, parameters = self.critics[output], []
        if critic.adapter is not None:
            parameters = list(find_adapter_parameters(self.policy, critic.adapter).values())
        return [p for p in (*parameters, *critic.parameters()) if p.requires_grad]


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Prepare the model to recompute activations in the backward pass of blocks under `checkpoint_activations`.

    The pass is repeated under the adapter that was active the first time. Some blocks apply dropout themselves,
    whatever mode their layers are in, so their dropout rates are set to 0.
    """
    for block in model.modules():
        if hasattr(block, "gradient_checkpointing"):
            for name, value in vars(block).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(block, name, 0.0)

    def make_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        has_adapter = bool(find_lora_layers(model))
        return nullcontext(), use_adapter(model, get_active_adapter(model)) if has_adapter else nullcontext()

    # transformers renames this method before version 6
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": make_contexts})


@contextmanager
def checkpoint_activations(model: nn.Module) -> Iterator[None]:
    """Within the block, checkpoint the activations of models that `enable_activation_checkpointing` has prepared.

    `transformers` does so only in blocks in training mode; their layers stay in evaluation mode, without dropout.
    """
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    blocks = blocks if torch.is_grad_enabled() else []
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
