"""RLOO: leave-one-out advantages and the clipped ratio of whole responses, computed by hand."""

import math
from functools import partial

import pytest
import torch

from apa_cli.algorithms.base import ScoreScaling
from apa_cli.algorithms.rloo import RLOO
from apa_cli.types import Batch, Needs, PolicyOutput, Rollout
from tests.builders import make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
NEUTRAL = {"score_scaling": ScoreScaling.none, "score_clip": None, "entropy_coef": 0.0}
make_rloo = partial(RLOO, **NEUTRAL, kl_coef=0.5, clip_range=0.2)

# k1 = 0.5 and −1; 2; 1 and 1; 0. Responses 1, 3 and 4 answer prompt 7, response 2 answers prompt 5, as does 5
SAMPLER = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-1.0, -1.0], [-1.0, 0.0], [-2.0, -2.0]])
REFERENCE = torch.tensor([[-1.5, -1.0], [-2.5, 0.0], [-2.0, -2.0], [-1.0, 0.0], [-2.0, -2.0]])
LENGTHS = [2, 1, 2, 1, 2]
GROUPS = torch.tensor([7, 5, 7, 7, 5])
SCORES = torch.tensor([3.0, 4.0, 1.0, 6.0, 2.0])
# Rewards at kl_coef 0.5: 3 + 0.25, 4 − 1, 1 − 1, 6, 2.
# Prompt 7: 3.25 − (0 + 6)/2, 0 − (3.25 + 6)/2, 6 − (3.25 + 0)/2; prompt 5: 3 − 2, 2 − 3
ADVANTAGES = torch.tensor([0.25, 1.0, -4.625, 4.375, -1.0])


def make_responses(junk: float = 0.0, **fields) -> Rollout:
    """Return five responses to two prompts; log-probs outside the mask are `junk`."""
    mask = make_mask(LENGTHS)
    tables = {"sampler": SAMPLER, "reference": REFERENCE, "old": SAMPLER, **fields.pop("logprobs", {})}
    logprobs = {name: table.masked_fill(~mask, junk) for name, table in tables.items()}
    return make_rollout(mask, logprobs=logprobs, **{"groups": GROUPS, "scores": SCORES, **fields})


def prepare(responses: Rollout, algorithm: RLOO | None = None) -> Batch:
    algorithm = algorithm or make_rloo()
    return algorithm.prepare(responses, algorithm.initial_state())[0]


def test_needs_are_old_and_reference_log_probs_and_four_responses_to_each_prompt():
    expected = Needs(passes={"response": ("reference", "old")}, samples_per_prompt=4, least_samples=2)
    assert make_rloo().needs() == expected
    assert make_rloo(kl_coef=0.0).needs().passes == {"response": ("old",)}
    assert make_rloo(entropy_coef=0.1).needs().entropy


def test_advantages_by_hand():
    batch = prepare(make_responses())
    assert_close(batch.advantages, ADVANTAGES.unsqueeze(1) * make_mask(LENGTHS))
    assert batch.masks["row"].tolist() == [True] * 5


def test_without_a_price_of_kl_the_reference_is_not_read():
    # 3 − 3.5, 4 − 2, 1 − 4.5, 6 − 2, 2 − 4
    mask = make_mask(LENGTHS)
    responses = make_responses().replace(logprobs={"sampler": SAMPLER, "old": SAMPLER})
    expected = torch.tensor([-0.5, 2.0, -3.5, 4.0, -2.0]).unsqueeze(1) * mask
    assert_close(prepare(responses, make_rloo(kl_coef=0.0)).advantages, expected)


def test_the_penalty_is_in_units_of_the_scaled_score_and_the_raw_scores_are_kept_in_the_state():
    # scores 1, 5: deviation 2, scaled ½ and 5/2; k1 = 1 in response 1: ½ − ½·1 = 0; advantages 0 − 2.5, 2.5 − 0
    algorithm = make_rloo(score_scaling=ScoreScaling.running)
    responses = make_rollout(
        make_mask([1, 1]),
        scores=torch.tensor([1.0, 5.0]),
        groups=torch.tensor([0, 0]),
        logprobs={"sampler": torch.tensor([[-1.0], [-1.0]]), "reference": torch.tensor([[-2.0], [-1.0]])},
    )
    batch, state = algorithm.prepare(responses, algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[-2.5], [2.5]]))
    assert batch.metrics["score/scale"] == 2
    assert state == {"score_moments": (2, 3, 8)}


