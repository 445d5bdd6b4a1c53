"""One iteration: its prompts, random numbers, models and temperature, and the moving reference."""

import bisect
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from apa_cli.algorithms.plans import Online
from apa_cli.randomness import Stream, make_generator, sample_uniforms
from apa_cli.rollout.engine import pad_right
from apa_cli.rollout.statistics import compute_sampler_gap
from apa_cli.training.trainer import Trainer
from apa_cli.types import Prefix, Rollout, RolloutPlan
from tests.builders import make_mask, make_rollout

T = 0.7
HOT = f"sampling.temperature={T}"


def list_responses(rollout: Rollout) -> list[list[int]]:
    """Return the token ids of each response."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]


def list_prompts(rollout: Rollout) -> list[list[int]]:
    """Return the token ids of each prompt."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]


@torch.no_grad()
def shift_weights(module: torch.nn.Module, seed: int, size: float = 0.05) -> None:
    """Move every weight a little."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def copy_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return a copy of every weight."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def has_weights(module: torch.nn.Module, other: list[torch.Tensor]) -> bool:
    """Return True if the module has these weights to the bit."""
    return all(torch.equal(a, b) for a, b in zip(copy_weights(module), other, strict=True))


def sample(trainer: Trainer, iteration: int = 1) -> Rollout:
    """Return an iteration's responses as sampled, without scores."""
    return trainer.rollout_builder.sample(iteration, trainer.progress.algorithm)[0].rollout


# Sampling


@pytest.fixture(scope="module")
def pairs(make_trainer) -> Trainer:
    """Trainer with four prompts per iteration and two samples of each."""
    return make_trainer("samples_per_prompt=2", HOT, "seed=3")


@pytest.mark.parametrize("iteration", [1, 2, 15, 16])
def test_each_iteration_takes_the_next_prompts_of_a_shuffled_pass(pairs, iteration):
    # 60 prompts: iterations 1 to 15 are the first pass, the second begins with 16.
    number, within = divmod(iteration - 1, 15)
    order = make_generator(3, Stream.data_order, number).permutation(60)
    rows = order[4 * within : 4 * within + 4].tolist()
    shard, truncated_rate = pairs.rollout_builder.sample(iteration, {})
    rollout = shard.rollout
    examples = pairs.rollout_builder.examples
    assert rollout.prompts == [examples[row].prompt for row in rows for _ in range(2)]
    tokens = [pairs.evaluator.tokenizer(examples[row].prompt)["input_ids"] for row in rows for _ in range(2)]
    assert list_prompts(rollout) == tokens and truncated_rate == 0
    assert rollout.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.example_index.tolist() == [row for row in rows for _ in range(2)]
    assert shard.positions.tolist() == list(range(8))
    assert rollout.columns == [examples[row].columns for row in rows for _ in range(2)]


