"""Decoding with critics: logits that an algorithm adjusts by its critics on the policy's trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from apa_cli.errors import ConfigError
from apa_cli.models.forward import TrainingModel
from apa_cli.models.lm_head import find_linear_head, override_forward


@contextmanager
def adjust_decoding(model: TrainingModel, adjust: Callable[[Tensor, Mapping[str, Tensor]], Tensor]) -> Iterator[None]:
    """Within the block, let every call of the policy return `adjust(logits, critic_outputs)` instead of its logits.

    `adjust` maps the policy's logits [n, V] in float32, before the temperature, and the outputs of the critics and
    Polyak copies on its trunk, [n] of a state critic and [n, V] of an action critic, to logits [n, V]. A reference
    that shares the policy's base must not be called within the block, as it shares the head. Raise ConfigError if the
    policy's logits are not the output of a plain linear layer. The probe of `find_linear_head` must have run if the
    model is sharded.
    """
    head = find_linear_head(model.policy)
    if head is None:
        raise ConfigError(
            "algo: decoding with critics needs a plain linear output head, which this "
            f"{model.policy.config.model_type} model lacks; choose another model, without an adapter on its head"
        )
    names = [name for name in model.list_critics() if model.get_critic(name).is_on_trunk]

    def compute_logits(states: Tensor) -> Tensor:
        rows = states.flatten(0, -2)
        outputs = {name: model.get_critic(name).evaluate_states(rows) for name in names}
        logits = nn.Linear.forward(head, rows).float()
        return adjust(logits, outputs).unflatten(0, states.shape[:-1])

    with override_forward(head, compute_logits):
        yield
