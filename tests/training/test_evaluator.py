"""Evaluation compared with a plain loop over two different models, and its metrics by hand."""

import bisect
import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from apa_cli.errors import UserError
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.kl import exact_kl
from apa_cli.randomness import Stream, sample_uniforms
from apa_cli.rewards.base import add_score_check
from apa_cli.rollout.samplers import ModelSampler
from apa_cli.rollout.token_sampling import sample_tokens, truncate_logits
from apa_cli.settings import DType
from apa_cli.training.evaluator import (
    MAIN_REWARD,
    Evaluator,
    ScoredResponses,
    compare_scores,
    compute_win_rate,
    find_equal_responses,
)
from apa_cli.types import Prompt, Rollout
from tests.builders import EOS, build_tiny_policy, build_word_tokenizer, make_sampling_settings

T = 0.7
LIMIT = 8
SEED = 11
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6], [5, 3], [7, 7, 1]]
"""Token ids: different lengths, which are padded, and more prompts than a microbatch holds."""


def score_length(prompts, responses, columns):
    return [float(len(response)) for response in responses]


def score_row(prompts, responses, columns):
    return [column["row"] * 1.5 for column in columns]


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return build_tiny_policy(seed=0)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(
        prompts=[Prompt(f"prompt {i}", ids, i, 0, {"row": i}) for i, ids in enumerate(PROMPTS)],
        plain_prompt_ids=PROMPTS,
        sources=[f"whole prompt {i}" for i in range(5)],
        tokenizer=build_word_tokenizer(),
        reference=build_tiny_policy(seed=1).requires_grad_(False),
        scores={MAIN_REWARD: add_score_check(score_length), "row": add_score_check(score_row)},
        describe=lambda sources, responses: {"characters": float(sum(map(len, sources)))},
        sampling=make_sampling_settings(max_new_tokens=LIMIT, temperature=T, microbatch_size=3),
        end_tokens=frozenset({EOS}),
        seed=SEED,
        sampling_batch=BatchSizeHalver("sampling.microbatch_size", 3, 1, print),
        microbatch=BatchSizeHalver("microbatch_size", 2, 1, print),
        dtype=DType.float32,
    )


@pytest.fixture(scope="module")
def sampler(evaluator, policy) -> ModelSampler:
    return ModelSampler(policy, evaluator.tokenizer, DType.float32)


@pytest.fixture(scope="module")
def replies(evaluator, sampler, policy) -> ScoredResponses:
    return evaluator.sample_and_score(sampler, policy)


@torch.no_grad()
def compute_next_probabilities(model: PreTrainedModel, tokens: list[int]) -> list[float]:
    """Return the probabilities after `tokens` at the temperature, in float64, without padding or a batch."""
    return (model(input_ids=torch.tensor([tokens])).logits[0, -1].double() / T).softmax(-1).tolist()


