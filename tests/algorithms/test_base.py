"""The shared base of APA, AWR and PPO: scores → token rewards → advantages → batch, computed by hand."""

import json
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from apa_cli.algorithms.a2po import A2PO
from apa_cli.algorithms.apa import APA
from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.base import AdvantageEstimator, Algorithm, ScoreScaling, Whitening
from apa_cli.algorithms.dpo import DPO
from apa_cli.algorithms.grpo import GRPO
from apa_cli.algorithms.ppo import PPO
from apa_cli.algorithms.rebel import REBEL
from apa_cli.algorithms.reinforce_pp import ReinforcePP
from apa_cli.algorithms.rloo import RLOO
from apa_cli.types import Batch, Critic, Loss, PolicyOutput, Prefix, Rollout, RolloutPlan
from tests.builders import make_algorithm, make_mask, make_rollout, make_sequences

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)

LOGPROBS = ("sampler", "reference", "init", "old")

# AWR overrides nothing before its loss, so it represents all three
make_awr = partial(make_algorithm, AWR)


def make_responses(scores: list[float], lengths: list[int], values: list[list[float]], **fields) -> Rollout:
    """Return responses of `lengths` tokens with these scores and values; the other fields are arbitrary."""
    n, width = len(lengths), max(lengths)
    defaults = {
        "prompt_ids": torch.arange(2 * n).reshape(n, 2),
        "prompt_mask": torch.ones(n, 2, dtype=torch.bool),
        "response_ids": torch.arange(n * width).reshape(n, width),
        "scores": torch.tensor(scores),
        "logprobs": {name: torch.zeros(n, width) for name in LOGPROBS},
        "values": {"value": torch.tensor([row + [0.0] * (width - len(row)) for row in values])},
    }
    return make_rollout(make_mask(lengths), **{**defaults, **fields})


def make_one_token_responses(*scores: float) -> Rollout:
    """Return responses of one token each with values 0, so that every advantage is the scaled score."""
    return make_responses(list(scores), [1] * len(scores), [[0.0]] * len(scores))


def test_the_score_is_on_the_last_true_token_only():
    algorithm, two_responses = make_awr(), make_responses([3.0, -1.0], [2, 3], [[0.0] * 2, [0.0] * 3])
    rewards = algorithm.token_rewards(two_responses, two_responses.scores, algorithm.initial_state())
    assert_close(rewards, torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, -1.0]]))


def test_advantages_and_returns_by_hand():
    # γ = 1, gae_lambda = 0.5. Row 1, score 4, V = 1, 2: δ = 2 − 1 = 1, 4 − 2 = 2; A = 2, 2 (1 + 0.5·2);
    # G = 3, 4. Row 2, score −1, V = 0.5: A = −1.5, G = −1
    algorithm = make_awr(gae_lambda=0.5)
    batch, _ = algorithm.prepare(make_responses([4.0, -1.0], [2, 1], [[1.0, 2.0], [0.5]]), algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[2.0, 2.0], [-1.5, 0.0]]))
    assert_close(batch.returns["value"], torch.tensor([[3.0, 4.0], [-1.0, 0.0]]))
    assert_close(batch.values["value"], torch.tensor([[1.0, 2.0], [0.5, 0.0]]))


def test_gamma_discounts_later_rewards():
    # γ = 0.5, gae_lambda = 1: A_1 = 0 + 0.5·2 − 1 + 0.5·(4 − 2) = 1
    algorithm = make_awr(gamma=0.5)
    batch, _ = algorithm.prepare(make_responses([4.0], [2], [[1.0, 2.0]]), algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize("ending", ["eos", "stop", "length"])
def test_the_value_after_the_end_is_0_for_every_ending(ending):
    # the last advantage is score − V_T = 4 − 2, the one before with gae_lambda 0: V_T − V_{T−1} = 2 − 1.
    # One row is full, the other is followed by padding with an arbitrary value
    algorithm = make_awr(gae_lambda=0.0)
    responses = make_responses([4.0, 4.0], [2, 1], [[1.0, 2.0], [2.0, 9.0]], endings=[ending, ending])
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[1.0, 2.0], [2.0, 0.0]]))


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
    algorithm = make_awr(score_scaling=scaling)
    one, state = algorithm.prepare(make_one_token_responses(2.0, 6.0), algorithm.initial_state())
    two, _ = algorithm.prepare(make_one_token_responses(10.0, 14.0), state)
    assert_close(one.advantages, torch.tensor(first).unsqueeze(1))
    assert_close(two.advantages, torch.tensor(second).unsqueeze(1))
    assert [batch.metrics["score/scale"] for batch in (one, two)] == pytest.approx(scales, rel=1e-12)


