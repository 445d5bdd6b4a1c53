"""Forward passes over prompts and responses: log-probs, values, whole distributions, at the response's positions.

The outputs for response token t come from the position before it: for the first, the last prompt token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.models.critic import Critic
from apa_cli.models.lm_head import chosen_logprobs, in_place_of, linear_head
from apa_cli.models.lora import WithoutAdapter, active_adapter, adapter, layers
from apa_cli.models.sequence_packing import WORTH, packed_inputs, packs
from apa_cli.settings import DType
from apa_cli.tensor_ops import tempered, token_logprobs
from apa_cli.types import Batch, PolicyOutput, Tokens


@contextmanager
def compute_precision(device: torch.device, dtype: DType) -> Iterator[None]:
    """Autocast to bfloat16 where that is asked for; weights stay as they are."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is DType.bfloat16):
        yield


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as one input, without columns that are padding in every row."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_ids: Tensor
    """[B, T'], T' ≤ T"""
    mask: Tensor
    """[B, T'], the n response tokens that count"""

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    @property
    def logits_to_keep(self) -> int:
        """The last columns of the outputs, which predict the response; for a model's argument of this name."""
        return self.response_ids.shape[1]

    def read(self, outputs: Tensor) -> Tensor:
        """Those of a model's outputs [B, S, …] that predict the tokens of the mask, [n, …] in its order."""
        return outputs[:, -self.logits_to_keep :][self.mask]

    @cached_property
    def packed(self) -> Packed | None:
        """The same without padding; None where there is too little of it, or a row without a prompt."""
        prompts = self.attention_mask.shape[1] - self.logits_to_keep + 1
        before = self.attention_mask[:, :prompts].sum(1)
        columns = torch.arange(self.logits_to_keep, device=self.mask.device)
        lengths = before + (self.mask * columns).amax(1)
        true = self.position_ids < lengths.unsqueeze(1)
        true[:, :prompts] &= self.attention_mask[:, :prompts].bool()
        if int((~true).sum()) < WORTH * len(true) or int(before.min()) == 0:
            return None
        first = lengths.cumsum(0) - lengths
        return Packed(
            packed_inputs(self.input_ids[true], self.position_ids[true], lengths.tolist()),
            ((first + before - 1).unsqueeze(1) + columns)[self.mask],
        )


@dataclass(frozen=True)
class Packed:
    """Prompts and responses one behind the other, see `packing`."""

    inputs: dict[str, Any]
    places: Tensor
    """[n], where the outputs predict the tokens of the mask"""

    logits_to_keep = 0
    """All of them."""

    def read(self, outputs: Tensor) -> Tensor:
        """Those of a model's outputs [1, S, …] that predict the tokens of the mask, [n, …] in its order."""
        return outputs[0, self.places]


def taken(model: nn.Module | WithoutAdapter, rows: Sequences) -> Sequences | Packed:
    """The rows in the form that costs the model least."""
    return rows.packed or rows if packs(model) else rows


def examine(models: Iterable[PreTrainedModel | WithoutAdapter]) -> None:
    """Finds out by passes of their own what is to be known of models; sharded ones could not make them."""
    for model in models:
        linear_head(model)
        packs(model)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """values [n] at the places of the mask [B, T'], 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sequences(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor) -> Sequences:
    """prompt_ids [B, P] padded on the left, response_ids [B, T] padded on the right, with their masks.

    The last response token is never an input: nothing is predicted from it.
    """
    first = int(prompt_mask.any(0).long().argmax())
    length = max(int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1, 1)
    prompt_ids, prompt_mask = prompt_ids[:, first:], prompt_mask[:, first:]
    response_ids = response_ids[:, :length]
    attention = torch.cat([prompt_mask, torch.ones_like(response_ids[:, 1:], dtype=torch.bool)], dim=1)
    return Sequences(
        input_ids=torch.cat([prompt_ids, response_ids[:, :-1]], dim=1),
        attention_mask=attention.long(),
        position_ids=(attention.long().cumsum(1) - 1).clamp(min=0),
        response_ids=response_ids,
        mask=mask[:, :length],
    )


def widened(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T'] as float32 [B, T], 0 outside the mask."""
    x = nn.functional.pad(x.float(), (0, mask.shape[1] - x.shape[1]))
    return x.masked_fill(~mask, 0.0)


def response_logits(model: PreTrainedModel | WithoutAdapter, rows: Sequences, temperature: float) -> Tensor:
    """[B, T', V] float32: the logits of the distribution that samples."""
    length = rows.response_ids.shape[1]
    output = model(**rows.inputs, use_cache=False, logits_to_keep=length)
    return tempered(output.logits, temperature)