@torch.no_grad()
def sample_plainly(trainer: Trainer, prompt: list[int], numbers: np.ndarray) -> list[int]:
    """Sample one response by full forward passes in float64, without a KV cache."""
    tokens = []
    for u in numbers.tolist():
        logits = trainer.models.policy(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double() / T
        edges = logits.softmax(-1).cumsum(-1).tolist()
        assert min(abs(edge - u) for edge in edges[:-1]) > 1e-6  # else rounding may decide: choose another seed
        tokens.append(min(bisect.bisect_left(edges, u), len(edges) - 1))
        if tokens[-1] in trainer.evaluator.end_tokens:
            break
    return tokens


@pytest.mark.parametrize("iteration", [1, 2])
def test_each_sample_of_a_prompt_has_its_own_random_numbers(pairs, iteration):
    rollout = sample(pairs, iteration)
    places = [(place, number) for place in range(4) for number in (0, 1)]
    numbers = sample_uniforms(3, Stream.rollout, iteration, places, 12)
    responses = list_responses(rollout)
    assert responses == [
        sample_plainly(pairs, prompt, row) for prompt, row in zip(list_prompts(rollout), numbers, strict=True)
    ]
    assert all(responses[2 * i] != responses[2 * i + 1] for i in range(4))


plan_calls: list[tuple[int, float, dict]] = []
"""Step, first random number and state of each call of `PlannedOnline.rollout`."""


@dataclass(frozen=True)
class PlannedOnline(Online):
    """Online plan that records the calls of `rollout`, and plans a prefix for every response of iteration 2."""

    def rollout(self, step, rng, state):
        plan_calls.append((step, rng.random(), state))
        return (RolloutPlan("policy", Prefix("uniform", 1.0 if step == 2 else 0.0), "policy"),)


def test_the_plan_is_followed_and_has_its_own_random_numbers(pairs):
    plan_calls.clear()
    builder = replace(pairs.rollout_builder, config=replace(pairs.config, plan=PlannedOnline()))
    plain, changed = (builder.sample(iteration, {"n": iteration})[0].rollout for iteration in (1, 2))
    assert plan_calls == [(step, make_generator(3, Stream.plan, step).random(), {"n": step}) for step in (1, 2)]
    # Without prefixes the responses are those of the online plan; with prefixes most of them differ.
    assert list_responses(plain) == list_responses(sample(pairs, 1))
    online = list_responses(sample(pairs, 2))
    assert sum(a != b for a, b in zip(list_responses(changed), online, strict=True)) > 4
    assert torch.equal(changed.on_policy, changed.mask)  # prefix and completion are both the policy's


# Forward passes


@torch.no_grad()
def compute_plain_logprobs(model: torch.nn.Module, rollout: Rollout, temperature: float = T) -> torch.Tensor:
    """Return log π of every response token, one response at a time, 0 outside the mask."""
    rows = []
    for prompt, response in zip(list_prompts(rollout), list_responses(rollout), strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
        table = logits.log_softmax(-1)
        rows.append([float(table[len(prompt) - 1 + t, token]) for t, token in enumerate(response)])
    return pad_right(rows, 0.0, rollout.mask.shape[1], torch.float32)


@torch.no_grad()
def compute_plain_values(trainer: Trainer, rollout: Rollout) -> torch.Tensor:
    """Return V at the position before every response token, which does not depend on the temperature."""
    critic, rows = trainer.models.critics["value"], []
    for prompt, response in zip(list_prompts(rollout), list_responses(rollout), strict=True):
        hidden = critic.backbone(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        values = hidden @ critic.head.weight[0] + critic.head.bias[0]
        rows.append(values[len(prompt) - 1 : len(prompt) - 1 + len(response)].tolist())
    return pad_right(rows, 0.0, rollout.mask.shape[1], torch.float32)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # log-probs near −6: a few roundings of 5e-7


def test_forward_passes_match_plain_ones_at_the_temperature(make_trainer):
    trainer = make_trainer("algo=ppo", HOT, "reference.refresh_every=2", "microbatch_size=2", "minibatch_size=8")
    policy, moving = trainer.models.policy, trainer.models.moving_reference
    sampled = sample(trainer)
    for number, module in enumerate((policy, moving, trainer.models.critics)):
        shift_weights(module, number)
    rollout = trainer.forward_passes.run(sampled)
    expected = {
        "old": compute_plain_logprobs(policy, rollout),
        "reference": compute_plain_logprobs(moving, rollout),
        "init": compute_plain_logprobs(trainer.models.reference, rollout),
    }
    for name, table in expected.items():
        assert_close(rollout.logprobs[name], table)
    assert_close(rollout.values["value"], compute_plain_values(trainer, rollout))
    # The models differ on these tokens; the policy sampled them while it was still π_init.
    for first, second in itertools.combinations(expected.values(), 2):
        assert float((first - second).abs().max()) > 0.05
    assert float(rollout.values["value"].abs().max()) > 0.05
    assert_close(rollout.logprobs["sampler"], expected["init"])
    assert torch.equal(rollout.logprobs["sampler"], sampled.logprobs["sampler"])


def test_without_a_moving_reference_the_loss_uses_the_frozen_one(make_trainer):
    trainer = make_trainer("algo=apa", HOT)
    rollout = sample(trainer)
    shift_weights(trainer.models.policy, 0)
    rollout = trainer.forward_passes.run(rollout)
    assert trainer.models.moving_reference is None
    assert rollout.logprobs["reference"] is rollout.logprobs["init"] and "old" not in rollout.logprobs
    assert_close(rollout.logprobs["reference"], compute_plain_logprobs(trainer.models.reference, rollout))


# reference.log_kl


def count_reference_passes(trainer: Trainer) -> list[int]:
    """Return a list to which every forward pass of the reference adds its number of rows."""
    rows = []

    def record(module, arguments, options):
        rows.append(len(options["input_ids"]))

    trainer.models.reference.register_forward_pre_hook(record, with_kwargs=True)
    return rows


@pytest.mark.parametrize(
    ("algo", "rows_without"),
    [("awr", 0), pytest.param("apa", 8, marks=pytest.mark.slow), ("ppo algo.kl_controller=adaptive", 8)],
)
def test_without_log_kl_the_reference_is_computed_only_if_the_algorithm_needs_it(algo, rows_without, make_trainer):
    results = {}
    for log_kl, expected_rows in ((True, 8), (False, rows_without)):
        trainer = make_trainer(*f"algo={algo}".split(), f"reference.log_kl={str(log_kl).lower()}")
        rows = count_reference_passes(trainer)
        results[log_kl] = [trainer.run_phases(iteration).metrics for iteration in (1, 2)]
        # each response goes through the reference once in each iteration, packed or not
        assert sum(rows) <= 2 * expected_rows and bool(rows) is bool(expected_rows)
    for metrics, others in zip(results[True], results[False], strict=True):
        kl = {name for name in metrics if name.startswith("kl/")}
        assert kl == {"kl/sequence", "kl/token_k3"}
        assert others == {name: value for name, value in metrics.items() if name not in kl}


def test_a_run_without_kl_finishes(run_train, comparable):
    overrides = ["algo=awr", "iterations=2", "guard.max_kl=null"]
    run, other = (
        run_train(*overrides, f"reference.log_kl={log_kl}", name=f"run_{log_kl}") for log_kl in ("false", "true")
    )
    assert (run / "result.json").is_file()
    for row, expected in zip(comparable(run / "metrics.jsonl"), comparable(other / "metrics.jsonl"), strict=True):
        assert row == {name: value for name, value in expected.items() if not name.startswith("kl/")}
        assert row["iteration"] == 1 or row["eval/kl_exact"] >= 0  # measured in every evaluation all the same


# The moving reference


def test_the_moving_reference_is_refreshed_every_second_iteration_only(make_trainer):
    trainer = make_trainer("algo=apa", "reference.refresh_every=2", "optimizer.lr=1e-2")
    fixed, current = copy_weights(trainer.models.reference), copy_weights(trainer.models.moving_reference)
    assert has_weights(trainer.models.policy, current)
    for iteration in (1, 2, 3, 4, 5):
        metrics = trainer.run_iteration(iteration)
        assert not has_weights(trainer.models.policy, current)  # the update moved the policy
        if iteration in (2, 4):
            current = copy_weights(trainer.models.policy)
        assert has_weights(trainer.models.moving_reference, current) and has_weights(trainer.models.reference, fixed)
        first, moved = metrics["kl/sequence"], metrics["kl/refreshed"]
        if iteration in (1, 2):  # not refreshed yet
            assert moved == pytest.approx(first, rel=1e-6, abs=1e-6)
        if iteration in (3, 5):  # refreshed to the policy that samples here
            assert abs(moved) < 1e-4 < 1e-2 < abs(first)
        if iteration == 4:
            assert abs(moved) > 1e-3 and abs(moved - first) > 1e-3


def test_the_loss_uses_the_moving_reference(make_trainer):
    trainer = make_trainer(
        "algo=apa", "reference.refresh_every=2", "optimizer.lr=1e-30", "update_epochs=1", "minibatch_size=8"
    )
    rollout = sample(trainer)
    shift_weights(trainer.models.moving_reference, 0)
    moved = compute_plain_logprobs(trainer.models.moving_reference, rollout, 1.0)
    log_z = trainer.run_iteration(1)["apa/log_z_lower"]
    scores = torch.tensor(trainer.score(rollout.prompts, rollout.responses, rollout.columns).values)
    # The critic's values are 0: Â_t is the score over its standard deviation, times 0.95 per token that follows.
    following = rollout.mask.sum(-1, keepdim=True) - 1 - torch.arange(rollout.mask.shape[1])
    advantages = (scores / scores.std(correction=0)).unsqueeze(-1) * 0.95**following
    residual = advantages / 0.1 - (rollout.logprobs["sampler"] - moved)
    assert log_z == pytest.approx(float(residual[rollout.mask].mean()), rel=1e-4)


# policy/sampler_gap


def test_the_gap_is_a_mean_over_the_mask():
    table = torch.tensor([[-1.0, -2.0, 5.0], [-3.0, 5.0, 5.0]])
    rollout = make_rollout(make_mask([2, 1], width=3), logprobs={"sampler": table})
    assert compute_sampler_gap(rollout) == {}
    old = torch.tensor([[-1.5, -1.75, 0.0], [-3.0, 0.0, 0.0]])
    # ½ + ¼ + 0 of three tokens
    rollout = rollout.replace(logprobs={"sampler": table, "old": old})
    assert compute_sampler_gap(rollout) == {"policy/sampler_gap": 0.25}
    # with a related sequence: 1 of its on-policy token, and 9 of another policy's, which does not count
    other = make_rollout(
        make_mask([2, 1]), on_policy=torch.tensor([[True, False], [False, False]]),
        logprobs={"old": torch.tensor([[1.0, 9.0], [9.0, 0.0]])},
    )  # fmt: skip
    assert compute_sampler_gap(rollout.replace(related={"other": other})) == {"policy/sampler_gap": (0.75 + 1) / 4}


def test_the_gap_of_ppo_is_of_the_whole_rollout_before_the_first_update(make_trainer, monkeypatch):
    trainer = make_trainer("algo=ppo", HOT, "minibatch_size=2", "microbatch_size=2", "optimizer.lr=1e-2")
    shard, truncated_rate = trainer.rollout_builder.sample(1, {})
    rollout = shard.rollout
    # The first token of row i differs by (i + 1)/8: 36/8 in all.
    shifted = rollout.logprobs["sampler"].clone()
    shifted[:, 0] += torch.tensor([(-1) ** i * (i + 1) / 8 for i in range(8)])
    changed = replace(shard, rollout=rollout.replace(logprobs={"sampler": shifted}))
    monkeypatch.setattr(trainer.rollout_builder, "sample", lambda iteration, state: (changed, truncated_rate))
    metrics = trainer.run_iteration(1)
    assert metrics["policy/sampler_gap"] == pytest.approx(4.5 / int(rollout.mask.sum()), rel=1e-4)
    assert metrics["policy/ratio_max"] > 1.01  # after the first update