@pytest.mark.parametrize("scaling", list(ScoreScaling))
def test_the_state_holds_the_moments_of_all_raw_scores_and_the_old_state_is_not_modified(scaling):
    algorithm = make_awr(score_scaling=scaling, score_clip=0.5)
    before = {**algorithm.initial_state(), "another": 7}
    _, after = algorithm.prepare(make_one_token_responses(2.0, 6.0), before)
    _, last = algorithm.prepare(make_one_token_responses(10.0, 14.0), after)
    assert before == {"score_moments": (0.0, 0.0, 0.0), "another": 7}
    assert after == {"score_moments": (2, 4, 8), "another": 7}
    assert last == {"score_moments": (4, 8, 80), "another": 7}


def test_score_clip_is_symmetric_and_in_units_of_the_scaled_score():
    # deviation of −10, −2, 0, 12: mean 0, (100 + 4 + 0 + 144)/4 = 62; over √62 = 7.87: −1.27, −0.25, 0, 1.52
    algorithm = make_awr(score_scaling=ScoreScaling.batch, score_clip=1.0)
    batch, _ = algorithm.prepare(make_one_token_responses(-10.0, -2.0, 0.0, 12.0), algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[-1.0], [-2 / 62**0.5], [0.0], [1.0]]))


@pytest.mark.parametrize("scaling", [ScoreScaling.batch, ScoreScaling.running])
@pytest.mark.parametrize("scores", [[0.0] * 3, [-1.0] * 3, [0.1] * 3, [2.5, 2.5 + 1e-6, 2.5], [1e6, 1e6 + 1, 1e6]])
def test_scores_that_do_not_differ_beyond_rounding_are_divided_by_1(scaling, scores):
    algorithm = make_awr(score_scaling=scaling, score_clip=None)
    batch, _ = algorithm.prepare(make_one_token_responses(*scores), algorithm.initial_state())
    assert batch.metrics["score/scale"] == 1
    assert_close(batch.advantages, torch.tensor([[score] for score in scores]))


def test_running_scaling_divides_by_1_until_scores_differ_also_after_a_resume():
    algorithm = make_awr(score_scaling=ScoreScaling.running)
    one, state = algorithm.prepare(make_one_token_responses(0.1, 0.1, 0.1), algorithm.initial_state())
    state = json.loads(json.dumps(state))  # as a checkpoint stores it
    two, state = algorithm.prepare(make_one_token_responses(0.1, 0.1, 0.1), state)
    three, _ = algorithm.prepare(make_one_token_responses(1.1, 1.1), state)
    # six scores of 0.1, two of 1.1: share ¼, deviation 1 · √(¼ · ¾)
    scales = [batch.metrics["score/scale"] for batch in (one, two, three)]
    assert scales == pytest.approx([1, 1, (3 / 16) ** 0.5], rel=1e-6)


@pytest.mark.parametrize("scaling", [ScoreScaling.batch, ScoreScaling.running])
def test_the_standard_deviation_of_scores_is_computed_in_float64(scaling):
    # 2²⁴ and twice 2²⁴ + 200, whose mean float32 lacks: squares (400/3)² + 2·(200/3)² = 6 · (200/3)², over 3
    algorithm = make_awr(score_scaling=scaling)
    scores = (2.0**24, 2.0**24 + 200, 2.0**24 + 200)
    batch, _ = algorithm.prepare(make_one_token_responses(*scores), algorithm.initial_state())
    assert batch.metrics["score/scale"] == pytest.approx(2**0.5 * 200 / 3, rel=1e-9)


def test_whitening_over_the_rollout_by_hand():
    # advantages 1, 3 on the two tokens of row 1 (V = 3, 1, score 4) and −1, 5 on one-token rows:
    # mean 2, deviations −1, 1, −3, 3, variance 20/4 = 5
    algorithm = make_awr(whitening=Whitening.rollout)
    batch, _ = algorithm.prepare(
        make_responses([4.0, -1.0, 5.0], [2, 1, 1], [[3.0, 1.0], [0.0], [0.0]]), algorithm.initial_state()
    )
    assert_close(batch.advantages, torch.tensor([[-1.0, 1.0], [-3.0, 0.0], [3.0, 0.0]]) / 5**0.5)
    assert_close(batch.returns["value"], torch.tensor([[4.0, 4.0], [-1.0, 0.0], [5.0, 0.0]]))  # never whitened
    assert algorithm.prepare_minibatch(batch) is batch