def test_tokens_of_another_sampler_have_no_price():
    # response 1 without its second token (k1 = −1), response 3 without its first: rewards 2.75, 3, 0.5, 6, 2
    on_policy = make_mask(LENGTHS)
    on_policy[0, 1] = on_policy[2, 0] = False
    batch = prepare(make_responses(on_policy=on_policy))
    # 2.75 − 6.5/2, 1, 0.5 − 8.75/2, 6 − 3.25/2, −1
    assert_close(batch.advantages[:, 0], torch.tensor([-0.5, 1.0, -3.875, 4.375, -1.0]))


def test_equal_scores_give_exactly_0():
    # three responses of 0.1 and two of 0.7, without KL: in floating point (3 · 0.1 − 0.1) / 2 may differ from 0.1
    scores = torch.tensor([0.1, 0.7, 0.1, 0.1, 0.7])
    batch = prepare(make_responses(scores=scores, logprobs={"reference": SAMPLER}))
    assert not batch.advantages.any()


def test_a_prompt_with_a_single_response_is_refused():
    with pytest.raises(ValueError, match=r"^samples_per_prompt: "):
        prepare(make_responses(groups=torch.tensor([7, 5, 7, 7, 6])))


def make_output(ratios: list[float], **fields) -> tuple[PolicyOutput, torch.Tensor]:
    """Return an output with these ratios of whole responses, split evenly over their tokens, and its log-probs."""
    mask = make_mask(LENGTHS)
    shift = torch.tensor(ratios).log().unsqueeze(1) / mask.sum(1, keepdim=True)
    logprobs = ((SAMPLER + shift) * mask).requires_grad_()
    return PolicyOutput(logprobs, {}, **fields), logprobs


def test_loss_gradient_and_clip_fraction_by_hand():
    output, logprobs = make_output([1.1, 1.5, 1.5, 0.5, 0.5])
    batch = prepare(make_responses())
    loss = make_rloo().loss(batch, output)
    (policy,) = loss.terms
    assert (policy.name, policy.mask, policy.weight) == ("policy", "row", 1)
    # −0.25·1.1;  −1·1.2 (clipped);  max(4.625·1.5, 4.625·1.2);  max(−4.375·0.5, −4.375·0.8);  1·0.8 (clipped)
    assert_close(policy.values, torch.tensor([-0.275, -1.2, 6.9375, -2.1875, 0.8]))
    (gradient,) = torch.autograd.grad(policy.values.sum(), logprobs)
    # the whole response's gradient at each of its tokens, however many there are; none if clipped
    rows = torch.tensor([-0.275, 0.0, 6.9375, -2.1875, 0.0])
    assert_close(gradient, rows.unsqueeze(1) * make_mask(LENGTHS))
    clipped = loss.metrics["policy/clip_fraction"]
    assert (clipped.values.tolist(), clipped.mask, clipped.reduction) == ([0, 1, 0, 0, 1], "row", "mean")
    assert not clipped.values.requires_grad


def test_on_policy_the_gradient_is_the_advantage_at_every_token_whatever_the_length():
    output, logprobs = make_output([1.0] * 5)
    loss = make_rloo().loss(prepare(make_responses()), output)
    (gradient,) = torch.autograd.grad(loss.terms[0].values.sum(), logprobs)
    assert_close(gradient, -ADVANTAGES.unsqueeze(1) * make_mask(LENGTHS))


def test_a_descent_raises_responses_better_than_the_others_and_lowers_worse_ones():
    output, logprobs = make_output([1.0] * 5)
    batch = prepare(make_responses())
    (gradient,) = torch.autograd.grad(make_rloo().loss(batch, output).terms[0].values.sum(), logprobs)
    change = (-gradient * batch.mask).sum(1)
    assert (change.sign() == ADVANTAGES.sign()).all()


def test_ratios_are_to_the_training_forwards_old_log_probs():
    # the sampler's log-probs differ by a nat from the old ones; the price of KL keeps to the sampler's
    output, _ = make_output([1.0] * 5)
    responses = make_responses(logprobs={"sampler": SAMPLER - 1, "reference": REFERENCE - 1})
    loss = make_rloo().loss(prepare(responses), output)
    assert_close(loss.terms[0].values, -ADVANTAGES)


