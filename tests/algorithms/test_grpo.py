"""GRPO: standardized scores, clipped ratios, KL in the loss and the reductions, computed by hand."""

import math
from functools import partial

import pytest
import torch

from apa_cli.algorithms.base import ScoreScaling
from apa_cli.algorithms.grpo import GRPO
from apa_cli.algorithms.ratio import ImportanceLevel, LossReduction
from apa_cli.types import Batch, Loss, Needs, PolicyOutput, Rollout
from tests.builders import make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
NEUTRAL = {
    "score_scaling": ScoreScaling.none, "score_clip": None, "kl_coef": 0.0, "clip_range": 0.2, "entropy_coef": 0.0,
    "normalize_std": False, "clip_range_high": None, "loss_reduction": LossReduction.token,
    "importance_level": ImportanceLevel.token, "max_new_tokens": 10,
}  # fmt: skip


def make_grpo(**fields) -> GRPO:
    """Return GRPO without standard deviation, KL or entropy bonus and with a mean over all tokens."""
    return GRPO(**{**NEUTRAL, **fields})


# Responses 1, 3 and 4 answer prompt 7, responses 2 and 5 prompt 5. Scores less their mean: 3 − 5 = −2, 4 − 3 = 1,
# 4 − 5 = −1, 8 − 5 = 3, 2 − 3 = −1; deviations √((4 + 1 + 9)/2) = √7 and √((1 + 1)/1) = √2
OLD = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-1.0, -1.0], [-1.0, 0.0], [-2.0, -2.0]])
LENGTHS = [2, 1, 2, 1, 2]
MASK = make_mask(LENGTHS)
GROUPS = torch.tensor([7, 5, 7, 7, 5])
SCORES = torch.tensor([3.0, 4.0, 4.0, 8.0, 2.0])
CENTERED = torch.tensor([-2.0, 1.0, -1.0, 3.0, -1.0])


def make_responses(junk: float = 0.0, **fields) -> Rollout:
    """Return five responses to two prompts; log-probs outside the mask are `junk`."""
    tables = {"sampler": OLD, "reference": OLD, "old": OLD, **fields.pop("logprobs", {})}
    logprobs = {name: table.masked_fill(~MASK, junk) for name, table in tables.items()}
    return make_rollout(MASK, logprobs=logprobs, **{"groups": GROUPS, "scores": SCORES, **fields})


def prepare(responses: Rollout, algorithm: GRPO) -> Batch:
    return algorithm.prepare(responses, algorithm.initial_state())[0]


def make_output(ratios: list[list[float]], **fields) -> tuple[PolicyOutput, torch.Tensor]:
    """Return an output with these ratios of tokens, and its log-probs."""
    logprobs = ((OLD + torch.tensor(ratios).log()) * MASK).requires_grad_()
    return PolicyOutput(logprobs, {}, **fields), logprobs


RATIOS = [[1.1, 1.5], [1.5, 1.0], [0.5, 1.1], [0.5, 1.0], [1.0, 1.25]]
# With the centered advantages: 2·1.1, 2·1.5;  −1·1.2 (clipped);  1·0.8 (clipped), 1.1;  −3·0.5;  1, 1.25
TOKEN_LOSSES = torch.tensor([[2.2, 3.0], [-1.2, 0.0], [0.8, 1.1], [-1.5, 0.0], [1.0, 1.25]])
ON_POLICY = [[1.0, 1.0]] * 5


def reduce(loss: Loss, batch: Batch) -> torch.Tensor:
    """Return the weighted sum of the terms, each summed over its mask and divided by that mask's count."""
    return sum(
        term.weight * term.values.where(batch.masks[term.mask], torch.zeros(())).sum() / batch.masks[term.mask].sum()
        for term in loss.terms
    )


def test_needs_are_old_and_reference_log_probs_and_eight_responses_to_each_prompt():
    expected = Needs(passes={"response": ("reference", "old")}, samples_per_prompt=8, least_samples=2)
    assert make_grpo(kl_coef=0.04).needs() == expected
    assert make_grpo(kl_coef=0.0).needs().passes == {"response": ("old",)}
    assert make_grpo(entropy_coef=0.1).needs().entropy


