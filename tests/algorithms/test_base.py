"""What APA, AWR and PPO have in common: scores → token rewards → advantages → batch, by hand."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from apa_cli.algorithms.apa import APA, Normalizer
from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.base import Algorithm, Estimator, ScoreScaling, Whitening
from apa_cli.algorithms.ppo import PPO, Controller
from apa_cli.types import Batch, Loss, Needs, PolicyOutput, Rollout, RolloutPlan

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)

COMMON = {
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "score_scaling": ScoreScaling.none,
    "score_clip": None,
    "whitening": Whitening.none,
    "advantage_estimator": Estimator.gae,
    "value_coef": 1.0,
    "value_clip_range": None,
}
EXTRA = {
    APA: {"lambda_": 0.5, "normalizer": Normalizer.none},
    AWR: {"lambda_": 0.5, "weight_clip": 20.0},
    PPO: {
        "kl_coef": 0.1,
        "clip_range": 0.2,
        "kl_controller": Controller.fixed,
        "kl_target": 6.0,
        "kl_horizon": 10_000,
    },
}


def make(kind: type, **fields):
    return kind(**{**COMMON, **EXTRA[kind], **fields})


# AWR adds nothing to what is common before its loss, so it stands for all three
shared = partial(make, AWR)


def rollout(scores: list[float], lengths: list[int], values: list[list[float]], **changes) -> Rollout:
    """Responses of `lengths` tokens whose scores and values are given; the other numbers do not matter."""
    n, width = len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rows = [row + [0.0] * (width - len(row)) for row in values]
    given = Rollout(
        prompt_ids=torch.arange(2 * n).reshape(n, 2),
        prompt_mask=torch.ones(n, 2, dtype=torch.bool),
        response_ids=torch.arange(n * width).reshape(n, width),
        mask=mask,
        prefix_mask=torch.zeros_like(mask),
        sampler_logprobs=torch.zeros(n, width),
        prompts=[""] * n,
        responses=[""] * n,
        endings=["eos"] * n,
        groups=torch.arange(n),
        columns=[{} for _ in range(n)],
        scores=torch.tensor(scores),
        ref_logprobs=torch.zeros(n, width),
        init_logprobs=torch.zeros(n, width),
        old_logprobs=torch.zeros(n, width),
        values={"value": torch.tensor(rows)},
    )
    return given.with_(**changes)


def one_token(*scores: float) -> Rollout:
    """Responses of one token each and values 0: every advantage is the scaled score."""
    return rollout(list(scores), [1] * len(scores), [[0.0]] * len(scores))


def test_the_score_is_on_the_last_true_token_only():
    algorithm, given = shared(), rollout([3.0, -1.0], [2, 3], [[0.0] * 2, [0.0] * 3])
    rewards = algorithm.token_rewards(given, given.scores, algorithm.initial_state())
    close(rewards, torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, -1.0]]))


def test_advantages_and_returns_by_hand():
    # γ = 1, gae_lambda = 0.5. Row 1, score 4, V = 1, 2: δ = 2 − 1 = 1, 4 − 2 = 2; A = 2, 2 (1 + 0.5·2);
    # G = 3, 4. Row 2, score −1, V = 0.5: A = −1.5, G = −1
    algorithm = shared(gae_lambda=0.5)
    batch, _ = algorithm.prepare(rollout([4.0, -1.0], [2, 1], [[1.0, 2.0], [0.5]]), algorithm.initial_state())
    close(batch.advantages, torch.tensor([[2.0, 2.0], [-1.5, 0.0]]))
    close(batch.returns["value"], torch.tensor([[3.0, 4.0], [-1.0, 0.0]]))
    close(batch.values["value"], torch.tensor([[1.0, 2.0], [0.5, 0.0]]))


def test_gamma_is_the_algorithms():
    # γ = 0.5, gae_lambda = 1: A_1 = 0 + 0.5·2 − 1 + 0.5·(4 − 2) = 1
    algorithm = shared(gamma=0.5)
    batch, _ = algorithm.prepare(rollout([4.0], [2], [[1.0, 2.0]]), algorithm.initial_state())
    close(batch.advantages, torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize("ending", ["eos", "stop", "length"])
def test_the_value_after_the_end_is_0_however_a_response_ends(ending):
    # the last advantage is score − V_T = 4 − 2, the one before with gae_lambda 0: V_T − V_{T−1} = 2 − 1.
    # A full row and one with room behind it, where the critic's junk stands
    algorithm = shared(gae_lambda=0.0)
    given = rollout([4.0, 4.0], [2, 1], [[1.0, 2.0], [2.0, 9.0]], endings=[ending, ending])
    batch, _ = algorithm.prepare(given, algorithm.initial_state())
    close(batch.advantages, torch.tensor([[1.0, 2.0], [2.0, 0.0]]))


@pytest.mark.parametrize(
    ("scaling", "first", "second", "scales"),
    [
        # scores 2, 6 (mean 4, deviation 2), then 10, 14 (deviation 2 again);
        # all four: mean 8, squares 36 + 4 + 4 + 36 = 80, deviation √(80/4) = √20. Never centred
        (ScoreScaling.none, [2.0, 6.0], [10.0, 14.0], [1.0, 1.0]),
        (ScoreScaling.batch, [1.0, 3.0], [5.0, 7.0], [2.0, 2.0]),
        (ScoreScaling.running, [1.0, 3.0], [10 / 20**0.5, 14 / 20**0.5], [2.0, 20**0.5]),
    ],
)
def test_score_scaling_over_two_iterations_by_hand(scaling, first, second, scales):
    algorithm = shared(score_scaling=scaling)
    one, state = algorithm.prepare(one_token(2.0, 6.0), algorithm.initial_state())
    two, _ = algorithm.prepare(one_token(10.0, 14.0), state)
    close(one.advantages, torch.tensor(first).unsqueeze(1))
    close(two.advantages, torch.tensor(second).unsqueeze(1))
    assert [batch.metrics["score/scale"] for batch in (one, two)] == pytest.approx(scales, rel=1e-12)


@pytest.mark.parametrize("scaling", list(ScoreScaling))
def test_the_state_holds_the_moments_of_all_raw_scores_and_the_old_state_is_left_alone(scaling):
    algorithm = shared(score_scaling=scaling, score_clip=0.5)
    before = {**algorithm.initial_state(), "another": 7}
    _, after = algorithm.prepare(one_token(2.0, 6.0), before)
    _, last = algorithm.prepare(one_token(10.0, 14.0), after)
    assert before == {"score_moments": (0.0, 0.0, 0.0), "another": 7}
    assert after == {"score_moments": (2, 4, 8), "another": 7}
    assert last == {"score_moments": (4, 8, 80), "another": 7}


def test_score_clip_is_in_units_of_the_scaled_score_and_on_both_sides():
    # deviation of −10, −2, 0, 12: mean 0, (100 + 4 + 0 + 144)/4 = 62; over √62 = 7.87: −1.27, −0.25, 0, 1.52
    algorithm = shared(score_scaling=ScoreScaling.batch, score_clip=1.0)
    batch, _ = algorithm.prepare(one_token(-10.0, -2.0, 0.0, 12.0), algorithm.initial_state())
    close(batch.advantages, torch.tensor([[-1.0], [-2 / 62**0.5], [0.0], [1.0]]))


@pytest.mark.parametrize("scaling", [ScoreScaling.batch, ScoreScaling.running])
def test_scores_without_deviation_are_divided_by_1e_8(scaling):
    algorithm = shared(score_scaling=scaling, score_clip=3.0)
    batch, _ = algorithm.prepare(one_token(2e-8, 2e-8), algorithm.initial_state())
    assert batch.metrics["score/scale"] == 1e-8
    close(batch.advantages, torch.tensor([[2.0], [2.0]]))


@pytest.mark.parametrize("scaling", [ScoreScaling.batch, ScoreScaling.running])
def test_the_deviation_of_scores_is_computed_in_float64(scaling):
    # 2²⁴ and twice 2²⁴ + 2, float32 neighbours: squares (4/3)² + 2·(2/3)² = 8/3, over 3
    algorithm = shared(score_scaling=scaling)
    batch, _ = algorithm.prepare(one_token(2.0**24, 2.0**24 + 2, 2.0**24 + 2), algorithm.initial_state())
    assert batch.metrics["score/scale"] == pytest.approx((8 / 9) ** 0.5, rel=1e-9)


def test_whitening_over_the_rollout_by_hand():
    # advantages 1, 3 on the two tokens of row 1 (V = 3, 1, score 4) and −1, 5 on one-token rows:
    # mean 2, deviations −1, 1, −3, 3, variance 20/4 = 5
    algorithm = shared(whitening=Whitening.rollout)
    batch, _ = algorithm.prepare(
        rollout([4.0, -1.0, 5.0], [2, 1, 1], [[3.0, 1.0], [0.0], [0.0]]), algorithm.initial_state()
    )
    close(batch.advantages, torch.tensor([[-1.0, 1.0], [-3.0, 0.0], [3.0, 0.0]]) / 5**0.5)
    close(batch.returns["value"], torch.tensor([[4.0, 4.0], [-1.0, 0.0], [5.0, 0.0]]))  # never whitened
    assert algorithm.prepare_minibatch(batch) is batch


def test_whitening_over_minibatches_by_hand():
    # scores 1, 3 are one minibatch (mean 2, deviation 1), 10, 30 the other (mean 20, deviation 10)
    algorithm = shared(whitening=Whitening.minibatch)
    batch, _ = algorithm.prepare(one_token(1.0, 10.0, 3.0, 30.0), algorithm.initial_state())
    close(batch.advantages, torch.tensor([[1.0], [10.0], [3.0], [30.0]]))
    for rows in ([0, 2], [1, 3]):
        minibatch = algorithm.prepare_minibatch(batch.rows(torch.tensor(rows)))
        close(minibatch.advantages, torch.tensor([[-1.0], [1.0]]))


def test_without_whitening_advantages_keep_their_unit():
    algorithm = shared(whitening=Whitening.none)
    batch, _ = algorithm.prepare(one_token(1.0, 30.0), algorithm.initial_state())
    close(batch.advantages, torch.tensor([[1.0], [30.0]]))
    assert algorithm.prepare_minibatch(batch) is batch


def test_monte_carlo_is_return_minus_value_whatever_gae_lambda_is():
    given = rollout([4.0], [2], [[1.0, 2.0]])
    algorithm = shared(advantage_estimator=Estimator.monte_carlo, gae_lambda=0.3)
    batch, _ = algorithm.prepare(given, algorithm.initial_state())
    close(batch.advantages, torch.tensor([[3.0, 2.0]]))
    close(batch.returns["value"], torch.tensor([[4.0, 4.0]]))


def test_group_mean_has_no_critic():
    # scores 1, 4 to prompt 0, 10, 2 to prompt 1: 1 − 4, 4 − 1, 10 − 2, 2 − 10
    algorithm = shared(advantage_estimator=Estimator.group_mean)
    given = rollout([1.0, 10.0, 4.0, 2.0], [2, 1, 1, 2], [[0.0]] * 4)
    given = given.with_(groups=torch.tensor([0, 1, 0, 1]), values={})
    batch, _ = algorithm.prepare(given, algorithm.initial_state())
    close(batch.advantages, torch.tensor([[-3.0, -3.0], [8.0, 0.0], [3.0, 0.0], [-8.0, -8.0]]))
    assert batch.returns == {}
    loss = algorithm.loss(batch, PolicyOutput(torch.zeros(4, 2), {}))
    assert [term.name for term in loss.terms] == ["policy"]
    assert algorithm.needs().critics == ()
    assert algorithm.needs().samples_per_prompt == 2


@pytest.mark.parametrize("estimator", [Estimator.gae, Estimator.monte_carlo])
def test_the_other_estimators_need_one_critic_and_one_sample_per_prompt(estimator):
    needs = shared(advantage_estimator=estimator).needs()
    assert needs.critics == ("value",)
    assert needs.samples_per_prompt == 1


def test_explained_variance_by_hand():
    # G = 2, 6 with variance 4; G − V = 1, 4 with variance 9/4: 1 − (9/4)/4 = 7/16
    algorithm = shared()
    batch, _ = algorithm.prepare(rollout([2.0, 6.0], [1, 1], [[1.0], [2.0]]), algorithm.initial_state())
    assert batch.metrics["value/explained_variance"] == pytest.approx(7 / 16, rel=1e-6)


def test_explained_variance_counts_true_tokens_and_forgives_a_constant():
    # tokens: G = 2, 6, 6 and G − V = 1, 1, 1: all variance is explained; without the constant too
    algorithm = shared()
    batch, _ = algorithm.prepare(rollout([2.0, 6.0], [1, 2], [[1.0, 99.0], [5.0, 5.0]]), algorithm.initial_state())
    assert batch.metrics["value/explained_variance"] == 1


@pytest.mark.parametrize(
    ("score", "values", "expected"),
    [
        (3.0, [[3.0], [3.0]], 1.0),  # no error: 1 − 0/1e-12
        (0.0, [[0.0], [2e-6]], 0.0),  # errors 0 and −2e-6, variance 1e-12: 1 − 1e-12/1e-12
    ],
)
def test_returns_without_variance_have_it_floored_at_1e_12(score, values, expected):
    algorithm = shared()
    batch, _ = algorithm.prepare(rollout([score, score], [1, 1], values), algorithm.initial_state())
    assert batch.metrics["value/explained_variance"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", [APA, AWR, PPO])
@pytest.mark.parametrize(("value_clip_range", "expected"), [(None, 0.125), (0.2, 0.32)])
def test_the_critics_term_by_hand(kind, value_clip_range, expected):
    # V_old = 1, G = 2, V = 1.5: ½·0.5²; held within ±0.2 of V_old: ½·0.8²
    algorithm = make(kind, value_coef=0.3, value_clip_range=value_clip_range)
    batch, _ = algorithm.prepare(rollout([2.0], [1], [[1.0]]), algorithm.initial_state())
    loss = algorithm.loss(batch, PolicyOutput(torch.zeros(1, 1), {"value": torch.tensor([[1.5]])}))
    policy, critic = loss.terms
    assert (policy.name, policy.mask, policy.weight) == ("policy", "tokens", 1)
    assert (critic.name, critic.mask, critic.weight) == ("value", "tokens", 0.3)
    close(critic.values, torch.tensor([[expected]]))


def random_case(kind: type) -> tuple[Algorithm, Batch, PolicyOutput]:
    """Five responses of 1 to 5 tokens, prepared, and what a policy that has moved gives for them."""
    torch.manual_seed(0)
    lengths = [3, 1, 5, 2, 4]
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    names = ("sampler_logprobs", "ref_logprobs", "init_logprobs", "old_logprobs")
    tables = {name: -torch.rand(5, 5) * mask for name in names}
    values = {"value": torch.randn(5, 5) * mask}
    given = rollout(torch.randn(5).tolist(), lengths, [[0.0]] * 5).with_(**tables, values=values)
    algorithm = make(kind, whitening=Whitening.rollout, gae_lambda=0.95, value_clip_range=0.2)
    batch, _ = algorithm.prepare(given, algorithm.initial_state())
    return algorithm, batch, PolicyOutput(-torch.rand(5, 5) * mask, {"value": torch.randn(5, 5) * mask})


def reduced(loss: Loss, batch: Batch, counts: dict[str, int]) -> dict[str, float]:
    """Each term and metric summed over its mask and divided by the count given for it."""
    parts = {term.name: (term.values, term.mask) for term in loss.terms}
    parts |= {name: (metric.values, metric.mask) for name, metric in loss.metrics.items()}
    return {name: float(x[batch.masks[mask]].sum() / counts[mask]) for name, (x, mask) in parts.items()}


@pytest.mark.parametrize("kind", [APA, AWR, PPO])
def test_the_loss_is_the_sum_over_microbatches_each_over_the_count_of_the_whole(kind):
    algorithm, batch, output = random_case(kind)
    counts = {name: int(mask.sum()) for name, mask in batch.masks.items()}
    assert counts == {"tokens": 15}
    whole = reduced(algorithm.loss(batch, output), batch, counts)
    assert len(whole) >= 2
    total = dict.fromkeys(whole, 0.0)
    for rows in (torch.tensor([4]), torch.tensor([2, 0]), torch.tensor([1, 3])):
        part = batch.rows(rows)
        values = {name: value[rows] for name, value in output.values.items()}
        loss = algorithm.loss(part, PolicyOutput(output.logprobs[rows], values))
        for name, value in reduced(loss, part, counts).items():
            total[name] += value
    assert total == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", [APA, AWR, PPO])
@pytest.mark.parametrize("junk", [1e30, math.inf, math.nan])
def test_what_lies_outside_the_mask_changes_no_advantage_return_or_metric(kind, junk):
    torch.manual_seed(0)
    lengths = [3, 1, 2]
    mask = torch.arange(3) < torch.tensor(lengths).unsqueeze(1)
    tables = {name: -torch.rand(3, 3) * mask for name in ("sampler_logprobs", "ref_logprobs", "init_logprobs")}
    clean = rollout([1.0, 5.0, 2.0], lengths, [[0.0]] * 3).with_(**tables, values={"value": torch.randn(3, 3) * mask})
    dirty = clean.with_(
        **{name: table.masked_fill(~mask, junk) for name, table in tables.items()},
        values={"value": clean.values["value"].masked_fill(~mask, -junk)},
    )
    algorithm = make(kind, whitening=Whitening.rollout, score_scaling=ScoreScaling.running)
    (expected, state), (spoilt, spoilt_state) = (
        algorithm.prepare(given, algorithm.initial_state()) for given in (clean, dirty)
    )
    torch.testing.assert_close(spoilt.advantages, expected.advantages, rtol=0, atol=0)
    torch.testing.assert_close(spoilt.returns["value"], expected.returns["value"], rtol=0, atol=0)
    assert spoilt.metrics == expected.metrics
    assert spoilt_state == state


def test_rows_of_a_batch_keep_their_order_and_drop_the_metrics():
    batch, _ = shared().prepare(one_token(1.0, 2.0, 3.0, 4.0), shared().initial_state())
    batch = batch.with_(old_logprobs=None, log_normalizer=torch.tensor([[0.1], [0.2], [0.3], [0.4]]))
    assert batch.metrics
    part = batch.rows(torch.tensor([2, 0]))
    assert len(part) == 2
    assert part.response_ids.tolist() == [[2], [0]]
    assert part.prompt_ids.tolist() == [[4, 5], [0, 1]]
    close(part.advantages, torch.tensor([[3.0], [1.0]]))
    close(part.returns["value"], torch.tensor([[3.0], [1.0]]))
    close(part.log_normalizer, torch.tensor([[0.3], [0.1]]))
    assert part.masks["tokens"].tolist() == [[True], [True]]
    assert part.old_logprobs is None
    assert part.metrics == {}


def test_an_algorithm_needs_only_prepare_and_loss():
    @dataclass(frozen=True)
    class Smallest(Algorithm):
        def prepare(self, rollout, state):
            return rollout, state

        def loss(self, batch, output):
            return Loss([])

    algorithm = Smallest()
    assert algorithm.needs() == Needs(
        reference=True, critics=("value",), old_logprobs=False, guide=False, samples_per_prompt=1
    )
    assert algorithm.initial_state() == {}
    assert algorithm.plan(1, None) == RolloutPlan("policy", "policy", 0.0)
    batch = object()
    assert algorithm.prepare_minibatch(batch) is batch
