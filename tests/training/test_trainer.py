"""One iteration from the inside: which prompts, which random numbers, which model at which temperature, and when."""

import bisect
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from apa_cli.algorithms.apa import APA
from apa_cli.randomness import Stream, generator, uniforms
from apa_cli.rollout.engine import right_padded
from apa_cli.runs.console import Console
from apa_cli.training.build import build_trainer
from apa_cli.training.trainer import Trainer, sampler_gap
from apa_cli.types import Rollout, RolloutPlan

T = 0.7
HOT = f"sampling.temperature={T}"


@pytest.fixture(scope="module")
def make_trainer(configured, tmp_path_factory):
    """make_trainer(*words) → the trainer of a small run that has not begun."""

    def make(*words: str) -> Trainer:
        folder = tmp_path_factory.mktemp("trainer")
        with Console(None, 1, quiet=True) as console:
            trainer = build_trainer(configured(*words), folder, None, None, console)
        trainer.progress.algorithm = trainer.config.algo.initial_state()
        return trainer

    return make


def responses(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]


def prompts(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]


@torch.no_grad()
def shifted(module: torch.nn.Module, seed: int, size: float = 0.05) -> None:
    """Moves every weight a little."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(module: torch.nn.Module, other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(module), other, strict=True))


# What is sampled


@pytest.fixture(scope="module")
def pairs(make_trainer) -> Trainer:
    """Four prompts an iteration, two samples of each."""
    return make_trainer("samples_per_prompt=2", HOT, "seed=3")


@pytest.mark.parametrize("iteration", [1, 2, 15, 16])
def test_each_iteration_takes_the_next_prompts_of_a_shuffled_pass(pairs, iteration):
    # 60 prompts: the first pass is iterations 1 to 15, the second begins with 16.
    number, within = divmod(iteration - 1, 15)
    order = generator(3, Stream.data_order, number).permutation(60)
    rows = order[4 * within : 4 * within + 4].tolist()
    rollout, cut = pairs.sample(iteration)
    assert rollout.prompts == [pairs.examples[row].prompt for row in rows for _ in range(2)]
    tokens = [pairs.tokenizer(pairs.examples[row].prompt)["input_ids"] for row in rows for _ in range(2)]
    assert prompts(rollout) == tokens and cut == 0
    assert rollout.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.columns == [pairs.examples[row].columns for row in rows for _ in range(2)]


@torch.no_grad()
def drawn(trainer: Trainer, prompt: list[int], numbers: np.ndarray) -> list[int]:
    """One response by full passes in float64."""
    tokens = []
    for u in numbers.tolist():
        logits = trainer.model.policy(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double() / T
        edges = logits.softmax(-1).cumsum(-1).tolist()
        assert min(abs(edge - u) for edge in edges[:-1]) > 1e-6  # else rounding may decide: take another seed
        tokens.append(min(bisect.bisect_left(edges, u), len(edges) - 1))
        if tokens[-1] in trainer.end_tokens:
            break
    return tokens


@pytest.mark.parametrize("iteration", [1, 2])
def test_each_sample_of_a_prompt_is_drawn_by_numbers_of_its_own(pairs, iteration):
    rollout, _ = pairs.sample(iteration)
    places = [(place, number) for place in range(4) for number in (0, 1)]
    numbers = uniforms(3, Stream.rollout, iteration, places, 12)
    found = responses(rollout)
    assert found == [drawn(pairs, prompt, row) for prompt, row in zip(prompts(rollout), numbers, strict=True)]
    assert all(found[2 * i] != found[2 * i + 1] for i in range(4))


asked: list[tuple[int, float]] = []
"""What `Planned` was asked."""


@dataclass(frozen=True)
class Planned(APA):
    """Writes down what it is asked, and plans a prefix for every response of iteration 2."""

    def plan(self, step, rng):
        asked.append((step, rng.random()))
        return RolloutPlan("policy", "policy", 1.0 if step == 2 else 0.0)


def test_the_algorithms_plan_is_followed_and_given_random_numbers_of_its_own(pairs):
    asked.clear()
    planned = replace(pairs, config=replace(pairs.config, algo=Planned(**vars(pairs.config.algo))))
    plain, changed = (planned.sample(iteration)[0] for iteration in (1, 2))
    assert asked == [(step, generator(3, Stream.plan, step).random()) for step in (1, 2)]
    assert not plain.prefix_mask.any() and changed.prefix_mask.any()


# What is computed of it


@torch.no_grad()
def plain_logprobs(model: torch.nn.Module, rollout: Rollout, temperature: float = T) -> torch.Tensor:
    """log π of every response token, one response at a time, 0 outside the mask."""
    rows = []
    for prompt, response in zip(prompts(rollout), responses(rollout), strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
        table = logits.log_softmax(-1)
        rows.append([float(table[len(prompt) - 1 + t, token]) for t, token in enumerate(response)])
    return right_padded(rows, 0.0, rollout.mask.shape[1], torch.float32)


@torch.no_grad()
def plain_values(trainer: Trainer, rollout: Rollout) -> torch.Tensor:
    """V at the position before every response token; a temperature has no part in it."""
    critic, rows = trainer.model.critics["value"], []
    for prompt, response in zip(prompts(rollout), responses(rollout), strict=True):
        hidden = critic.backbone(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        values = hidden @ critic.head.weight[0] + critic.head.bias[0]
        rows.append(values[len(prompt) - 1 : len(prompt) - 1 + len(response)].tolist())
    return right_padded(rows, 0.0, rollout.mask.shape[1], torch.float32)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # log-probs near −6: a few roundings of 5e-7


def test_every_model_gives_what_is_asked_of_it_at_the_temperature(make_trainer):
    trainer = make_trainer("algo=ppo", HOT, "reference.refresh_every=2", "microbatch_size=2", "minibatch_size=8")
    policy, moving = trainer.model.policy, trainer.moving_reference
    drawn_by = trainer.sample(1)[0]
    for number, module in enumerate((policy, moving, trainer.model.critics)):
        shifted(module, number)
    rollout = trainer.completed(drawn_by)
    expected = {
        "old_logprobs": plain_logprobs(policy, rollout),
        "ref_logprobs": plain_logprobs(moving, rollout),
        "init_logprobs": plain_logprobs(trainer.reference, rollout),
    }
    for name, table in expected.items():
        close(getattr(rollout, name), table)
    close(rollout.values["value"], plain_values(trainer, rollout))
    # The four models differ on these tokens, and the sampler was what π_init still is.
    for one, other in itertools.combinations(expected.values(), 2):
        assert float((one - other).abs().max()) > 0.05
    assert float(rollout.values["value"].abs().max()) > 0.05
    close(rollout.sampler_logprobs, expected["init_logprobs"])
    assert torch.equal(rollout.sampler_logprobs, drawn_by.sampler_logprobs)


def test_without_a_moving_reference_the_loss_takes_the_first_one(make_trainer):
    trainer = make_trainer("algo=apa", HOT)
    rollout = trainer.sample(1)[0]
    shifted(trainer.model.policy, 0)
    rollout = trainer.completed(rollout)
    assert trainer.moving_reference is None
    assert rollout.ref_logprobs is rollout.init_logprobs and rollout.old_logprobs is None
    close(rollout.ref_logprobs, plain_logprobs(trainer.reference, rollout))


# The moving reference


def test_the_reference_moves_to_the_policy_every_second_iteration_and_at_no_other_time(make_trainer):
    trainer = make_trainer("algo=apa", "reference.refresh_every=2", "optimizer.lr=1e-2")
    fixed, current = tensors(trainer.reference), tensors(trainer.moving_reference)
    assert same(trainer.model.policy, current)
    for iteration in (1, 2, 3, 4, 5):
        metrics = trainer.iterate(iteration)
        assert not same(trainer.model.policy, current)  # the policy has moved on
        if iteration in (2, 4):
            current = tensors(trainer.model.policy)
        assert same(trainer.moving_reference, current) and same(trainer.reference, fixed)
        first, moved = metrics["kl/sequence"], metrics["kl/refreshed"]
        if iteration in (1, 2):  # the moving reference is still where it was
            assert moved == pytest.approx(first, rel=1e-6, abs=1e-6)
        if iteration in (3, 5):  # it has just become the policy that samples here
            assert abs(moved) < 1e-4 < 1e-2 < abs(first)
        if iteration == 4:
            assert abs(moved) > 1e-3 and abs(moved - first) > 1e-3


def test_the_loss_takes_the_moving_reference(make_trainer):
    trainer = make_trainer(
        "algo=apa", "reference.refresh_every=2", "optimizer.lr=1e-30", "update_epochs=1", "minibatch_size=8"
    )
    drawn_by = trainer.sample(1)[0]
    shifted(trainer.moving_reference, 0)
    moved = plain_logprobs(trainer.moving_reference, drawn_by, 1.0)
    found = trainer.iterate(1)["apa/log_z_lower"]
    scores = torch.tensor(trainer.score(drawn_by.prompts, drawn_by.responses, drawn_by.columns).values)
    # The critic says 0: an advantage is 0.95 per token that follows, times the score in its deviations.
    left = drawn_by.mask.sum(-1, keepdim=True) - 1 - torch.arange(drawn_by.mask.shape[1])
    advantages = (scores / scores.std(correction=0)).unsqueeze(-1) * 0.95**left
    residual = advantages / 0.1 - (drawn_by.sampler_logprobs - moved)
    assert found == pytest.approx(float(residual[drawn_by.mask].mean()), rel=1e-4)


# policy/sampler_gap


def test_the_gap_is_a_mean_over_true_tokens():
    ids = torch.tensor([[1], [1]])
    table = torch.tensor([[-1.0, -2.0, 5.0], [-3.0, 5.0, 5.0]])
    true = torch.tensor([[True, True, False], [True, False, False]])
    rollout = Rollout(
        ids, ids > 0, table.long(), true, ~true, table, ["", ""], ["", ""], ["eos", "eos"], torch.arange(2), [{}, {}]
    )
    assert sampler_gap(rollout) == {}
    old = torch.tensor([[-1.5, -1.75, 0.0], [-3.0, 0.0, 0.0]])
    # ½ + ¼ + 0 of three tokens
    assert sampler_gap(rollout.with_(old_logprobs=old)) == {"policy/sampler_gap": 0.25}


def test_ppos_gap_is_of_the_whole_rollout_before_the_first_update(make_trainer, monkeypatch):
    trainer = make_trainer("algo=ppo", HOT, "minibatch_size=2", "microbatch_size=2", "optimizer.lr=1e-2")
    rollout, cut = trainer.sample(1)
    # Row i is off by (i + 1)/8 on its first token: 36/8 in all.
    off = rollout.sampler_logprobs.clone()
    off[:, 0] += torch.tensor([(-1) ** i * (i + 1) / 8 for i in range(8)])
    monkeypatch.setattr(trainer, "sample", lambda iteration: (rollout.with_(sampler_logprobs=off), cut))
    found = trainer.iterate(1)
    assert found["policy/sampler_gap"] == pytest.approx(4.5 / int(rollout.mask.sum()), rel=1e-4)
    assert found["policy/ratio_max"] > 1.01  # the policy has moved since