def test_far_ratios_are_bounded():
    # Σ(ℓ_θ − ℓ_old) of 1000 nats is taken as 20: no overflow, also where Â is 0
    output = PolicyOutput(SAMPLER + 1000, {})
    batch = prepare(make_responses())
    loss = make_rloo().loss(batch.replace(advantages=batch.advantages * 0), output)
    assert not loss.terms[0].values.any()
    loss = make_rloo().loss(batch, output)
    assert_close(loss.terms[0].values[2], torch.tensor(4.625 * math.exp(20)))


def test_only_the_policys_tokens_enter_the_ratio_and_rows_without_one_the_mean():
    # of response 1 the second token trains, of response 2 nothing; the others are whole
    mask = make_mask(LENGTHS)
    mask[0, 0] = mask[1, 0] = False
    batch = prepare(make_responses(masks={"policy": mask}))
    assert batch.masks["row"].tolist() == [True, False, True, True, True]
    output, logprobs = make_output([1.44, 5.0, 1.0, 1.0, 1.0])  # 1.2 for each token of response 1
    values = make_rloo(clip_range=0.5).loss(batch, output).terms[0].values
    assert_close(values[:2], torch.tensor([-0.25 * 1.2, -1.0]))
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert_close(gradient[:2], torch.tensor([[0.0, -0.3], [0.0, 0.0]]))


def test_an_entropy_bonus_is_a_mean_over_tokens():
    entropy = torch.rand(5, 2)
    output, _ = make_output([1.0] * 5, entropy=entropy)
    policy, bonus = make_rloo(entropy_coef=0.3).loss(prepare(make_responses()), output).terms
    assert (bonus.name, bonus.mask, bonus.weight, policy.mask) == ("entropy", "policy", 0.3, "row")
    assert_close(bonus.values, -entropy)


@pytest.mark.parametrize("junk", [1e30, math.inf, math.nan])
def test_values_outside_the_mask_change_nothing(junk):
    results = []
    for filling in (0.0, junk):
        algorithm = make_rloo(score_scaling=ScoreScaling.running)
        batch, state = algorithm.prepare(make_responses(junk=filling), algorithm.initial_state())
        output, logprobs = make_output([1.1, 1.5, 1.5, 0.5, 0.5])
        values = algorithm.loss(batch, output).terms[0].values
        (gradient,) = torch.autograd.grad(values.sum(), logprobs)
        results.append((batch.advantages, values.detach(), gradient * batch.mask, batch.metrics, state))
    for clean, dirty in zip(*results, strict=True):
        if isinstance(clean, torch.Tensor):
            torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        else:
            assert dirty == clean


def test_a_random_batch_agrees_with_plain_loops_in_float64():
    torch.manual_seed(0)
    lengths, groups = [3, 5, 1, 4, 2, 5, 3, 2], [0, 1, 0, 2, 1, 2, 0, 1]
    mask = make_mask(lengths)
    sampler, reference, old, new = (-torch.rand(8, 5) for _ in range(4))
    scores = torch.randn(8)
    responses = make_rollout(
        mask,
        scores=scores,
        groups=torch.tensor(groups),
        logprobs={"sampler": sampler, "reference": reference, "old": old},
    )
    algorithm = make_rloo(kl_coef=0.3)
    loss = algorithm.loss(prepare(responses, algorithm), PolicyOutput(new * mask, {}))

    tables = [table.double().tolist() for table in (sampler, reference, old, new)]
    rewards = [
        float(scores[i]) - 0.3 * sum(tables[0][i][t] - tables[1][i][t] for t in range(lengths[i])) for i in range(8)
    ]
    for i in range(8):
        others = [rewards[j] for j in range(8) if groups[j] == groups[i] and j != i]
        advantage = rewards[i] - sum(others) / len(others)
        ratio = math.exp(sum(tables[3][i][t] - tables[2][i][t] for t in range(lengths[i])))
        expected = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
        assert float(loss.terms[0].values[i]) == pytest.approx(expected, rel=1e-5)
    assert 0 < loss.metrics["policy/clip_fraction"].values.sum() < 8