def test_advantages_are_scores_less_the_mean_of_the_group():
    batch = prepare(make_responses(), make_grpo())
    assert_close(batch.advantages, CENTERED.unsqueeze(1) * MASK)
    assert batch.metrics == {"score/scale": 1, "grpo/zero_std_groups": 0}


def test_advantages_divided_by_the_deviation_of_the_group():
    batch = prepare(make_responses(), make_grpo(normalize_std=True))
    deviations = torch.tensor([7.0, 2.0, 7.0, 7.0, 2.0]).sqrt() + 1e-4
    assert_close(batch.advantages, (CENTERED / deviations).unsqueeze(1) * MASK)


def test_the_scores_may_be_scaled_before():
    # scores 1, 5 of one prompt: deviation 2, scaled ½ and 5/2, less 3/2
    algorithm = make_grpo(score_scaling=ScoreScaling.running)
    responses = make_rollout(make_mask([1, 1]), scores=torch.tensor([1.0, 5.0]), groups=torch.tensor([0, 0]))
    batch, state = algorithm.prepare(responses, algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[-1.0], [1.0]]))
    assert state == {"score_moments": (2, 3, 8)}


@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize(
    ("scores", "share"),
    [
        ([0.1, 0.7, 0.1, 0.1, 0.7], 1.0),
        ([0.1, 0.7, 0.1, 0.1, 0.2], 0.5),  # of the two groups one, though it has three of the five responses
        ([0.1, 0.7, 0.1, 0.2, 0.7], 0.5),
        ([0.1, 0.1, 0.2, 0.1, 0.2], 0.0),
    ],
)
def test_groups_of_equal_scores_have_advantages_of_exactly_0_and_are_counted(normalize_std, scores, share):
    batch = prepare(make_responses(scores=torch.tensor(scores)), make_grpo(normalize_std=normalize_std))
    assert batch.metrics["grpo/zero_std_groups"] == share
    for group in (5, 7):
        rows = (group == GROUPS).nonzero().flatten()
        equal = len({scores[row] for row in rows.tolist()}) == 1
        assert bool((batch.advantages[rows] == 0).all()) == equal


def test_a_prompt_with_a_single_response_is_refused():
    with pytest.raises(ValueError, match=r"^samples_per_prompt: "):
        prepare(make_responses(groups=torch.tensor([7, 5, 7, 7, 6])), make_grpo())


def test_token_losses_and_clip_fraction_by_hand():
    algorithm = make_grpo()
    loss = algorithm.loss(prepare(make_responses(), algorithm), make_output(RATIOS)[0])
    (policy,) = loss.terms
    assert (policy.name, policy.mask, policy.weight) == ("policy", "policy", 1)
    assert_close(policy.values, TOKEN_LOSSES)
    clipped = loss.metrics["policy/clip_fraction"]
    assert clipped.values.tolist() == [[0, 0], [1, 0], [1, 0], [0, 0], [0, 0]]
    assert (clipped.mask, clipped.reduction, clipped.values.requires_grad) == ("policy", "mean", False)


