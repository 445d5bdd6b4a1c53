"""Evaluation against a plain loop over two models that differ, and its figures by hand."""

import bisect
import itertools
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from apa_cli.hardware.oom import Halving
from apa_cli.randomness import Stream, uniforms
from apa_cli.rewards.base import checked
from apa_cli.settings import DType, SamplingSettings
from apa_cli.training.evaluator import MAIN, Evaluator, Replies, win_rate, wins
from apa_cli.types import Prompt, Rollout

T = 0.7
EOS = 10
LIMIT = 8
SEED = 11
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6], [5, 3], [7, 7, 1]]
"""Of different lengths, so that they are padded, and more than a microbatch."""


def tiny_model(seed: int) -> PreTrainedModel:
    """One layer; deviations ten times the usual, so that the two models differ."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return GPTNeoXForCausalLM(config).eval()


def length(prompts, responses, columns):
    return [float(len(response)) for response in responses]


def places(prompts, responses, columns):
    return [column["row"] * 1.5 for column in columns]


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return tiny_model(0)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    names = ["<pad>", *"bcdefghij", "<eos>"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return Evaluator(
        prompts=[Prompt(f"prompt {i}", ids, i, 0, {"row": i}) for i, ids in enumerate(PROMPTS)],
        sources=[f"whole prompt {i}" for i in range(5)],
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="<eos>"),
        reference=tiny_model(1).requires_grad_(False),
        scores={MAIN: checked(length), "places": checked(places)},
        describe=lambda sources, responses: {"own": float(sum(map(len, sources)))},
        sampling=SamplingSettings(
            max_prompt_tokens=8,
            max_new_tokens=LIMIT,
            temperature=T,
            top_k=0,
            top_p=1.0,
            stop_strings=[],
            microbatch_size=3,
            cuda_graph=True,
        ),
        end_tokens=frozenset({EOS}),
        eval_seed=SEED,
        sampling_batch=Halving("sampling.microbatch_size", 3, 1, print),
        microbatch=Halving("microbatch_size", 2, 1, print),
        dtype=DType.float32,
    )


@pytest.fixture(scope="module")
def replies(evaluator, policy) -> Replies:
    return evaluator.replies(policy)


@torch.no_grad()
def distribution(model: PreTrainedModel, tokens: list[int]) -> list[float]:
    """What follows `tokens`, in float64, without padding or company, at the temperature."""
    return (model(input_ids=torch.tensor([tokens])).logits[0, -1].double() / T).softmax(-1).tolist()


def responses(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]


def test_replies_are_drawn_by_the_evaluations_own_numbers(evaluator, policy, replies):
    numbers = uniforms(SEED, Stream.evaluation, 0, [(place, 0) for place in range(5)], LIMIT)
    for prompt, row, found in zip(PROMPTS, numbers.tolist(), responses(replies.rollout), strict=True):
        tokens = []
        for u in row:
            edges = list(itertools.accumulate(distribution(policy, prompt + tokens)))
            assert min(abs(edge - u) for edge in edges[:-1]) > 1e-6  # else rounding may decide: take another seed
            tokens.append(min(bisect.bisect_left(edges, u), 10))
            if tokens[-1] == EOS:
                break
        assert found == tokens
    assert set(replies.rollout.endings) == {"eos", "length"}


@pytest.fixture(scope="module")
def by_position(evaluator, policy, replies) -> list[list[tuple[float, float]]]:
    """Of every token of every reply: KL(π_θ ‖ π_init) and the entropy of π_θ, summed term by term."""
    result = []
    for prompt, tokens in zip(PROMPTS, responses(replies.rollout), strict=True):
        row = []
        for t in range(len(tokens)):
            p, q = (distribution(model, prompt + tokens[:t]) for model in (policy, evaluator.reference))
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            row.append((kl, -sum(a * math.log(a) for a in p)))
        result.append(row)
    return result


def test_exact_kl_and_entropy_of_every_position_are_those_of_a_plain_loop(replies, by_position):
    for i, row in enumerate(by_position):
        assert replies.kl[i, : len(row)].tolist() == pytest.approx([kl for kl, _ in row], rel=1e-4, abs=1e-6)
        assert replies.entropy[i, : len(row)].tolist() == pytest.approx([h for _, h in row], rel=1e-4, abs=1e-6)
        assert not replies.kl[i, len(row) :].any() and not replies.entropy[i, len(row) :].any()
    assert min(kl for row in by_position for kl, _ in row) > 0.01  # the models differ
    assert len({len(row) for row in by_position}) > 1


def test_figures_are_sums_over_replies_and_means_over_tokens(evaluator, replies, by_position):
    found = evaluator.metrics(replies, replies.scores)
    kl = [[kl for kl, _ in row] for row in by_position]
    tokens = sum(map(len, kl))
    assert found["eval/kl_exact"] == pytest.approx(sum(map(sum, kl)) / 5, rel=1e-4)
    assert found["eval/kl_exact_token"] == pytest.approx(sum(map(sum, kl)) / tokens, rel=1e-4)
    assert found["eval/entropy"] == pytest.approx(sum(h for row in by_position for _, h in row) / tokens, rel=1e-4)
    assert found["eval/length"] == pytest.approx(tokens / 5)
    assert found["eval/eos_rate"] == replies.rollout.endings.count("eos") / 5
    pairs = [pair for row in responses(replies.rollout) for pair in itertools.pairwise(row)]
    assert found["eval/distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert found["eval/own"] == 5 * len("whole prompt 0")


def test_padding_and_microbatches_change_no_kl(evaluator, policy, replies):
    for size in (1, 5):
        kl, entropy = evaluator.exact(policy, replies.rollout, size)
        torch.testing.assert_close(kl, replies.kl, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(entropy, replies.entropy, rtol=1e-4, atol=1e-6)


def test_pieces_of_the_vocabulary_change_no_kl(evaluator, policy, replies, monkeypatch):
    monkeypatch.setattr("apa_cli.models.lm_head.PIECE", 25)  # the logits of two tokens
    kl, entropy = evaluator.exact(policy, replies.rollout, 2)
    torch.testing.assert_close(kl, replies.kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy, replies.entropy, rtol=1e-4, atol=1e-6)


def test_logits_of_a_model_that_are_more_than_its_head_are_measured_whole(evaluator, policy, replies, monkeypatch):
    monkeypatch.setattr("apa_cli.models.forward.linear_head", lambda model: None)
    kl, entropy = evaluator.exact(policy, replies.rollout, 2)
    torch.testing.assert_close(kl, replies.kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy, replies.entropy, rtol=1e-4, atol=1e-6)


def test_scores_are_compared_with_those_of_the_sft_model_pair_by_pair(evaluator, replies):
    given = replace(replies, scores={MAIN: [1.0, 2.0, 3.0, 5.0, 9.0], "places": [0.0, 1.0, 2.0, 3.0, 4.0]})
    sft = {MAIN: [1.0, 1.0, 4.0, 6.0, 3.0], "places": [1.0, 1.0, 2.0, 2.0, 5.0]}
    found = evaluator.metrics(given, sft)
    assert (found["eval/reward_mean"], found["eval/reward_mean_sft"]) == (4, 3)
    # squares about 4: 9 + 4 + 1 + 1 + 25 = 40, of 4: deviation √10, over √5
    assert found["eval/reward_ci"] == pytest.approx(1.96 * math.sqrt(2), rel=1e-6)
    assert found["eval/win_rate_sft"] == pytest.approx(0.5)  # a tie, won, lost, lost, won: 2½ of 5
    assert found["eval/reward_mean/places"] == 2
    assert found["eval/win_rate_sft/places"] == pytest.approx(0.4)  # lost, two ties, won, lost: 2 of 5
    assert "eval/win_rate_sft/places" not in evaluator.metrics(given, {MAIN: sft[MAIN]})


def test_a_tie_counts_half():
    assert wins([1.0, 2.0, 3.0, 3.0], [2.0, 2.0, 1.0, -1.0]).tolist() == [0, 0.5, 1, 1]
    assert win_rate([1.0, 2.0, 3.0, 3.0], [2.0, 2.0, 1.0, -1.0]) == 0.625
    assert win_rate([-1.0, 2.0], [1.0, 2.0]) == 0.25


def test_a_row_of_the_sample_table_is_one_reply(evaluator, policy, replies, by_position):
    metrics, rows, scores = evaluator.evaluate(policy, {})
    assert metrics["eval/win_rate_sft"] == 0.5  # without others it is compared with itself
    assert scores["places"] == [0, 1.5, 3, 4.5, 6]
    assert scores[MAIN] == [len(text) for text in replies.rollout.responses]
    for i, row in enumerate(rows):
        nats = sum(kl for kl, _ in by_position[i])
        assert row.pop("kl") == pytest.approx(nats, rel=1e-4)
        text, ending = replies.rollout.responses[i], replies.rollout.endings[i]
        assert row == {"prompt": f"prompt {i}", "response": text, "score": scores[MAIN][i], "ending": ending}
