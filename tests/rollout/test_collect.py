"""Rollouts: prefixes of one policy completed by another, and concatenation."""

import bisect
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from apa_cli.randomness import Stream, make_generator, sample_uniforms
from apa_cli.rollout.collect import assemble_rollout, collect_rollout, concatenate_sequences
from apa_cli.rollout.engine import Sampled
from apa_cli.rollout.samplers import DataSampler, ModelSampler
from apa_cli.settings import DType
from apa_cli.types import DATA, POLICY, Prefix, Prompt, Rollout, RolloutPlan
from tests.builders import (
    EOS,
    build_tiny_policy,
    build_word_tokenizer,
    make_rollout,
    make_sampling_settings,
    make_sequences,
)

# Whole rollouts

LENGTH, SEED, ITERATION = 6, 5, 3
N = 16
SETTINGS = make_sampling_settings(max_new_tokens=LENGTH, temperature=0.7, microbatch_size=5)


def plan_prefix(probability: float = 1.0) -> RolloutPlan:
    """Return the plan of a prefix of the guide, completed by the policy."""
    return RolloutPlan("guide", Prefix("uniform", probability), "policy")


@pytest.fixture(scope="module")
def policies() -> dict[str, PreTrainedModel]:
    return {"policy": build_tiny_policy(seed=0), "guide": build_tiny_policy(seed=1)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_word_tokenizer()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Two samples of each of eight prompts of 1 to 4 tokens, not sorted by place."""
    rng = np.random.default_rng(0)
    places = [7, 2, 5, 0, 6, 1, 4, 3]
    tokens = {place: rng.integers(1, 10, size=1 + place % 4).tolist() for place in places}
    return [
        Prompt(f"prompt {place}", tokens[place], place, number, {"row": place}) for place in places for number in (0, 1)
    ]


@torch.no_grad()
def sample_by_reference(
    model: PreTrainedModel, context: list[int], uniforms: np.ndarray, ends: set[int]
) -> tuple[list, list, str]:
    """Return tokens, log-probs and ending of one response, sampled by full passes at temperature 0.7."""
    tokens, logprobs = [], []
    for u in uniforms.tolist():
        logits = model(input_ids=torch.tensor([context + tokens])).logits[0, -1].double() / 0.7
        weights = logits.softmax(-1).tolist()
        edges = list(itertools.accumulate(weights))
        assert min(abs(edge - u) for edge in edges[:-1]) > 1e-6  # else rounding may decide: use another seed
        tokens.append(min(bisect.bisect_left(edges, u), len(edges) - 1))
        logprobs.append(math.log(weights[tokens[-1]]))
        if tokens[-1] in ends:
            return tokens, logprobs, "eos"
    return tokens, logprobs, "length"


def unpad_rows(rollout: Rollout, values: torch.Tensor) -> list[list]:
    """Return the values under the mask, which must be a prefix of each row, with zeros outside."""
    lengths = rollout.mask.sum(-1).tolist()
    assert rollout.mask.tolist() == [[t < length for t in range(rollout.mask.shape[1])] for length in lengths]
    assert not values.masked_select(~rollout.mask).any()
    return [row[:length].tolist() for row, length in zip(values, lengths, strict=True)]


def find_prefixes(rollout: Rollout) -> torch.Tensor:
    """Return the mask [N, T] of the tokens that the guide sampled."""
    assert not (rollout.on_policy & ~rollout.mask).any()
    return rollout.mask & ~rollout.on_policy


def collect(models, tokenizer, prompts, plan=None, ends=frozenset({EOS}), settings=SETTINGS) -> Rollout:
    samplers = {name: ModelSampler(model, tokenizer, DType.float32) for name, model in models.items()}
    return collect_rollout(samplers, tokenizer, prompts, settings, ends, SEED, Stream.rollout, ITERATION, plan)


def test_by_default_the_policy_samples_every_token(policies, tokenizer, prompts):
    rollout = collect(policies, tokenizer, prompts)
    uniforms = sample_uniforms(SEED, Stream.rollout, ITERATION, [(p.place, p.sample) for p in prompts], LENGTH)
    expected = [
        sample_by_reference(policies["policy"], p.token_ids, u, {EOS}) for p, u in zip(prompts, uniforms, strict=True)
    ]
    assert unpad_rows(rollout, rollout.response_ids) == [tokens for tokens, _, _ in expected]
    for row, (_, logprobs, _) in zip(unpad_rows(rollout, rollout.logprobs["sampler"]), expected, strict=True):
        assert row == pytest.approx(logprobs, rel=1e-5, abs=1e-6)
    assert rollout.endings == [ending for _, _, ending in expected]
    assert set(rollout.endings) == {"eos", "length"} and not find_prefixes(rollout).any()
    assert rollout.groups.tolist() == [p.place for p in prompts]
    assert (rollout.prompts, rollout.columns) == ([p.text for p in prompts], [p.columns for p in prompts])
    prompt_ids = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert prompt_ids == [p.token_ids for p in prompts] and rollout.prompt_mask[:, -1].all()


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_a_prefix_of_the_roll_in_is_completed_by_the_roll_out_policy(policies, tokenizer, prompts, probability):
    rollout = collect(policies, tokenizer, prompts, plan_prefix(probability))
    responses, logprobs = unpad_rows(rollout, rollout.response_ids), unpad_rows(rollout, rollout.logprobs["sampler"])
    prefixes = find_prefixes(rollout)
    with_prefix, too_short, over_limit = 0, 0, 0
    for i, prompt in enumerate(prompts):
        key = (prompt.place, prompt.sample)
        roll_in_uniforms, uniforms = (
            sample_uniforms(SEED, s, ITERATION, [key], LENGTH)[0] for s in (Stream.roll_in, Stream.rollout)
        )
        roll_in, roll_in_logprobs, _ = sample_by_reference(policies["guide"], prompt.token_ids, roll_in_uniforms, {EOS})
        cut = int(prefixes[i].sum())
        assert prefixes[i].tolist() == [t < cut for t in range(rollout.mask.shape[1])]
        # the cut's random numbers: the first decides on a prefix, the second on its length in 1 … len − 1
        rng = make_generator(SEED, Stream.roll_in_cut, ITERATION, *key)
        is_chosen = rng.random() < probability
        assert cut == (int(rng.integers(1, len(roll_in))) if is_chosen and len(roll_in) > 1 else 0)
        prefix, context = roll_in[:cut], prompt.token_ids + roll_in[:cut]
        tokens, completion_logprobs, ending = sample_by_reference(policies["policy"], context, uniforms, {EOS})
        assert responses[i] == (prefix + tokens)[:LENGTH]
        expected = (roll_in_logprobs[:cut] + completion_logprobs)[:LENGTH]
        assert logprobs[i] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        is_over = cut + len(tokens) > LENGTH
        assert rollout.endings[i] == ("length" if is_over else ending)
        with_prefix += cut > 0
        too_short += is_chosen and len(roll_in) == 1
        over_limit += is_over
    # Each case occurs: a prefix, a roll-in too short for one, a completion over the limit.
    assert with_prefix and over_limit and (too_short or probability < 1)
    if probability < 1:
        assert with_prefix < N - 2


def test_prefix_lengths_are_uniform_below_the_whole_length(policies, tokenizer):
    prompts = [Prompt("", [1 + place % 9], place, 0, {}) for place in range(600)]
    settings = replace(SETTINGS, max_new_tokens=4, microbatch_size=600)
    always = collect(policies, tokenizer, prompts, plan_prefix(), frozenset(), settings)
    # 600 prefixes of lengths 1, 2, 3: 200 each, with a standard deviation of √(600 · ⅓ · ⅔) = 11.5
    cuts = find_prefixes(always)
    counts = np.bincount(cuts.sum(-1).numpy(), minlength=5)
    assert counts[0] == counts[4] == 0 and all(abs(count - 200) < 35 for count in counts[1:4])
    quarter = collect(policies, tokenizer, prompts, plan_prefix(0.25), frozenset(), settings)
    # a quarter of 600 is 150, with a standard deviation of √(600 · ¼ · ¾) = 10.6
    has_prefix = find_prefixes(quarter)[:, 0]
    assert abs(int(has_prefix.sum()) - 150) < 32
    assert torch.equal(find_prefixes(quarter)[has_prefix], cuts[has_prefix])  # the same cuts


@pytest.mark.parametrize("limit", [1, 2])
def test_a_sequence_of_one_token_has_no_prefix(policies, tokenizer, prompts, limit):
    settings = replace(SETTINGS, max_new_tokens=limit)
    rollout = collect(policies, tokenizer, prompts, plan_prefix(), frozenset(), settings)
    assert find_prefixes(rollout).sum(-1).tolist() == [limit - 1] * N
    without = collect(policies, tokenizer, prompts, None, frozenset(), settings)
    assert torch.equal(rollout.response_ids, without.response_ids) is (limit == 1)


def test_a_stop_string_that_begins_in_the_prefix_ends_the_response(policies, tokenizer):
    """The stop string `e f` is token 4, the last of a prefix, and token 5, the first of its completion."""
    prompts = [Prompt("", [1 + place % 9], place, 0, {}) for place in range(200)]
    settings, plan = replace(SETTINGS, stop_strings=["e f"], microbatch_size=200), plan_prefix()
    rollout = collect(policies, tokenizer, prompts, plan, settings=settings)
    prefix_lengths, across = find_prefixes(rollout).sum(-1).tolist(), 0
    for cut, tokens, ending in zip(
        prefix_lengths, unpad_rows(rollout, rollout.response_ids), rollout.endings, strict=True
    ):
        if cut and tokens[cut - 1 : cut + 1] == [4, 5]:
            assert (len(tokens), ending) == (cut + 1, "stop")
            across += 1
    assert across


def test_prefixes_and_completions_are_joined_and_cut_at_the_limit(tokenizer):
    """The limit is 6: 2 + 3 tokens, 3 + 3 with the end token at the limit, 4 + 3 one too many, 0 + 2, 5 + 6."""
    prefixes = [[1, 2], [3, 4, 5], [6, 7, 8, 9], [], [1, 2, 3, 4, 5]]
    completions = [[3, 4, 5], [6, 7, EOS], [1, 2, EOS], [8, EOS], [6, 7, 8, 9, 1, 2]]
    prompts = [Prompt("p", [1] * (1 + i % 3), i, 0, {}) for i in range(5)]
    numbers = itertools.count(1)
    prefix_logprobs, completion_logprobs = (
        [[-next(numbers) / 8 for _ in row] for row in part] for part in (prefixes, completions)
    )
    sampled = Sampled(completions, completion_logprobs, ["stop", "eos", "eos", "eos", "length"])
    rollout = assemble_rollout(tokenizer, prompts, prefixes, prefix_logprobs, sampled, SETTINGS, plan_prefix())
    assert unpad_rows(rollout, rollout.response_ids) == [
        [1, 2, 3, 4, 5],
        [3, 4, 5, 6, 7, EOS],
        [6, 7, 8, 9, 1, 2],
        [8, EOS],
        [1, 2, 3, 4, 5, 6],
    ]
    # The prefixes' log-probs are −1/8 … −14/8 in order, the completions' −15/8 and on.
    eighths = [[round(-8 * x) for x in row] for row in unpad_rows(rollout, rollout.logprobs["sampler"])]
    assert eighths == [
        [1, 2, 15, 16, 17],
        [3, 4, 5, 18, 19, 20],
        [6, 7, 8, 9, 21, 22],
        [24, 25],
        [10, 11, 12, 13, 14, 26],
    ]
    assert rollout.endings == ["stop", "eos", "length", "eos", "length"]
    cuts = [2, 3, 4, 0, 5]
    assert find_prefixes(rollout).tolist() == [[t < cut for t in range(6)] for cut in cuts]
    # The end token of the second and the fourth response is not in the text; the third one's was cut off.
    assert [text.split() for text in rollout.responses] == [
        ["b", "c", "d", "e", "f"],
        ["d", "e", "f", "g", "h"],
        ["g", "h", "i", "j", "b", "c"],
        ["i"],
        ["b", "c", "d", "e", "f", "g"],
    ]


def make_numbered_rollout(prompts: list[list[int]], responses: list[list[int]], first: int) -> Rollout:
    """Return a rollout padded to its own widths with the token 0, whose rows are numbered from `first`."""
    tokens, count = make_sequences(prompts, responses), len(prompts)
    logprobs = -tokens.response_ids.float()
    names = [str(first + i) for i in range(count)]
    related = make_sequences(prompts, [[9] * (1 + first + i) for i in range(count)])
    return make_rollout(
        **{**vars(tokens), "logprobs": {"sampler": logprobs, "init": 3 * logprobs}, "values": {"value": 2 * logprobs}},
        prompts=names, responses=names, endings=names, groups=torch.arange(first, first + count),
        columns=[{"name": name} for name in names], scores=torch.arange(first, first + count).float(),
        extra={"row": torch.arange(first, first + count)}, masks={"policy": tokens.mask},
        plan_index=torch.full([count], first), related={"chosen": related},
    )  # fmt: skip


def test_rollouts_are_concatenated_with_common_padding():
    parts = [
        make_numbered_rollout([[5], [6, 7]], [[1, 2, 3], [4]], 0),
        make_numbered_rollout([[8, 9, 9], [1]], [[5, 6], [5, 6]], 2),
    ]
    joined = concatenate_sequences(parts, pad=99).select_rows(torch.arange(3))
    # Padding is added on the left of prompts and on the right of responses; the fourth row is left out.
    assert joined.prompt_ids.tolist() == [[99, 0, 5], [99, 6, 7], [8, 9, 9]]
    assert joined.prompt_mask.tolist() == [[False, False, True], [False, True, True], [True, True, True]]
    assert joined.response_ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 99]]
    mask = [[True] * 3, [True, False, False], [True, True, False]]
    assert joined.mask.tolist() == joined.on_policy.tolist() == joined.masks["policy"].tolist() == mask
    assert joined.logprobs["sampler"].tolist() == [[-1, -2, -3], [-4, 0, 0], [-5, -6, 0]]
    assert joined.logprobs["init"].tolist() == [[-3, -6, -9], [-12, 0, 0], [-15, -18, 0]]
    assert joined.logprobs.keys() == {"sampler", "init"}
    assert joined.values["value"].tolist() == [[-2, -4, -6], [-8, 0, 0], [-10, -12, 0]]
    assert joined.scores.tolist() == [0, 1, 2] and joined.groups.tolist() == [0, 1, 2]
    assert joined.extra["row"].tolist() == [0, 1, 2] and joined.plan_index.tolist() == [0, 0, 2]
    assert joined.responses == ["0", "1", "2"] and joined.columns == [{"name": str(i)} for i in range(3)]
    # The related responses are 1, 2, 3 and 4 tokens long, to the same prompts.
    chosen = joined.related["chosen"]
    assert chosen.response_ids.tolist() == [[9, 0, 99, 99], [9, 9, 99, 99], [9, 9, 9, 0]]
    assert chosen.mask.sum(-1).tolist() == [1, 2, 3] and torch.equal(chosen.prompt_ids, joined.prompt_ids)
    with pytest.raises(ValueError, match=r"^concatenate_sequences: no part$"):
        concatenate_sequences([], pad=99)


def test_no_token_follows_a_stop_string_in_logged_responses_and_prefixes():
    """ "e f" are tokens 4 and 5; the text of a response ends before them, and so do its tokens."""
    tokenizer = build_word_tokenizer()
    settings = replace(SETTINGS, stop_strings=["e f"], max_new_tokens=9)
    logged = [[1, 4, 5, 2, 3, EOS], [1, 2, EOS], [4, 5, EOS], [1, 1, 1, 4, 5]]
    prompts = [Prompt("b", [1], place, 0, {}, response_ids=row) for place, row in enumerate(logged)]
    whole = RolloutPlan(DATA, Prefix("all"), None)
    rollout = collect_rollout(
        {DATA: DataSampler()}, tokenizer, prompts, settings, frozenset({EOS}), SEED, Stream.rollout, 1, whole
    )
    assert [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)] == [
        [1, 4, 5], [1, 2, EOS], [4, 5], [1, 1, 1, 4, 5],
    ]  # fmt: skip
    assert rollout.endings == ["stop", "eos", "stop", "stop"]
    assert rollout.responses == [" b", " b c", "", " b b b"]
    policy = ModelSampler(build_tiny_policy(), tokenizer, DType.float32)
    completed = RolloutPlan(DATA, Prefix("uniform", 1.0), POLICY)
    samplers = {DATA: DataSampler(), POLICY: policy}
    for iteration in range(8):
        rollout = collect_rollout(
            samplers, tokenizer, prompts, settings, frozenset({EOS}), SEED, Stream.rollout, iteration, completed
        )
        for row, mask, on_policy in zip(rollout.response_ids, rollout.mask, rollout.on_policy, strict=True):
            assert on_policy.any() and " 4, 5" not in str(row[mask].tolist()[:-1])