def test_the_upper_clip_range_is_apart():
    # 1.5 of response 2 clipped at 1.4 instead of 1.2; the lower bound stays at 0.8
    algorithm = make_grpo(clip_range_high=0.4)
    loss = algorithm.loss(prepare(make_responses(), algorithm), make_output(RATIOS)[0])
    expected = TOKEN_LOSSES.clone()
    expected[1, 0] = -1.4
    assert_close(loss.terms[0].values, expected)
    algorithm = make_grpo(clip_range_high=0.6)
    loss = algorithm.loss(prepare(make_responses(), algorithm), make_output(RATIOS)[0])
    assert loss.metrics["policy/clip_fraction"].values.tolist() == [[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("reduction", "mask", "values", "total"),
    [
        # sum 2.2 + 3 − 1.2 + 0.8 + 1.1 − 1.5 + 1 + 1.25 = 6.65 over 8 tokens
        (LossReduction.token, "policy", TOKEN_LOSSES.tolist(), 6.65 / 8),
        # means of 2.2 and 3, −1.2, 0.8 and 1.1, −1.5, 1 and 1.25, over 5 responses
        (LossReduction.sequence, "row", [2.6, -1.2, 0.95, -1.5, 1.125], 1.975 / 5),
        # their sums over max_new_tokens = 10, over 5 responses
        (LossReduction.constant, "row", [0.52, -0.12, 0.19, -0.15, 0.225], 0.665 / 5),
    ],
)
def test_reductions_by_hand(reduction, mask, values, total):
    algorithm = make_grpo(loss_reduction=reduction)
    batch = prepare(make_responses(), algorithm)
    loss = algorithm.loss(batch, make_output(RATIOS)[0])
    assert loss.terms[0].mask == mask
    assert_close(loss.terms[0].values, torch.tensor(values), atol=1e-6)
    assert float(reduce(loss, batch).detach()) == pytest.approx(total, rel=1e-5)
    assert batch.masks["row"].tolist() == [True] * 5


@pytest.mark.parametrize(
    ("reduction", "weights"),
    [
        (LossReduction.token, [1 / 8] * 5),
        (LossReduction.sequence, [1 / 10, 1 / 5, 1 / 10, 1 / 5, 1 / 10]),  # 1 / (5 responses · length)
        (LossReduction.constant, [1 / 50] * 5),  # 1 / (5 responses · max_new_tokens)
    ],
)
def test_on_policy_the_gradient_of_a_token_is_minus_its_advantage_times_its_weight(reduction, weights):
    algorithm = make_grpo(loss_reduction=reduction)
    batch = prepare(make_responses(), algorithm)
    output, logprobs = make_output(ON_POLICY)
    (gradient,) = torch.autograd.grad(reduce(algorithm.loss(batch, output), batch), logprobs)
    assert_close(gradient, (-CENTERED * torch.tensor(weights)).unsqueeze(1) * MASK)


def test_a_descent_raises_responses_better_than_the_mean_and_lowers_worse_ones():
    algorithm = make_grpo(normalize_std=True, loss_reduction=LossReduction.sequence)
    batch = prepare(make_responses(), algorithm)
    output, logprobs = make_output(ON_POLICY)
    (gradient,) = torch.autograd.grad(reduce(algorithm.loss(batch, output), batch), logprobs)
    assert ((-gradient * MASK).sum(1).sign() == CENTERED.sign()).all()


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    # response 1: √(1.1 · 1.5) = √1.65, Â −2; 3: √0.55 = 0.74 clipped to 0.8, Â −1; 5: √1.25; 2 and 4 as before
    algorithm = make_grpo(importance_level=ImportanceLevel.sequence)
    output, logprobs = make_output(RATIOS)
    loss = algorithm.loss(prepare(make_responses(), algorithm), output)
    first, last = 2 * 1.65**0.5, 1.25**0.5
    expected = torch.tensor([[first, first], [-1.2, 0.0], [0.8, 0.8], [-1.5, 0.0], [last, last]])
    assert_close(loss.terms[0].values * MASK, expected)
    assert (loss.metrics["policy/clip_fraction"].values * MASK).tolist() == [[0, 0], [1, 0], [1, 1], [0, 0], [0, 0]]
    # d/dℓ_t of Σ over two tokens of c·exp(mean) is 2·c·exp(mean)/2: each token has the response's c·exp(mean)
    (gradient,) = torch.autograd.grad(loss.terms[0].values.where(MASK, torch.zeros(())).sum(), logprobs)
    assert_close(gradient, torch.tensor([[first, first], [0, 0], [0, 0], [-1.5, 0.0], [last, last]]))


def test_kl_is_a_term_of_the_loss_with_its_gradient():
    # d = ℓ_ref − ℓ_θ = ln 2 at the first tokens, −ln 2 at the second: 1 − ln 2 and ln 2 − ½; gradient 1 − exp(d)
    algorithm = make_grpo(kl_coef=0.04)
    shift = torch.tensor([[math.log(2), -math.log(2)]])
    batch = prepare(make_responses(logprobs={"reference": OLD + shift}), algorithm)
    output, logprobs = make_output(ON_POLICY)
    policy, kl = algorithm.loss(batch, output).terms
    assert_close(policy.values, -CENTERED.unsqueeze(1) * MASK)  # Â has no price of KL
    assert (kl.name, kl.mask, kl.weight) == ("kl", "policy", 0.04)
    expected = torch.tensor([1 - math.log(2), math.log(2) - 0.5]).expand(5, 2)
    assert_close(kl.values * MASK, expected * MASK, atol=1e-6)
    (gradient,) = torch.autograd.grad((kl.values * MASK).sum(), logprobs)
    assert_close(gradient, torch.tensor([-1.0, 0.5]).expand(5, 2) * MASK, atol=1e-6)


def test_kl_is_reduced_like_the_policys_loss_and_the_entropy_bonus_is_a_mean_over_tokens():
    # k3 = 1 − ln 2 at the first tokens, 0 at the second: mean of a response of 2 half of that
    algorithm = make_grpo(kl_coef=0.04, entropy_coef=0.3, loss_reduction=LossReduction.sequence)
    shift = torch.tensor([[math.log(2), 0.0]])
    batch = prepare(make_responses(logprobs={"reference": OLD + shift}), algorithm)
    output, _ = make_output(ON_POLICY, entropy=torch.rand(5, 2))
    policy, kl, bonus = algorithm.loss(batch, output).terms
    assert (policy.mask, kl.mask, kl.weight) == ("row", "row", 0.04)
    k3 = 1 - math.log(2)
    assert_close(kl.values, torch.tensor([k3 / 2, k3, k3 / 2, k3, k3 / 2]), atol=1e-6)
    assert (bonus.name, bonus.mask, bonus.weight) == ("entropy", "policy", 0.3)
    assert_close(bonus.values, -output.entropy)


def test_without_kl_the_reference_is_not_read():
    algorithm = make_grpo(kl_coef=0.0)
    responses = make_responses().replace(logprobs={"old": OLD})
    loss = algorithm.loss(prepare(responses, algorithm), make_output(ON_POLICY)[0])
    assert [term.name for term in loss.terms] == ["policy"]


@pytest.mark.parametrize("reduction", list(LossReduction))
@pytest.mark.parametrize("level", list(ImportanceLevel))
def test_tokens_that_do_not_train_the_policy_do_not_enter(reduction, level):
    # of response 1 the second token trains, of response 2 nothing
    policy = MASK.clone()
    policy[0, 0] = policy[1, 0] = False
    algorithm = make_grpo(loss_reduction=reduction, importance_level=level)
    batch = prepare(make_responses(masks={"policy": policy}), algorithm)
    assert batch.masks["row"].tolist() == [True, False, True, True, True]
    output, logprobs = make_output([[5.0, 1.1], [7.0, 1.0], *ON_POLICY[2:]])
    loss = reduce(algorithm.loss(batch, output), batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0, 0] == gradient[1, 0] == 0
    # −Â ρ over 6 tokens; over 4 rows, in response 1 of one token; over 4 rows and max_new_tokens
    weight = {LossReduction.token: 1 / 6, LossReduction.sequence: 1 / 4, LossReduction.constant: 1 / 40}[reduction]
    assert float(gradient[0, 1]) == pytest.approx(2 * 1.1 * weight, rel=1e-5)


@pytest.mark.parametrize("reduction", list(LossReduction))
@pytest.mark.parametrize("level", list(ImportanceLevel))
@pytest.mark.parametrize("junk", [1e30, math.inf, math.nan])
def test_values_outside_the_mask_change_nothing(reduction, level, junk):
    results = []
    for filling in (0.0, junk):
        algorithm = make_grpo(kl_coef=0.04, loss_reduction=reduction, importance_level=level, normalize_std=True)
        batch = prepare(make_responses(junk=filling, logprobs={"reference": OLD - 1}), algorithm)
        leaf = (OLD + torch.tensor(RATIOS).log()).requires_grad_()
        output = PolicyOutput(leaf.masked_fill(~MASK, 0.0), {})  # as the forward pass gives it
        loss = reduce(algorithm.loss(batch, output), batch)
        results.append((batch.advantages, loss.detach(), *torch.autograd.grad(loss, leaf)))
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("reduction", list(LossReduction))
@pytest.mark.parametrize("level", list(ImportanceLevel))
def test_a_random_batch_agrees_with_plain_loops_in_float64(normalize_std, reduction, level):
    torch.manual_seed(0)
    lengths, groups = [3, 5, 1, 4, 2, 5, 3, 2], [0, 1, 0, 2, 1, 2, 0, 1]
    mask, scores = make_mask(lengths), torch.randn(8)
    reference, old, new = (-torch.rand(8, 5) for _ in range(3))
    responses = make_rollout(
        mask, scores=scores, groups=torch.tensor(groups), logprobs={"reference": reference, "old": old}
    )
    algorithm = make_grpo(
        kl_coef=0.3, clip_range_high=0.3, normalize_std=normalize_std, loss_reduction=reduction, importance_level=level
    )
    batch = prepare(responses, algorithm)
    loss = reduce(algorithm.loss(batch, PolicyOutput(new * mask, {})), batch)

    rows = []
    for i in range(8):
        group = [float(scores[j]) for j in range(8) if groups[j] == groups[i]]
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((score - mean) ** 2 for score in group) / (len(group) - 1))
        advantage = (float(scores[i]) - mean) / (deviation + 1e-4 if normalize_std else 1)
        logs = [float(new[i, t].double() - old[i, t].double()) for t in range(lengths[i])]
        if level is ImportanceLevel.sequence:
            logs = [sum(logs) / len(logs)] * len(logs)
        row = []
        for t, log_ratio in enumerate(logs):
            ratio = math.exp(log_ratio)
            clipped = min(max(ratio, 0.8), 1.3)
            d = float(reference[i, t].double() - new[i, t].double())
            row.append(max(-advantage * ratio, -advantage * clipped) + 0.3 * (math.exp(d) - 1 - d))
        rows.append(row)
    expected = {
        LossReduction.token: sum(map(sum, rows)) / sum(lengths),
        LossReduction.sequence: sum(sum(row) / len(row) for row in rows) / 8,
        LossReduction.constant: sum(sum(row) / 10 for row in rows) / 8,
    }[reduction]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", list(ImportanceLevel))