def test_whitening_over_minibatches_by_hand():
    # scores 1, 3 are one minibatch (mean 2, deviation 1), 10, 30 the other (mean 20, deviation 10)
    algorithm = make_awr(whitening=Whitening.minibatch)
    batch, _ = algorithm.prepare(make_one_token_responses(1.0, 10.0, 3.0, 30.0), algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[1.0], [10.0], [3.0], [30.0]]))
    for rows in ([0, 2], [1, 3]):
        minibatch = algorithm.prepare_minibatch(batch.select_rows(torch.tensor(rows)))
        assert_close(minibatch.advantages, torch.tensor([[-1.0], [1.0]]))


def test_without_whitening_advantages_keep_their_unit():
    algorithm = make_awr(whitening=Whitening.none)
    batch, _ = algorithm.prepare(make_one_token_responses(1.0, 30.0), algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[1.0], [30.0]]))
    assert algorithm.prepare_minibatch(batch) is batch


def test_monte_carlo_is_return_minus_value_for_any_gae_lambda():
    responses = make_responses([4.0], [2], [[1.0, 2.0]])
    algorithm = make_awr(advantage_estimator=AdvantageEstimator.monte_carlo, gae_lambda=0.3)
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[3.0, 2.0]]))
    assert_close(batch.returns["value"], torch.tensor([[4.0, 4.0]]))


def test_group_mean_has_no_critic():
    # scores 1, 4 to prompt 0, 10, 2 to prompt 1: 1 − 4, 4 − 1, 10 − 2, 2 − 10
    algorithm = make_awr(advantage_estimator=AdvantageEstimator.group_mean)
    responses = make_responses([1.0, 10.0, 4.0, 2.0], [2, 1, 1, 2], [[0.0]] * 4)
    responses = responses.replace(groups=torch.tensor([0, 1, 0, 1]), values={})
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[-3.0, -3.0], [8.0, 0.0], [3.0, 0.0], [-8.0, -8.0]]))
    assert batch.returns == {}
    loss = algorithm.loss(batch, PolicyOutput(torch.zeros(4, 2), {}))
    assert [term.name for term in loss.terms] == ["policy"]
    assert algorithm.needs().critics == ()
    assert (algorithm.needs().samples_per_prompt, algorithm.needs().least_samples) == (2, 2)


@pytest.mark.parametrize("estimator", [AdvantageEstimator.gae, AdvantageEstimator.monte_carlo])
def test_the_other_estimators_need_one_critic_and_one_sample_per_prompt(estimator):
    needs = make_awr(advantage_estimator=estimator).needs()
    assert needs.critics == (Critic("value"),)
    assert (needs.samples_per_prompt, needs.least_samples) == (1, 1)


def test_explained_variance_by_hand():
    # G = 2, 6 with variance 4; G − V = 1, 4 with variance 9/4: 1 − (9/4)/4 = 7/16
    algorithm = make_awr()
    batch, _ = algorithm.prepare(make_responses([2.0, 6.0], [1, 1], [[1.0], [2.0]]), algorithm.initial_state())
    assert batch.metrics["value/explained_variance"] == pytest.approx(7 / 16, rel=1e-6)


def test_explained_variance_is_over_true_tokens_and_ignores_a_constant_error():
    # tokens: G = 2, 6, 6 and G − V = 1, 1, 1: all variance is explained; without the constant too
    algorithm = make_awr()
    batch, _ = algorithm.prepare(
        make_responses([2.0, 6.0], [1, 2], [[1.0, 99.0], [5.0, 5.0]]), algorithm.initial_state()
    )
    assert batch.metrics["value/explained_variance"] == 1


@pytest.mark.parametrize("score", [0.0, 3.0, 0.1])
def test_equal_returns_have_no_variance_to_explain(score):
    algorithm = make_awr()
    batch, _ = algorithm.prepare(make_responses([score, score], [1, 1], [[3.0], [2.0]]), algorithm.initial_state())
    assert "value/explained_variance" not in batch.metrics


