"""Builders of models, batches and updaters for the tests of the update."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from apa_cli.algorithms.apa import APA, Normalizer
from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.base import Algorithm, Whitening
from apa_cli.algorithms.ppo import PPO
from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.models.critic import CriticModule, build_value_head
from apa_cli.models.forward import TrainingModel, compute_response_logprobs
from apa_cli.settings import DType, HeadKind, LRScheduler, OptimizerSettings, RunSettings, UpdateOrder
from apa_cli.training.objective import Objective
from apa_cli.training.updater import Updater, build_optimizer
from apa_cli.types import Batch, Loss, Needs, PolicyOutput
from tests.builders import build_tiny_policy, make_algorithm, make_batch, make_sequences

CPU = torch.device("cpu")

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6], [5, 3], [5, 8, 9], [7, 9], [3], [2, 3, 8, 4]]
RESPONSES = [
    [2, 7],
    [8, 2, 8, 1, 8, 2],
    [8],
    [4, 5, 9],
    [0, 4],
    [5, 2, 3, 5, 3],
    [6, 0, 2, 8],
    [7, 4, 7, 1, 3, 5],
]

COMMON = {"gae_lambda": 0.95, "whitening": Whitening.minibatch, "value_coef": 0.7, "value_clip_range": 0.2}
ALGORITHMS = {
    "apa": make_algorithm(APA, **COMMON, normalizer=Normalizer.batch),
    "awr": make_algorithm(AWR, **COMMON),
    "ppo": make_algorithm(PPO, **COMMON),
}

RUN = RunSettings(
    name="test",
    seed=0,
    iterations=10,
    rollout_batch_size=8,
    minibatch_size=8,
    microbatch_size=8,
    samples_per_prompt=1,
    update_epochs=1,
    update_order=UpdateOrder.epochs,
    stop_at_kl=None,
    resume=None,
    resume_changed=[],
    fork=None,
    overwrite=False,
    stop_after=None,
    dry_run=False,
    run=None,
)
OPTIMIZER = OptimizerSettings(
    lr=1e-3,
    critic_lr=2e-3,
    betas=[0.9, 0.95],
    eps=1e-8,
    weight_decay=1e-6,
    max_grad_norm=1.0,
    joint_clip=False,
    lr_scheduler=LRScheduler.constant,
    warmup_ratio=0.0,
    critic_warmup_iterations=0,
)


def build_model(on_trunk: bool = False, critics: tuple[str, ...] = ("value",)) -> TrainingModel:
    """Return a policy and critics whose values are not 0, on networks of their own or on the policy's trunk."""
    modules = {}
    torch.manual_seed(5)
    for name in critics:
        head = build_value_head(HeadKind.linear, 16)
        torch.nn.init.normal_(head.weight, std=0.3)
        modules[name] = CriticModule(None if on_trunk else build_tiny_policy(seed=1).base_model, head)
    return TrainingModel(build_tiny_policy(seed=0), modules, temperature=1.0)


@torch.no_grad()
def make_response_batch(
    model: TrainingModel, left: int = 0, right: int = 0, junk: int = 0, drift: float = 0.0
) -> Batch:
    """Return the eight responses with `left` and `right` further columns of padding, filled with the token `junk`.

    `drift` is the standard deviation of the noise on the sampler's, the reference's and the old log-probs and values.
    """
    tokens = make_sequences(PROMPTS, RESPONSES, left, right, junk)
    torch.manual_seed(7)
    noise = {
        name: torch.nn.functional.pad(torch.randn(8, 6), (0, right)) * tokens.mask
        for name in ("sampler", "reference", "old", "values", "advantages", "returns")
    }
    batch = make_batch(tokens, advantages=noise["advantages"], returns={"value": noise["returns"]})
    logprobs = compute_response_logprobs(model.policy, batch, 1.0)
    return batch.replace(
        logprobs={name: logprobs + drift * noise[name] for name in ("sampler", "reference", "old")},
        values={"value": model(batch, with_policy=False).values["value"] + drift * noise["values"]},
    )


def set_logprobs(batch: Batch, **logprobs: torch.Tensor | None) -> Batch:
    """Return the batch with these log-probs; those that are None are left out."""
    changed = {**batch.logprobs, **logprobs}
    return batch.replace(logprobs={name: tensor for name, tensor in changed.items() if tensor is not None})


def make_updater(
    algorithm: Algorithm,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer | None = None,
    settings: OptimizerSettings = OPTIMIZER,
    world: World = SINGLE_PROCESS,
    **changes,
) -> Updater:
    """Return the updater of a run with `changes` to its settings."""
    optimizer, run = optimizer or build_optimizer(model, settings), replace(RUN, **changes)
    microbatch = BatchSizeHalver("microbatch_size", run.microbatch_size, 1, print)
    return Updater(algorithm, algorithm.needs(), model, optimizer, run, settings, DType.float32, CPU, microbatch, world)


def compute_gradients(algorithm: Algorithm, batch: Batch, microbatch: int = 8) -> tuple[dict, dict[str, float]]:
    """Return the gradient of the whole batch as one minibatch, by parameter, and the metrics."""
    model = build_model()
    minibatch = algorithm.prepare_minibatch(batch)
    updater = make_updater(algorithm, model, microbatch_size=microbatch)
    metrics = updater.accumulate_gradients(minibatch, is_first=True)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, metrics.sums | metrics.maxima


def assert_same(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    """Assert equal gradients and metrics: float32 sums in another order, 1e-4 relative or 1e-6 absolute."""
    assert one[0].keys() == other[0].keys()
    for name, gradient in one[0].items():
        torch.testing.assert_close(other[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-6)


def flatten(parameters) -> torch.Tensor:
    """Return a copy of all weights as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).clone()


def plain_descent(model: TrainingModel, rate: float = 1.0) -> torch.optim.SGD:
    """Return an optimizer whose steps are the clipped gradients times `rate`."""
    groups = [model.policy_parameters(), model.critic_parameters()]
    return torch.optim.SGD([{"params": group, "lr": rate, "base_lr": rate} for group in groups])


@dataclass(frozen=True)
class Probe(Algorithm):
    """Algorithm with the loss that a function gives."""

    make_loss: Callable[[Batch, PolicyOutput], Loss]
    requested: Needs = field(default_factory=Needs)

    def needs(self):
        return self.requested

    def prepare(self, rollout, state):
        raise NotImplementedError

    def loss(self, batch, output):
        return self.make_loss(batch, output)


def make_objective(updater: Updater, counts: dict[str, int], gap_count: int = 0) -> Objective:
    """Return the objective of one of the updater's steps, on a minibatch whose masks have these counts."""
    return Objective(
        updater.algorithm, updater.needs, updater.model, updater.dtype, updater.device, updater.world.size, counts,
        gap_count,
    )  # fmt: skip