def response_logprobs(model: PreTrainedModel | WithoutAdapter, batch: Batch | Tokens, temperature: float) -> Tensor:
    """log π of each response token, [B, T] float32, 0 outside the mask."""
    rows = sequences(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
    return scored(model, rows, batch.mask, temperature)[0]


def scored(
    model: PreTrainedModel | WithoutAdapter, rows: Sequences, mask: Tensor, temperature: float, **options: Any
) -> tuple[Tensor, Any, Sequences | Packed]:
    """log π of each response token, [B, T] float32, 0 outside the mask [B, T]; what the model returned, and for what.

    The tokens outside the mask never reach the output head where it is one that `linear_head` knows.
    """
    head = linear_head(model)
    given = rows if head is None else taken(model, rows)
    options = {**given.inputs, "use_cache": False, "logits_to_keep": given.logits_to_keep, **options}
    if head is None:
        output = model(**options)
        logits = tempered(output.logits, temperature)
        return widened(token_logprobs(logits, rows.response_ids), mask), output, given

    def logprobs(states: Tensor) -> Tensor:
        token_ids = rows.response_ids[rows.mask]
        chosen = chosen_logprobs(given.read(states), head.weight, head.bias, token_ids, temperature)
        return spread(chosen, rows.mask)

    with in_place_of(head, logprobs):
        output = model(**options)
    return widened(output.logits, mask), output, given


def response_states(
    model: PreTrainedModel | WithoutAdapter, rows: Sequences
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the output head reads before each true token, [n, h] in the order of the mask, and the head itself.

    The head gives the logits [m, V] of m of these rows. Where `linear_head` does not know it, the rows are the logits.
    """
    head = linear_head(model)
    given = rows if head is None else taken(model, rows)
    options = {**given.inputs, "use_cache": False, "logits_to_keep": given.logits_to_keep}
    if head is None:
        return given.read(model(**options).logits), lambda logits: logits
    with in_place_of(head, given.read):
        states = model(**options).logits
    return states, head


class TrainingModel(nn.Module):
    """Policy and critics as one module, so that one wrapper distributes them and one call computes both."""

    def __init__(self, policy: PreTrainedModel, critics: dict[str, Critic], temperature: float):
        super().__init__()
        self.policy = policy
        self.critics = nn.ModuleDict(critics)
        self.temperature = temperature

    def forward(
        self, batch: Batch | Tokens, with_policy: bool = True, critics: Collection[str] | None = None
    ) -> PolicyOutput:
        """Log-probs [B, T] and the values [B, T] of the critics named (None: of all) of the batch's responses.

        Without the policy the log-probs are 0, and its pass is saved where no critic reads its trunk.
        """
        named = [name for name in self.critics if critics is None or name in critics]
        rows = sequences(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
        on_trunk = any(self.critics[name].on_trunk for name in named)
        logprobs, given, trunk = torch.zeros(batch.mask.shape, device=batch.mask.device), rows, None
        if with_policy or on_trunk:
            with recomputing(self.policy):
                logprobs, output, given = scored(
                    self.policy, rows, batch.mask, self.temperature, output_hidden_states=on_trunk
                )
            trunk = output.hidden_states[-1] if on_trunk else None
        return PolicyOutput(
            logprobs=logprobs,
            values={name: self.critic_values(name, rows, batch.mask, given, trunk) for name in named},
        )

    def critic_values(
        self, name: str, rows: Sequences, mask: Tensor, given: Sequences | Packed, trunk: Tensor | None
    ) -> Tensor:
        """One critic's values [B, T]; `trunk` is what the policy's own pass computed from `given`, if it did."""
        critic = self.critics[name]
        if critic.adapter is not None:
            given = taken(self.policy, rows)
            with adapter(self.policy, critic.adapter), recomputing(self.policy):
                trunk = self.policy.base_model(**given.inputs, use_cache=False).last_hidden_state
        elif critic.backbone is not None:
            given = taken(critic.backbone, rows)
        with recomputing(critic):
            return widened(spread(critic(given.inputs, given.read, trunk), rows.mask), mask)

    def backbones(self) -> list[PreTrainedModel]:
        """The trunks of those critics that have one of their own."""
        return [critic.backbone for critic in self.critics.values() if critic.backbone is not None]

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the optimizer's first group trains: neither critics nor their adapters on the policy's base."""
        own = [critic.adapter for critic in self.critics.values() if critic.adapter is not None]
        return [
            parameter
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad and not any(f".{adapter}." in name for adapter in own)
        ]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the second group trains."""
        policy = {id(parameter) for parameter in self.policy_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in policy]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Lets the model recompute activations in the backward pass, where `recomputing` asks for it.

    The pass is repeated under the adapter that was active the first time. Some blocks apply dropout themselves,
    whatever mode their layers are in; it is set to 0.
    """
    for block in model.modules():
        if hasattr(block, "gradient_checkpointing"):
            for name, value in vars(block).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(block, name, 0.0)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), adapter(model, active_adapter(model)) if layers(model) else nullcontext()

    # transformers renamed it on the way to version 6
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is on in the block, for the models that `checkpoint_activations` was called on.

    `transformers` does it only in blocks in training mode; their layers stay in evaluation mode, without dropout.
    """
    marked = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    marked = marked if torch.is_grad_enabled() else []
    for module in marked:
        module.training = True
    try:
        yield
    finally:
        for module in marked:
            module.training = False