def test_explained_variance_is_of_monte_carlo_returns_with_gamma():
    # γ = ½, V = 4, 1 and 0, 0, scores 2 and 8: R = 1, 2 and 4, 8: mean 15/4, variance 85/4 − (15/4)² = 115/16.
    # R − V = −3, 1, 4, 8: mean 5/2, variance 90/4 − 25/4 = 65/4 = 260/16: 1 − 260/115. The λ-return with gae_lambda 0
    # is r + γ V' = ½, 2, 0, 8, of which the rest would be −7/2, 1, 0, 8.
    algorithm = make_awr(gamma=0.5, gae_lambda=0.0)
    batch, _ = algorithm.prepare(
        make_responses([2.0, 8.0], [2, 2], [[4.0, 1.0], [0.0, 0.0]]), algorithm.initial_state()
    )
    assert batch.metrics["value/explained_variance"] == pytest.approx(1 - 260 / 115, rel=1e-6)


@pytest.mark.parametrize("length", [64, 128])
def test_a_critic_of_noise_explains_nothing(length):
    """Against λ-returns it would seem to explain 0.56 (64 tokens) and 0.81 (128 tokens)."""
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(64, generator=generator), 3 * torch.randn(64, length, generator=generator)
    algorithm = make_awr(gae_lambda=0.95)
    batch, _ = algorithm.prepare(
        make_responses(scores.tolist(), [length] * 64, values.tolist()), algorithm.initial_state()
    )
    # Var(R − V)/Var(R) = (1 + 9)/1 for noise that is independent of R
    assert batch.metrics["value/explained_variance"] == pytest.approx(-9, abs=3)


@pytest.mark.parametrize("kind", [APA, AWR, PPO])
@pytest.mark.parametrize(("value_clip_range", "expected"), [(None, 0.125), (0.2, 0.32)])
def test_the_critics_term_by_hand(kind, value_clip_range, expected):
    # V_old = 1, G = 2, V = 1.5: ½·0.5²; clipped to ±0.2 around V_old: ½·0.8²
    algorithm = make_algorithm(kind, value_coef=0.3, value_clip_range=value_clip_range)
    batch, _ = algorithm.prepare(make_responses([2.0], [1], [[1.0]]), algorithm.initial_state())
    loss = algorithm.loss(batch, PolicyOutput(torch.zeros(1, 1), {"value": torch.tensor([[1.5]])}))
    policy, critic = loss.terms
    assert (policy.name, policy.mask, policy.weight) == ("policy", "policy", 1)
    assert (critic.name, critic.mask, critic.weight) == ("value", "critic/value", 0.3)
    assert_close(critic.values, torch.tensor([[expected]]))


def make_random_case(kind: type) -> tuple[Algorithm, Batch, PolicyOutput]:
    """Return an algorithm, its prepared batch of five responses of 1 to 5 tokens, and the output of another policy."""
    torch.manual_seed(0)
    lengths = [3, 1, 5, 2, 4]
    mask = make_mask(lengths)
    tables = {name: -torch.rand(5, 5) * mask for name in LOGPROBS}
    values = {"value": torch.randn(5, 5) * mask}
    responses = make_responses(torch.randn(5).tolist(), lengths, [[0.0]] * 5).replace(logprobs=tables, values=values)
    algorithm = make_algorithm(kind, whitening=Whitening.rollout, gae_lambda=0.95, value_clip_range=0.2)
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    return algorithm, batch, PolicyOutput(-torch.rand(5, 5) * mask, {"value": torch.randn(5, 5) * mask})


def reduce_loss(loss: Loss, batch: Batch, counts: dict[str, int]) -> dict[str, float]:
    """Return each term and metric, summed over its mask and divided by the count for that mask."""
    parts = {term.name: (term.values, term.mask) for term in loss.terms}
    parts |= {name: (metric.values, metric.mask) for name, metric in loss.metrics.items()}
    return {name: float(x[batch.masks[mask]].sum() / counts[mask]) for name, (x, mask) in parts.items()}


@pytest.mark.parametrize("kind", [APA, AWR, PPO])
def test_the_loss_is_the_sum_over_microbatches_divided_by_the_whole_count(kind):
    algorithm, batch, output = make_random_case(kind)
    counts = {name: int(mask.sum()) for name, mask in batch.masks.items()}
    assert counts == {"policy": 15, "critic/value": 15}
    whole = reduce_loss(algorithm.loss(batch, output), batch, counts)
    assert len(whole) >= 2
    total = dict.fromkeys(whole, 0.0)
    for rows in (torch.tensor([4]), torch.tensor([2, 0]), torch.tensor([1, 3])):
        part = batch.select_rows(rows)
        values = {name: value[rows] for name, value in output.values.items()}
        loss = algorithm.loss(part, PolicyOutput(output.logprobs[rows], values))
        for name, value in reduce_loss(loss, part, counts).items():
            total[name] += value
    assert total == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", [APA, AWR, PPO])
