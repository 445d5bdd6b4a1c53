"""Updates by every algorithm of conf/algo: microbatches, padding and what is under the mask change nothing."""

from functools import cache

import numpy as np
import pytest
import torch

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.hydra_api import list_groups
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.models.critic import build_critic
from apa_cli.models.forward import TrainingModel
from apa_cli.settings import Config, DType
from apa_cli.training.updater import Updater
from apa_cli.types import POLICY, RESPONSE, TARGET, Batch, Rollout, Sequences
from tests.builders import build_tiny_policy, make_rollout, make_sequences

CPU = torch.device("cpu")
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6], [5, 3]]
LONGEST = 6
"""Tokens of the longest response."""

VARIANTS = {
    "apa-log-z": "algo=apa algo.normalizer=batch algo.whitening=minibatch",
    "apa-group-mean": "algo=apa algo.advantage_estimator=group_mean",
    "ppo-entropy": "algo=ppo algo.entropy_coef=0.1",
    "rloo-entropy": "algo=rloo algo.entropy_coef=0.1",
    "grpo-constant": "algo=grpo algo.normalize_std=false algo.loss_reduction=constant",
    "grpo-token": "algo=grpo algo.loss_reduction=token algo.clip_range_high=0.28 lambda=0",
    "grpo-sequence": "algo=grpo algo.importance_level=sequence algo.entropy_coef=0.1",
    "reinforce_pp-group-mean": "algo=reinforce_pp algo.baseline=group_mean",
}
CASES = {**{name: f"algo={name}" for name in sorted(list_groups(None)["algo"])}, **VARIANTS}
"""Name → overrides: every algorithm as its yaml has it, and settings that reduce the loss in another way."""


@cache
def make_config(case: str) -> Config:
    """Return the configuration of a case, with two passes over the rows in minibatches of four responses."""
    sizes = ["rollout_batch_size=32", "minibatch_size=4", "update_epochs=2", "sampling.max_new_tokens=6"]
    return build_config(compose([*CASES[case].split(), *sizes]))


def build_model(config: Config) -> TrainingModel:
    """Return a policy and the critics that the algorithm needs, whose values are not 0."""
    policy = build_tiny_policy(seed=0)
    specs = config.needs.critics
    critics = {spec.name: build_critic(policy, spec, config.critic, config.lora, 1, None) for spec in specs}
    torch.manual_seed(5)
    for critic in critics.values():
        for parameter in critic.head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return TrainingModel(policy, critics, 1.0, specs)


def make_noise(rows: int, width: int, seed: int) -> torch.Tensor:
    """Return normal numbers [rows, width]; those of the first columns do not depend on `width`."""
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))[:, :width]


def sample_rows(config: Config, left: int, right: int, junk: int) -> Rollout:
    """Return the plan's responses to the four prompts, of 1 to 6 random tokens, with random scores.

    `left` and `right` are numbers of further columns of padding, filled with the token `junk`.
    """
    plans = config.plan.rollout(1, np.random.default_rng(0), config.algo.initial_state())
    rows = [
        (index, prompt)
        for index, plan in enumerate(plans)
        for prompt in range(len(PROMPTS))
        for _ in range(plan.samples or config.run.samples_per_prompt)
    ]
    rng = np.random.default_rng(3)
    lengths = [LONGEST, *rng.integers(1, LONGEST + 1, len(rows) - 1)]
    responses = [rng.integers(1, 10, length).tolist() for length in lengths]
    tokens = make_sequences([PROMPTS[prompt] for _, prompt in rows], responses, left, right, junk)
    is_sampled = torch.tensor([plans[index].roll_in == POLICY for index, _ in rows])
    rollout = make_rollout(
        tokens.mask,
        prompt_ids=tokens.prompt_ids,
        prompt_mask=tokens.prompt_mask,
        response_ids=tokens.response_ids,
        on_policy=tokens.mask & is_sampled.unsqueeze(1),
        groups=torch.tensor([prompt for _, prompt in rows]),
        plans=plans,
        plan_index=torch.tensor([index for index, _ in rows]),
        scores=make_noise(len(rows), 1, seed=1).squeeze(1),
    )
    return rollout.replace(masks=config.plan.masks(rollout))


