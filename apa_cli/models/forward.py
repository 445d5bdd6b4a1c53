"""Forward passes over prompts and responses: log-probs, values and logits at the response positions.

The outputs for response token t come from the position before it; for the first token, the last prompt token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.models.critic import Critic, CriticDict
from apa_cli.models.lm_head import compute_head_logprobs, find_linear_head, override_forward
from apa_cli.models.lora import AdapterDisabledModel, find_lora_layers, get_active_adapter, use_adapter
from apa_cli.models.sequence_packing import MIN_PADDING_PER_SEQUENCE, can_pack, pack_inputs
from apa_cli.models.structure import get_trunk
from apa_cli.settings import DType
from apa_cli.tensor_ops import apply_temperature, token_logprobs
from apa_cli.types import Batch, PolicyOutput, Sequences


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

    The last response token is left out of the input, since nothing is predicted from it.
    """
    start = int(prompt_mask.any(0).long().argmax())
    length = max(int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1, 1)
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
    return apply_temperature(output.logits, temperature)


def compute_response_logprobs(
    model: PreTrainedModel | AdapterDisabledModel, batch: Batch | Sequences, temperature: float
) -> Tensor:
    """Return log π of each response token, [B, T] float32, 0 outside the mask."""
    padded = build_padded_inputs(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
    return compute_logprobs_with_output(model, padded, batch.mask, temperature)[0]


def compute_logprobs_with_output(
    model: PreTrainedModel | AdapterDisabledModel,
    padded: PaddedInputs,
    mask: Tensor,
    temperature: float,
    **options: Any,
) -> tuple[Tensor, Any, PaddedInputs | PackedInputs]:
    """Return log π of each response token, [B, T] float32, 0 outside the mask [B, T]; the output; and its inputs.

    Only positions of the mask reach a linear output head, see `find_linear_head`. `options` are passed to the model.
    """
    head = find_linear_head(model)
    inputs = padded if head is None else pack_if_faster(model, padded)
    options = {**inputs.inputs, "use_cache": False, "logits_to_keep": inputs.logits_to_keep, **options}
    if head is None:
        output = model(**options)
        logits = apply_temperature(output.logits, temperature)
        return pad_to_mask(token_logprobs(logits, padded.response_ids), mask), output, inputs
    linear = head

    def compute_logprobs(states: Tensor) -> Tensor:
        # The weights are read here, during the model's forward pass: FSDP gathers them when it begins.
        states, token_ids = inputs.select_response_outputs(states), padded.response_ids[padded.mask]
        logprobs = compute_head_logprobs(states, linear.weight, linear.bias, token_ids, temperature)
        return scatter_to_mask(logprobs, padded.mask)

    with override_forward(head, compute_logprobs):
        output = model(**options)
    return pad_to_mask(output.logits, mask), output, inputs


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

    def __init__(self, policy: PreTrainedModel, critics: dict[str, Critic], temperature: float):
        super().__init__()
        self.policy = policy
        self.critics = CriticDict(critics)
        self.temperature = temperature

    def forward(
        self, batch: Batch | Sequences, with_policy: bool = True, critics: Collection[str] | None = None
    ) -> PolicyOutput:
        """Return the responses' log-probs [B, T], and values [B, T] of the named critics (None: of all critics).

        Without the policy the log-probs are 0, and the policy's pass runs only if a critic reads its trunk.
        """
        names = [name for name in self.critics if critics is None or name in critics]
        padded = build_padded_inputs(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
        needs_trunk = any(self.critics[name].is_on_trunk for name in names)
        logprobs, trunk_states = torch.zeros(batch.mask.shape, device=batch.mask.device), None
        inputs: PaddedInputs | PackedInputs = padded
        if with_policy or needs_trunk:
            with checkpoint_activations(self.policy):
                logprobs, output, inputs = compute_logprobs_with_output(
                    self.policy, padded, batch.mask, self.temperature, output_hidden_states=needs_trunk
                )
            trunk_states = output.hidden_states[-1] if needs_trunk else None
        values = {name: self.compute_critic_values(name, padded, batch.mask, inputs, trunk_states) for name in names}
        return PolicyOutput(logprobs=logprobs, values=values)

    def compute_critic_values(
        self,
        name: str,
        padded: PaddedInputs,
        mask: Tensor,
        inputs: PaddedInputs | PackedInputs,
        trunk_states: Tensor | None,
    ) -> Tensor:
        """Return one critic's values [B, T], 0 outside the mask [B, T].

        `trunk_states` are the hidden states of the policy's own pass over `inputs`, for a critic on its trunk.
        """
        critic = self.critics[name]
        if critic.adapter is not None:
            inputs = pack_if_faster(self.policy, padded)
            with use_adapter(self.policy, critic.adapter), checkpoint_activations(self.policy):
                trunk_states = get_trunk(self.policy)(**inputs.inputs, use_cache=False).last_hidden_state
        elif critic.backbone is not None:
            inputs = pack_if_faster(critic.backbone, padded)
        with checkpoint_activations(critic):
            values = critic(inputs.inputs, inputs.select_response_outputs, trunk_states)
            return pad_to_mask(scatter_to_mask(values, padded.mask), mask)

    def critic_backbones(self) -> list[PreTrainedModel]:
        """Return the backbones of the critics, if any."""
        return [critic.backbone for critic in self.critics.values() if critic.backbone is not None]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the policy's trained parameters, without those of critics' adapters on its base."""
        adapters = [critic.adapter for critic in self.critics.values() if critic.adapter is not None]
        return [
            parameter
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad and not any(f".{adapter}." in name for adapter in adapters)
        ]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters that are not the policy's."""
        policy = {id(parameter) for parameter in self.policy_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in policy]


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