@pytest.mark.parametrize("junk", [1e30, math.inf, math.nan])
def test_values_outside_the_mask_change_no_advantage_return_or_metric(kind, junk):
    torch.manual_seed(0)
    lengths = [3, 1, 2]
    mask = make_mask(lengths)
    tables = {name: -torch.rand(3, 3) * mask for name in LOGPROBS}
    clean = make_responses([1.0, 5.0, 2.0], lengths, [[0.0]] * 3).replace(
        logprobs=tables, values={"value": torch.randn(3, 3) * mask}
    )
    dirty = clean.replace(
        logprobs={name: table.masked_fill(~mask, junk) for name, table in tables.items()},
        values={"value": clean.values["value"].masked_fill(~mask, -junk)},
    )
    algorithm = make_algorithm(kind, whitening=Whitening.rollout, score_scaling=ScoreScaling.running)
    (expected, state), (actual, actual_state) = (
        algorithm.prepare(variant, algorithm.initial_state()) for variant in (clean, dirty)
    )
    torch.testing.assert_close(actual.advantages, expected.advantages, rtol=0, atol=0)
    torch.testing.assert_close(actual.returns["value"], expected.returns["value"], rtol=0, atol=0)
    assert actual.metrics == expected.metrics
    assert actual_state == state


def test_selected_rows_have_the_requested_order_and_no_metrics():
    batch, _ = make_awr().prepare(make_one_token_responses(1.0, 2.0, 3.0, 4.0), make_awr().initial_state())
    weights, related = torch.tensor([0.1, 0.2, 0.3, 0.4]), make_sequences([[1]] * 4, [[5], [6], [7], [8]])
    batch = batch.replace(extra={"weights": weights}, related={"chosen": related}, responses_per_row=2)
    assert batch.metrics
    part = batch.select_rows(torch.tensor([2, 0]))
    assert len(part) == 2
    assert part.response_ids.tolist() == [[2], [0]]
    assert part.prompt_ids.tolist() == [[4, 5], [0, 1]]
    assert_close(part.advantages, torch.tensor([[3.0], [1.0]]))
    assert_close(part.returns["value"], torch.tensor([[3.0], [1.0]]))
    assert_close(part.extra["weights"], torch.tensor([0.3, 0.1]))
    assert part.related["chosen"].response_ids.tolist() == [[7], [5]]
    assert part.responses_per_row == 2
    assert part.masks["policy"].tolist() == [[True], [True]]
    assert part.metrics == {}


@dataclass(frozen=True)
class Minimal(Algorithm):
    """An algorithm with the two required methods only."""

    def prepare(self, rollout, state):
        return rollout, state

    def loss(self, batch, output):
        return Loss([])


def test_an_algorithm_needs_only_prepare_and_loss():
    algorithm = Minimal()
    needs = algorithm.needs()
    assert (needs.samplers, needs.critics, needs.passes, needs.texts) == ((), (), {}, ())
    assert (needs.entropy, needs.mean_logprob) == (False, False)
    assert (needs.samples_per_prompt, needs.least_samples, needs.samples_multiple) == (1, 1, 1)
    assert algorithm.plans == ("online",)
    assert algorithm.initial_state() == {}
    thing, state = object(), object()
    assert algorithm.instruct(thing, 1) is thing
    assert algorithm.process_rollout(thing, state, None, None) == (thing, state)
    assert algorithm.prepare_minibatch(thing) is thing
    assert algorithm.adjust_logits(thing, {}) is thing


def test_default_label_is_the_class_name_and_a_default_algorithm_has_no_lambda():
    assert (Minimal.label, Minimal.lambda_meaning) == ("Minimal", None)

    class Variant(PPO):
        pass

    assert (Variant.label, Variant.color, Variant.lambda_meaning) == ("Variant", PPO.color, PPO.lambda_meaning)