@torch.no_grad()
def add_logprobs(sequences: Sequences, names: tuple[str, ...], model: TrainingModel, seed: int) -> Sequences:
    """Return the sequences with the log-probs and values of these names: the model's plus noise of deviation 0.3."""
    output, logprobs, values = model(sequences), dict(sequences.logprobs), dict(sequences.values)
    for number, name in enumerate(names):
        is_value = name.removesuffix(TARGET) in model.critics
        exact = output.values[name] if is_value else output.logprobs
        noise = 0.3 * make_noise(*exact.shape, seed + number) * sequences.mask
        (values if is_value else logprobs)[name] = exact + noise
    return sequences.replace(logprobs=logprobs, values=values)


def prepare_batch(config: Config, model: TrainingModel, left: int = 0, right: int = 0, junk: int = 0) -> Batch:
    """Return the batch that the algorithm prepares from `sample_rows`."""
    algorithm = config.algo
    rollout = add_logprobs(sample_rows(config, left, right, junk), ("sampler",), model, seed=10)
    state = algorithm.initial_state()
    rollout, state = algorithm.process_rollout(rollout, state, np.random.default_rng(0), encode=None)
    for number, (name, passes) in enumerate(config.needs.passes.items()):
        part = rollout if name == RESPONSE else rollout.related[name]
        part = add_logprobs(part, passes, model, seed=20 + 10 * number)
        rollout = part if name == RESPONSE else rollout.replace(related={**rollout.related, name: part})
    return algorithm.prepare(rollout, state)[0]


def run_updates(config: Config, model: TrainingModel, batch: Batch, microbatch: int = 4) -> tuple[dict, torch.Tensor]:
    """Return the metrics of an iteration's updates and all weights after it.

    The optimizer is plain descent: AdamW would turn the rounding of a zero gradient into a whole step.
    """
    groups = [group for group in (model.policy_parameters(), model.critic_parameters()) if group]
    descent = torch.optim.SGD([{"params": group, "lr": 0.1, "base_lr": 0.1} for group in groups])
    halver = BatchSizeHalver("microbatch_size", microbatch, 1, print)
    updater = Updater(
        config.algo, config.needs, model, descent, config.run, config.optimizer, DType.float32, CPU, halver
    )
    metrics = updater.update(batch, 1)
    return {**batch.metrics, **metrics}, torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.fixture(scope="module", params=CASES)
def config(request) -> Config:
    """Configuration of each case."""
    return make_config(request.param)


@pytest.fixture(scope="module")
def expected(config) -> tuple[dict, torch.Tensor]:
    """Metrics and weights of the updates without padding, in microbatches of whole minibatches."""
    start = torch.cat([weight.detach().flatten() for weight in build_model(config).parameters()])
    model = build_model(config)
    metrics, weights = run_updates(config, model, prepare_batch(config, model))
    assert float((weights - start).abs().max()) > 0.01
    return metrics, weights


def assert_same(result: tuple[dict, torch.Tensor], expected: tuple[dict, torch.Tensor]) -> None:
    """Assert equal metrics and weights: float32 sums in another order, 1e-4 relative or 1e-6 absolute."""
    assert result[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("microbatch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_updates_do_not_depend_on_the_microbatch(microbatch, config, expected):
    model = build_model(config)
    assert_same(run_updates(config, model, prepare_batch(config, model), microbatch), expected)


def test_updates_do_not_depend_on_padding(config, expected):
    model = build_model(config)
    padded = prepare_batch(config, model, left=3, right=5, junk=6)
    assert_same(run_updates(config, model, padded, microbatch=2), expected)


def spoil(part: Sequences) -> Sequences:
    """Return the sequences with −7 instead of every number outside the mask, which is 0, and other tokens there.

    As an old log-prob, −7 makes a probability ratio of exp(7), which every mean and maximum shows.
    """
    outside, related = ~part.mask, getattr(part, "related", {})

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(outside, -7.0) if x.is_floating_point() and x.shape == outside.shape else x

    spoiled = (
        (part.replace(related={}) if related else part)
        .map_rows(fill)
        .replace(
            prompt_ids=part.prompt_ids.masked_fill(~part.prompt_mask, 9),
            response_ids=part.response_ids.masked_fill(outside, 9),
        )
    )
    return spoiled.replace(related={name: spoil(other) for name, other in related.items()}) if related else spoiled


def test_what_is_under_the_mask_changes_nothing(config, expected):
    model = build_model(config)
    batch = prepare_batch(config, model)
    assert not bool(batch.mask.all())
    assert_same(run_updates(config, model, spoil(batch)), expected)