def test_junk_advantages_outside_the_mask_leave_the_gradient_finite(level):
    """Of the sequence's ratio, which all tokens share, every token's advantage is a factor."""
    algorithm = make_grpo(importance_level=level)
    batch = prepare(make_responses(), algorithm)
    output, logprobs = make_output(ON_POLICY)
    junk = batch.replace(advantages=batch.advantages.masked_fill(~MASK, math.nan))
    gradients = []
    for each in (batch, junk):
        (term,) = algorithm.loss(each, output).terms
        gradients.append(torch.autograd.grad(term.values[MASK].sum(), logprobs)[0])
    assert_close(gradients[1][MASK], gradients[0][MASK])
    assert gradients[0][MASK].abs().min() > 0


def test_scores_of_a_group_that_differ_by_rounding_have_no_advantage():
    algorithm = make_grpo(normalize_std=True)
    scores = torch.tensor([3.0, 4.0, 3 + 2.4e-7, 3 - 4.8e-7, 2.0])  # prompt 7: one and two units in the last place
    batch = prepare(make_responses(scores=scores), algorithm)
    assert batch.advantages[[0, 2, 3]].tolist() == [[0, 0]] * 3 and batch.advantages[[1, 4], 0].abs().min() > 0.7
    assert batch.metrics["grpo/zero_std_groups"] == 0.5