def test_every_algorithm_has_its_own_label_and_a_colour_readable_on_white():
    kinds = [APA, AWR, PPO, RLOO, GRPO, ReinforcePP, DPO, REBEL, A2PO, Minimal]
    labels = ["APA", "AWR", "PPO", "RLOO", "GRPO", "REINFORCE++", "DPO", "REBEL", "A2PO", "Minimal"]
    assert [kind.label for kind in kinds] == labels
    assert len({kind.color for kind in kinds}) == len(kinds)
    for kind in kinds:
        channels = [int(kind.color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5  # contrast ratio for text, WCAG 2.1, level AA


def test_a_quantity_that_needs_did_not_ask_for_is_named():
    responses = make_one_token_responses(1.0, 2.0)
    responses = responses.replace(logprobs={"sampler": responses.logprobs["sampler"]})
    problem = r"^logprobs 'reference': not computed; the algorithm's needs\(\) must ask for it$"
    with pytest.raises(ValueError, match=problem):
        make_algorithm(APA).prepare(responses, make_algorithm(APA).initial_state())


def make_off_policy_responses() -> Rollout:
    """Return two responses of two tokens, scores 2 and 6, values 0; only their second tokens train the policy."""
    responses = make_responses([2.0, 6.0], [2, 2], [[0.0, 0.0], [0.0, 0.0]])
    return responses.replace(masks={"policy": torch.tensor([[False, True], [False, True]])})


def test_a_critic_without_a_mask_of_its_own_has_the_policys():
    batch, _ = make_awr().prepare(make_off_policy_responses(), make_awr().initial_state())
    assert batch.masks["critic/value"].tolist() == [[False, True], [False, True]]
    responses = make_off_policy_responses()
    responses = responses.replace(masks={**responses.masks, "critic/value": responses.mask})
    batch, _ = make_awr().prepare(responses, make_awr().initial_state())
    assert batch.masks["critic/value"].tolist() == [[True, True], [True, True]]
    assert batch.masks["policy"].tolist() == [[False, True], [False, True]]


def test_explained_variance_is_over_the_critics_tokens():
    # the critic's two tokens: G = 2, 6 with variance 4 and G − V = 2, 3 with variance ¼: 1 − ¼/4 = 15/16
    # (all four: G − V = 2, 2, 6, 3 with variance 43/16, which would make 21/64)
    responses = make_off_policy_responses().replace(values={"value": torch.tensor([[0.0, 0.0], [0.0, 3.0]])})
    batch, _ = make_awr().prepare(responses, make_awr().initial_state())
    assert batch.metrics["value/explained_variance"] == pytest.approx(15 / 16, rel=1e-6)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        # V = 0 but for 4 at the second token of row 2: γ = gae_lambda = 1, A = 2, 2, 6, 2. Over the policy's second
        # tokens all are 2; over all four: mean 3, deviations −1, −1, 3, −1, variance 12/4 = 3
        ({}, [[0.0, 0.0], [0.0, 0.0]]),
        ({"whitening": torch.ones(2, 2, dtype=torch.bool)}, [[-1 / 3**0.5, -1 / 3**0.5], [3**0.5, -1 / 3**0.5]]),
    ],
)
def test_advantages_are_whitened_over_the_policys_tokens_or_the_whitening_mask(masks, expected):
    responses = make_off_policy_responses().replace(values={"value": torch.tensor([[0.0, 0.0], [0.0, 4.0]])})
    responses = responses.replace(masks={**responses.masks, **masks})
    algorithm = make_awr(whitening=Whitening.rollout)
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor(expected))


def test_each_row_has_the_critic_of_its_plan():
    """Three responses of one token, the second under a plan with the critic "guide": A = score − that critic's value.

    3 − 1, 5 − 20 and 4 − 2; each critic's loss is over its rows, the third of which the plan's mask leaves out.
    """
    plans = (RolloutPlan(), RolloutPlan("policy", Prefix("uniform"), "guide", critic="guide"))
    mask = make_mask([1, 1, 1])
    rollout = make_responses(
        [3.0, 5.0, 4.0], [1, 1, 1], [[1.0], [10.0], [2.0]], plans=plans, plan_index=torch.tensor([0, 1, 0]),
        masks={"policy": mask, "critic/value": torch.tensor([[True], [True], [False]])},
    )  # fmt: skip
    rollout = rollout.replace(values={**rollout.values, "guide": torch.tensor([[100.0], [20.0], [200.0]])})
    algorithm = make_awr()
    batch, _ = algorithm.prepare(rollout, algorithm.initial_state())
    assert batch.advantages.tolist() == [[2.0], [-15.0], [2.0]]
    assert batch.returns["value"].tolist() == batch.returns["guide"].tolist() == [[3.0], [5.0], [4.0]]
    assert batch.masks["critic/value"].tolist() == [[True], [False], [False]]
    assert batch.masks["critic/guide"].tolist() == [[False], [True], [False]]