def list_responses(rollout: Rollout) -> list[list[int]]:
    """Return the token ids of each response."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]


def test_replies_are_sampled_with_the_random_numbers_of_the_evaluation_stream(evaluator, policy, replies):
    numbers = sample_uniforms(SEED, Stream.evaluation, 0, [(place, 0) for place in range(5)], LIMIT)
    for prompt, row, response in zip(PROMPTS, numbers.tolist(), list_responses(replies.rollout), strict=True):
        tokens = []
        for u in row:
            edges = list(itertools.accumulate(compute_next_probabilities(policy, prompt + tokens)))
            assert min(abs(edge - u) for edge in edges[:-1]) > 1e-6  # else rounding may decide: choose another seed
            tokens.append(min(bisect.bisect_left(edges, u), 10))
            if tokens[-1] == EOS:
                break
        assert response == tokens
    assert set(replies.rollout.endings) == {"eos", "length"}


@pytest.fixture(scope="module")
def by_position(evaluator, policy, replies) -> list[list[tuple[float, float]]]:
    """KL(π_θ ‖ π_init) and entropy of π_θ at every token of every reply, summed term by term."""
    result = []
    for prompt, tokens in zip(PROMPTS, list_responses(replies.rollout), strict=True):
        row = []
        for t in range(len(tokens)):
            p, q = (compute_next_probabilities(model, prompt + tokens[:t]) for model in (policy, evaluator.reference))
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            row.append((kl, -sum(a * math.log(a) for a in p)))
        result.append(row)
    return result


def test_exact_kl_and_entropy_match_a_plain_loop(replies, by_position):
    for i, row in enumerate(by_position):
        assert replies.kl[i, : len(row)].tolist() == pytest.approx([kl for kl, _ in row], rel=1e-4, abs=1e-6)
        assert replies.entropy[i, : len(row)].tolist() == pytest.approx([h for _, h in row], rel=1e-4, abs=1e-6)
        assert not replies.kl[i, len(row) :].any() and not replies.entropy[i, len(row) :].any()
    assert min(kl for row in by_position for kl, _ in row) > 0.01  # the models are different
    assert len({len(row) for row in by_position}) > 1


def test_metrics_are_sums_over_replies_and_means_over_tokens(evaluator, replies, by_position):
    metrics = evaluator.compute_metrics(replies, replies.scores)
    kl = [[kl for kl, _ in row] for row in by_position]
    tokens = sum(map(len, kl))
    assert metrics["eval/kl_exact"] == pytest.approx(sum(map(sum, kl)) / 5, rel=1e-4)
    assert metrics["eval/kl_exact_token"] == pytest.approx(sum(map(sum, kl)) / tokens, rel=1e-4)
    assert metrics["eval/entropy"] == pytest.approx(sum(h for row in by_position for _, h in row) / tokens, rel=1e-4)
    assert metrics["eval/length"] == pytest.approx(tokens / 5)
    assert metrics["eval/eos_rate"] == replies.rollout.endings.count("eos") / 5
    pairs = [pair for row in list_responses(replies.rollout) for pair in itertools.pairwise(row)]
    assert metrics["eval/distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert metrics["eval/characters"] == 5 * len("whole prompt 0")


def test_kl_does_not_depend_on_padding_and_microbatches(evaluator, policy, replies):
    for size in (1, 5):
        kl, entropy = evaluator.compute_kl_and_entropy(policy, replies.rollout, PROMPTS, size)
        torch.testing.assert_close(kl, replies.kl, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(entropy, replies.entropy, rtol=1e-4, atol=1e-6)


def test_kl_does_not_depend_on_chunks_of_logits(evaluator, policy, replies, monkeypatch):
    monkeypatch.setattr("apa_cli.models.lm_head.LOGITS_PER_CHUNK", 25)  # the logits of two tokens
    kl, entropy = evaluator.compute_kl_and_entropy(policy, replies.rollout, PROMPTS, 2)
    torch.testing.assert_close(kl, replies.kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy, replies.entropy, rtol=1e-4, atol=1e-6)


def test_kl_of_a_model_without_a_linear_head_uses_its_whole_logits(evaluator, policy, replies, monkeypatch):
    monkeypatch.setattr("apa_cli.models.forward.find_linear_head", lambda model: None)
    kl, entropy = evaluator.compute_kl_and_entropy(policy, replies.rollout, PROMPTS, 2)
    torch.testing.assert_close(kl, replies.kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy, replies.entropy, rtol=1e-4, atol=1e-6)


def test_sampler_and_scored_policy_are_apart(evaluator, sampler, replies):
    """The responses of the sampler's model, with the KL of another one: the reference's is 0 everywhere."""
    scored = evaluator.sample_and_score(sampler, evaluator.reference)
    assert torch.equal(scored.rollout.response_ids, replies.rollout.response_ids)
    assert float(scored.kl.abs().max()) < 1e-6 < float(replies.kl.max())
    other = evaluator.sample_and_score(
        ModelSampler(evaluator.reference, evaluator.tokenizer, DType.float32), sampler.model
    )
    assert list_responses(other.rollout) != list_responses(replies.rollout) and float(other.kl.max()) > 0.01


PLAIN = [[2, 3], [1, 1, 6], [5], [5, 3, 8], [7]]
"""Prompts as π_init reads them, of other lengths than those that the policy reads."""


def test_the_initial_policy_reads_the_plain_prompts(evaluator, sampler, policy, replies):
    """The policy reads instructed prompts; a plain loop gives each model its own."""
    evaluator = replace(evaluator, plain_prompt_ids=PLAIN)
    scored = evaluator.sample_and_score(sampler, policy)
    assert torch.equal(scored.rollout.response_ids, replies.rollout.response_ids)
    for i, tokens in enumerate(list_responses(scored.rollout)):
        for t in range(len(tokens)):
            p = compute_next_probabilities(policy, PROMPTS[i] + tokens[:t])
            q = compute_next_probabilities(evaluator.reference, PLAIN[i] + tokens[:t])
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert float(scored.kl[i, t]) == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert torch.equal(scored.entropy, replies.entropy)  # that of the policy, which reads the same as before


def test_ranks_give_the_evaluation_of_one(evaluator, sampler, policy, replies, run_on_ranks):
    """Five prompts on two ranks: each has three, one of them twice."""
    plain = replace(evaluator, plain_prompt_ids=PLAIN)
    expected = plain.sample_and_score(sampler, policy)
    for responses in run_on_ranks(2, lambda world: replace(plain, world=world).sample_and_score(sampler, policy)):
        assert list_responses(responses.rollout) == list_responses(replies.rollout)
        assert responses.scores == expected.scores and responses.rollout.prompts == expected.rollout.prompts
        torch.testing.assert_close(responses.kl, expected.kl, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(responses.entropy, expected.entropy, rtol=1e-4, atol=1e-6)


def test_scores_are_paired_with_those_of_the_sft_model(evaluator, replies):
    policy = replace(replies, scores={MAIN_REWARD: [1.0, 2.0, 3.0, 5.0, 9.0], "row": [0.0, 1.0, 2.0, 3.0, 4.0]})
    sft = {MAIN_REWARD: [1.0, 1.0, 4.0, 6.0, 3.0], "row": [1.0, 1.0, 2.0, 2.0, 5.0]}
    metrics = evaluator.compute_metrics(policy, sft)
    assert (metrics["eval/reward_mean"], metrics["eval/reward_mean_sft"]) == (4, 3)
    # Squares about the mean 4: 9 + 4 + 1 + 1 + 25 = 40; over n − 1 = 4: deviation √10; over √5: √2.
    assert metrics["eval/reward_ci"] == pytest.approx(1.96 * math.sqrt(2), rel=1e-6)
    assert metrics["eval/win_rate_sft"] == pytest.approx(0.5)  # tie, win, loss, loss, win: 2½ of 5
    assert metrics["eval/reward_mean/row"] == 2
    assert metrics["eval/win_rate_sft/row"] == pytest.approx(0.4)  # loss, two ties, win, loss: 2 of 5
    assert "eval/win_rate_sft/row" not in evaluator.compute_metrics(policy, {MAIN_REWARD: sft[MAIN_REWARD]})


def test_a_tie_counts_as_half_a_win():
    assert compare_scores([1.0, 2.0, 3.0, 3.0], [2.0, 2.0, 1.0, -1.0]).tolist() == [0, 0.5, 1, 1]
    assert compute_win_rate([1.0, 2.0, 3.0, 3.0], [2.0, 2.0, 1.0, -1.0]) == 0.625
    assert compute_win_rate([-1.0, 2.0], [1.0, 2.0]) == 0.25


def test_the_same_response_and_scores_up_to_rounding_tie():
    # float32 steps near 3 are 2.4e-7, 2⁻¹⁸ · 3 = 1.1e-5; in bfloat16 a reward model's steps near 3 are 1.6e-2
    scores, others = [3 + 2.4e-7, 3 - 1e-5, 3 + 2e-5, 3.0156, 3.0156], [3.0] * 5
    assert compare_scores(scores, others).tolist() == [0.5, 0.5, 1, 1, 1]
    same = find_equal_responses(["a", "b", "c", "d", "e"], ["b", "c", "d", "d", "E"])
    assert compare_scores(scores, others, same).tolist() == [0.5, 0.5, 1, 0.5, 1]
    assert find_equal_responses(["a"], []) is None


def test_equal_responses_tie_in_the_win_rate_of_an_evaluation(evaluator, replies):
    texts = replies.rollout.responses
    policy = replace(replies, scores={MAIN_REWARD: [1.01] * 5, "row": [1.01] * 5})
    sft = {MAIN_REWARD: [1.0] * 5, "row": [1.0] * 5}
    metrics = evaluator.compute_metrics(policy, sft, [*texts[:3], "other", "another"])
    assert metrics["eval/win_rate_sft"] == metrics["eval/win_rate_sft/row"] == pytest.approx(0.7)  # 3 ties, 2 wins


def test_one_prompt_has_no_interval(evaluator, replies):
    one = replace(replies, rollout=replies.rollout.select_rows(torch.tensor([0])), kl=replies.kl[:1])
    one = replace(one, entropy=replies.entropy[:1], scores={MAIN_REWARD: [1.0], "row": [2.0]})
    metrics = replace(evaluator, sources=["whole prompt 0"]).compute_metrics(one, one.scores)
    assert metrics["eval/reward_mean"] == 1 and "eval/reward_ci" not in metrics


def compute_truncated(p: list[float], top_k: int) -> list[float]:
    """Return the probabilities of the `top_k` likeliest tokens, renormalized, and 0 for the others."""
    least = sorted(p, reverse=True)[top_k - 1]
    kept = [a if a >= least else 0.0 for a in p]
    return [a / sum(kept) for a in kept]


def test_with_top_k_kl_and_entropy_are_those_of_the_truncated_sampler(evaluator, policy):
    sampling = make_sampling_settings(max_new_tokens=LIMIT, temperature=T, microbatch_size=3, top_k=3)
    evaluator = replace(evaluator, sampling=sampling)
    scored = evaluator.sample_and_score(ModelSampler(policy, evaluator.tokenizer, DType.float32), policy)
    for i, tokens in enumerate(list_responses(scored.rollout)):
        for t, token in enumerate(tokens):
            p = compute_truncated(compute_next_probabilities(policy, PROMPTS[i] + tokens[:t]), 3)
            q = compute_next_probabilities(evaluator.reference, PROMPTS[i] + tokens[:t])
            assert p[token] > 0
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
            assert float(scored.kl[i, t]) == pytest.approx(kl, rel=1e-4, abs=1e-6)
            assert float(scored.entropy[i, t]) == pytest.approx(-sum(a * math.log(a) for a in p if a), rel=1e-4)


def test_the_truncated_kl_is_the_mean_log_ratio_of_its_own_samples():
    """At one position, over a grid of uniforms: mean of log q(token) − log π_init(token) over what is sampled."""
    settings = make_sampling_settings(top_k=2)
    logits, initial = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log(), torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    # q = 4/7, 3/7; π_init = 1/10, 2/10: 4/7 · log(40/7) + 3/7 · log(30/14)
    expected = 4 / 7 * math.log(40 / 7) + 3 / 7 * math.log(30 / 14)
    truncated = truncate_logits(logits, settings)
    assert float(exact_kl(truncated, initial)) == pytest.approx(expected, rel=1e-6)
    assert float(exact_kl(truncated, logits)) == pytest.approx(math.log(10 / 7), rel=1e-6)  # −log of the mass kept
    tokens, _ = sample_tokens(logits.expand(7000, -1), (torch.arange(7000) + 0.5) / 7000, settings)
    log_ratio = truncated.log_softmax(-1)[0] - initial.log_softmax(-1)[0]
    assert float(log_ratio[tokens].mean()) == pytest.approx(expected, rel=1e-3)


def test_each_row_of_the_sample_table_is_one_reply(evaluator, sampler, policy, replies, by_position):
    metrics, rows, scores = evaluator.evaluate(sampler, policy, {})
    assert metrics["eval/win_rate_sft"] == 0.5  # without SFT scores it is compared with itself
    assert scores["row"] == [0, 1.5, 3, 4.5, 6]
    assert scores[MAIN_REWARD] == [len(text) for text in replies.rollout.responses]
    for i, row in enumerate(rows):
        kl = sum(kl for kl, _ in by_position[i])
        assert row.pop("kl") == pytest.approx(kl, rel=1e-4)
        text, ending = replies.rollout.responses[i], replies.rollout.endings[i]
        assert row == {"prompt": f"prompt {i}", "response": text, "score": scores[MAIN_REWARD][i], "ending": ending}


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"entropy": 1.0}, "'entropy', a name of the evaluation's"),
        ({"reward_mean": 1.0}, "'reward_mean', a name of the evaluation's"),
        ({"mine_sft": 1.0}, "'mine_sft', a name of the evaluation's"),
        ({"mine": "high"}, "'mine' the value 'high', not a finite number"),
        ({"mine": math.nan}, "'mine' the value nan, not a finite number"),
    ],
)
def test_a_data_sets_metric_must_have_a_name_of_its_own_and_be_a_number(figures, message, evaluator, replies):
    evaluator = replace(evaluator, describe=lambda sources, responses: figures)
    with pytest.raises(UserError) as error:
        evaluator.compute_metrics(replies, replies.scores)
    assert str(error.value).startswith("dataset: describe gives the metric " + message)
