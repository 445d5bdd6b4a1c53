"""Sampling of responses: they depend on model, prompt and uniform numbers only."""

import bisect
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from apa_cli.models.forward import compute_response_logprobs
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.models.sequence_packing import can_pack
from apa_cli.rollout import decode_step, engine
from apa_cli.rollout.engine import Sampled, pad_left, pad_right, sample_responses
from apa_cli.rollout.kv_cache import PreallocatedCacheLayer
from apa_cli.types import Sequences
from tests.builders import (
    EOS,
    PAD,
    add_random_adapter,
    build_tiny_policy,
    build_word_tokenizer,
    make_lora_settings,
    make_sampling_settings,
)

# Padding


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    ids, mask = pad_left([[3, 1, 4], [1]], pad=9)
    assert ids.tolist() == [[3, 1, 4], [9, 9, 1]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    rows = pad_right([[0.5], [0.25, 0.75]], 0.0, width=3, dtype=torch.float32)
    assert rows.tolist() == [[0.5, 0.0, 0.0], [0.25, 0.75, 0.0]]


# Whole responses

LENGTH = 12
SETTINGS = make_sampling_settings(max_new_tokens=LENGTH)
N = 24


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2"])
def policy(request) -> PreTrainedModel:
    """GPT-NeoX has relative positions, GPT-2 absolute ones."""
    return build_tiny_policy(request.param)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_word_tokenizer()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """24 prompts of 1 to 6 tokens, not sorted by length."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 10, size=1 + (5 * i) % 6).tolist() for i in range(N)]


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    return 1 - np.random.default_rng(1).random((N, LENGTH))


@torch.no_grad()
def sample_by_reference(
    policy: PreTrainedModel, prompt: list[int], uniforms: np.ndarray, ends: set[int], temperature: float = 1.0
) -> tuple[list[int], list[float], str, int]:
    """Sample one response without cache, padding or batch.

    Return its tokens, log-probs, ending and the number of tokens before the first doubtful one: a uniform number nearer
    than 1e-5 to an edge of the CDF may select either token.
    """
    tokens, logprobs, clear, doubtful = [], [], 0, False
    for u in uniforms.tolist():
        logits = policy(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].double() / temperature
        weights = [math.exp(x) for x in (logits - logits.max()).tolist()]
        edges = list(itertools.accumulate(weight / sum(weights) for weight in weights))
        doubtful |= min(abs(edge - u) for edge in edges[:-1]) < 1e-5
        clear += not doubtful
        token = min(bisect.bisect_left(edges, u), len(edges) - 1)
        tokens.append(token)
        logprobs.append(math.log(weights[token] / sum(weights)))
        if token in ends:
            return tokens, logprobs, "eos", clear
    return tokens, logprobs, "length", clear


def assert_equal_to_reference(policy, sampled: Sampled, prompts, uniforms, ends, temperature=1.0) -> None:
    """Compare with `sample_by_reference`, token for token up to the first doubtful one; nearly all are compared."""
    compared, total = 0, 0
    for i, prompt in enumerate(prompts):
        tokens, logprobs, ending, clear = sample_by_reference(policy, prompt, uniforms[i], ends, temperature)
        assert sampled.tokens[i][:clear] == tokens[:clear]
        assert sampled.logprobs[i][:clear] == pytest.approx(logprobs[:clear], rel=1e-5, abs=1e-5)
        if clear == len(tokens):
            assert (sampled.tokens[i], sampled.endings[i]) == (tokens, ending)
        compared, total = compared + clear, total + len(tokens)
    assert compared > 0.9 * total


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_responses_equal_those_of_the_reference_loop(policy, tokenizer, prompts, uniforms, temperature):
    settings = replace(SETTINGS, temperature=temperature)
    sampled = sample_responses(policy, tokenizer, prompts, uniforms, settings, frozenset({EOS}))
    assert_equal_to_reference(policy, sampled, prompts, uniforms, {EOS}, temperature)


def test_decoding_continues_with_unfinished_rows_once_half_have_ended(policy, tokenizer, prompts, uniforms):
    can_pack(policy)  # its probe runs forward passes, which are not counted
    batch_sizes = []
    hook = policy.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs.get("input_ids", args[0] if args else None))),
        with_kwargs=True,
    )
    try:
        sampled = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS, 2, 3}))
    finally:
        hook.remove()
    lengths, rows = [len(tokens) for tokens in sampled.tokens], N
    for t, batch_size in enumerate(batch_sizes):
        assert batch_size == rows
        unfinished = sum(length > t + 1 for length in lengths)
        rows = unfinished if 2 * unfinished <= rows else rows
    assert len(batch_sizes) == max(lengths) and min(batch_sizes) <= N // 4
    assert_equal_to_reference(policy, sampled, prompts, uniforms, {EOS, 2, 3})


def test_a_preallocated_cache_gives_the_responses_of_a_plain_one(policy, tokenizer, prompts, uniforms, monkeypatch):
    """Bit for bit, also when rows are selected, and with little spare room so that buffers are reallocated."""
    settings, ends = replace(SETTINGS, max_new_tokens=uniforms.shape[1]), frozenset({EOS, 2})
    for spare_tokens in (1, 3, 128):
        monkeypatch.setattr(PreallocatedCacheLayer, "SPARE_TOKENS", spare_tokens)
        sampled = sample_responses(policy, tokenizer, prompts, uniforms, settings, ends)
        with monkeypatch.context() as patch:
            patch.setattr(decode_step, "build_kv_cache", lambda model: DynamicCache(config=model.config))
            assert sampled == sample_responses(policy, tokenizer, prompts, uniforms, settings, ends)
    assert len({len(tokens) for tokens in sampled.tokens}) > 2


def test_both_decoders_give_the_same_responses_with_and_without_lookahead(
    policy, tokenizer, prompts, uniforms, monkeypatch
):
    """Also when rows are selected."""
    ends, truncated = frozenset({EOS, 2, 3}), replace(SETTINGS, top_k=8, top_p=0.95, temperature=0.7)
    expected = [sample_responses(policy, tokenizer, prompts, uniforms, s, ends) for s in (SETTINGS, truncated)]
    assert engine.LOOKAHEAD_STEPS == {"cuda": 1}
    for lookahead in (0, 1):
        for with_graph in (False, True):
            monkeypatch.setattr(engine, "LOOKAHEAD_STEPS", {"cpu": lookahead})
            monkeypatch.setattr(engine, "can_decode_with_graph", lambda model, with_graph=with_graph: with_graph)
            for settings, other in zip((SETTINGS, truncated), expected, strict=True):
                sampled = sample_responses(policy, tokenizer, prompts, uniforms, settings, ends)
                assert (sampled.tokens, sampled.endings) == (other.tokens, other.endings)
                for row, other_row in zip(sampled.logprobs, other.logprobs, strict=True):
                    assert row == pytest.approx(other_row, abs=1e-5)
            sampled = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, ends)
            assert_equal_to_reference(policy, sampled, prompts, uniforms, ends)
    decoders = []
    monkeypatch.setattr(engine, "GraphDecoder", decoders.append)
    sample_responses(policy, tokenizer, prompts, uniforms[:, :1], SETTINGS, ends)
    assert not decoders  # the prefill samples the only token


def test_a_model_with_its_adapter_disabled_gives_the_base_models_responses(prompts, uniforms, tokenizer, monkeypatch):
    base, model = build_tiny_policy("gpt_neox"), build_tiny_policy("gpt_neox")
    add_random_adapter(model, make_lora_settings())
    arguments = (tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    expected = sample_responses(base, *arguments)
    assert sample_responses(model, *arguments).tokens != expected.tokens
    for with_graph in (False, True):
        monkeypatch.setattr(engine, "can_decode_with_graph", lambda model, with_graph=with_graph: with_graph)
        assert sample_responses(AdapterDisabledModel(model), *arguments).tokens == expected.tokens


def test_without_cuda_graph_no_model_is_probed(policy, tokenizer, prompts, uniforms, monkeypatch):
    probed = []
    monkeypatch.setattr(engine, "can_decode_with_graph", lambda model: probed.append(model) or False)
    for cuda_graph in (False, True):
        settings = replace(SETTINGS, cuda_graph=cuda_graph)
        sample_responses(policy, tokenizer, prompts, uniforms, settings, frozenset({EOS}))
    assert probed == [policy]


def test_each_of_several_end_tokens_ends_a_response(policy, tokenizer, prompts, uniforms):
    sampled = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS, 4}))
    assert_equal_to_reference(policy, sampled, prompts, uniforms, {EOS, 4})
    last = {tokens[-1] for tokens, ending in zip(sampled.tokens, sampled.endings, strict=True) if ending == "eos"}
    assert last == {EOS, 4}


def test_an_end_token_is_the_last_token_of_a_response(policy, tokenizer, prompts, uniforms):
    sampled = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    assert set(sampled.endings) == {"eos", "length"}
    for tokens, logprobs, ending in zip(sampled.tokens, sampled.logprobs, sampled.endings, strict=True):
        assert len(tokens) == len(logprobs)
        if ending == "eos":
            assert tokens.index(EOS) == len(tokens) - 1
        else:
            assert EOS not in tokens
            assert len(tokens) == LENGTH


def test_without_end_tokens_every_response_reaches_the_limit(policy, tokenizer, prompts, uniforms):
    sampled = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset())
    assert sampled.endings == ["length"] * N
    assert {len(tokens) for tokens in sampled.tokens} == {LENGTH}


def test_an_end_token_at_the_last_position_gives_the_ending_eos(policy, tokenizer, prompts, uniforms):
    whole = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    i = next(i for i, ending in enumerate(whole.endings) if ending == "eos" and len(whole.tokens[i]) > 1)
    length = len(whole.tokens[i])
    for limit, ending in ((length, "eos"), (length - 1, "length")):
        sampled = sample_responses(policy, tokenizer, [prompts[i]], uniforms[[i], :limit], SETTINGS, frozenset({EOS}))
        assert sampled.tokens == [whole.tokens[i][:limit]]
        assert sampled.endings == [ending]


def count_clear_tokens(policy, prompts, uniforms) -> list[int]:
    """Return the number of tokens of each response before the first doubtful one."""
    return [sample_by_reference(policy, p, u, {EOS})[3] for p, u in zip(prompts, uniforms, strict=True)]


def assert_equal_where_clear(one: Sampled, other: Sampled, clear: list[int]) -> None:
    for i, count in enumerate(clear):
        assert other.tokens[i][:count] == one.tokens[i][:count]
        assert other.logprobs[i][:count] == pytest.approx(one.logprobs[i][:count], rel=1e-5, abs=1e-5)
    assert sum(clear) > 0.9 * sum(map(len, one.tokens))


@pytest.mark.parametrize("microbatch", [1, 5])
def test_responses_do_not_depend_on_the_microbatch(policy, tokenizer, prompts, uniforms, microbatch):
    whole = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    split = sample_responses(
        policy, tokenizer, prompts, uniforms, replace(SETTINGS, microbatch_size=microbatch), frozenset({EOS})
    )
    assert_equal_where_clear(whole, split, count_clear_tokens(policy, prompts, uniforms))


def test_responses_do_not_depend_on_the_order_of_the_prompts(policy, tokenizer, prompts, uniforms):
    whole = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    order = np.random.default_rng(2).permutation(N)
    permuted = sample_responses(
        policy,
        tokenizer,
        [prompts[i] for i in order],
        uniforms[order],
        replace(SETTINGS, microbatch_size=7),
        frozenset({EOS}),
    )
    inverse = np.argsort(order)
    restored = Sampled(
        *([column[i] for i in inverse] for column in (permuted.tokens, permuted.logprobs, permuted.endings))
    )
    assert_equal_where_clear(whole, restored, count_clear_tokens(policy, prompts, uniforms))


def test_responses_do_not_depend_on_the_rest_of_the_batch(policy, tokenizer, prompts, uniforms):
    whole = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    few = sample_responses(policy, tokenizer, prompts[:3], uniforms[:3], SETTINGS, frozenset({EOS}))
    first = Sampled(whole.tokens[:3], whole.logprobs[:3], whole.endings[:3])
    assert_equal_where_clear(first, few, count_clear_tokens(policy, prompts[:3], uniforms[:3]))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_equal_those_of_the_training_forward_pass(policy, tokenizer, prompts, uniforms, temperature):
    settings = replace(SETTINGS, temperature=temperature)
    sampled = sample_responses(policy, tokenizer, prompts, uniforms, settings, frozenset({EOS}))
    prompt_ids, prompt_mask = pad_left(prompts, PAD)
    mask = pad_right([[1] * len(row) for row in sampled.tokens], 0, LENGTH, torch.bool)
    tokens = Sequences(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask.bool(),
        response_ids=pad_right(sampled.tokens, PAD, LENGTH, torch.int64), mask=mask, on_policy=mask,
    )  # fmt: skip
    with torch.no_grad():
        scored = compute_response_logprobs(policy, tokens, temperature)
    sampled = pad_right(sampled.logprobs, 0.0, LENGTH, torch.float32)
    torch.testing.assert_close(sampled, scored, rtol=1e-5, atol=1e-5)


def test_with_top_k_the_log_probs_are_those_of_the_whole_distribution(policy, tokenizer, prompts, uniforms):
    sampled = sample_responses(policy, tokenizer, prompts, uniforms, replace(SETTINGS, top_k=1), frozenset({EOS}))
    for prompt, tokens, logprobs in zip(prompts, sampled.tokens, sampled.logprobs, strict=True):
        with torch.no_grad():
            distribution = policy(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert tokens[0] == int(distribution.argmax())
        assert logprobs[0] == pytest.approx(float(distribution.max()), abs=1e-5)


def test_a_tiny_top_p_samples_the_likeliest_token(policy, tokenizer, prompts, uniforms):
    greedy = sample_responses(policy, tokenizer, prompts, uniforms, replace(SETTINGS, top_k=1), frozenset({EOS}))
    nucleus = sample_responses(policy, tokenizer, prompts, uniforms, replace(SETTINGS, top_p=1e-6), frozenset({EOS}))
    assert nucleus.tokens == greedy.tokens


def test_logits_in_bfloat16_are_normalised_in_float32(tokenizer, prompts, uniforms):
    model = build_tiny_policy("gpt_neox").bfloat16()
    sampled = sample_responses(model, tokenizer, prompts[1:2], uniforms[1:2, :1], SETTINGS, frozenset({EOS}))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompts[1:2])).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    exact = float(logits.float().log_softmax(-1)[sampled.tokens[0][0]])
    assert sampled.logprobs[0] == pytest.approx([exact], rel=1e-6)


def test_the_token_that_completes_a_stop_string_ends_the_response(policy, tokenizer, prompts, uniforms):
    # "e f" are tokens 4 and 5 in a row
    settings = replace(SETTINGS, stop_strings=["e f"])
    free = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    sampled = sample_responses(policy, tokenizer, prompts, uniforms, settings, frozenset({EOS}))
    stopped = 0
    for i, tokens in enumerate(free.tokens):
        ends = [t + 2 for t in range(len(tokens) - 1) if tokens[t : t + 2] == [4, 5]]
        if ends:
            assert (sampled.tokens[i], sampled.endings[i]) == (tokens[: ends[0]], "stop")
            assert len(sampled.logprobs[i]) == ends[0]
            stopped += 1
        else:
            assert (sampled.tokens[i], sampled.endings[i]) == (tokens, free.endings[i])
    assert 0 < stopped < N


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
def test_responses_do_not_depend_on_earlier_passes_of_the_model(kind, tokenizer, prompts, uniforms):
    """A resumed run samples first, an uninterrupted one computes log-probs before; bfloat16 shows any difference."""
    new, used = build_tiny_policy(kind).bfloat16(), build_tiny_policy(kind).bfloat16()
    assert can_pack(used)
    arguments = (tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    assert sample_responses(new, *arguments) == sample_responses(used, *arguments)


def test_a_stop_string_may_begin_in_a_prefix(policy, tokenizer, prompts, uniforms):
    """Each response continues its prompt's last token; with it the first free token completes a stop string."""
    free = sample_responses(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    i = next(i for i, tokens in enumerate(free.tokens) if 0 < tokens[0] < EOS and len(tokens) > 1)
    prefix = prompts[i][-1:]
    settings = replace(SETTINGS, stop_strings=[tokenizer.decode([*prefix, free.tokens[i][0]])])
    sample = (policy, tokenizer, prompts[i : i + 1], uniforms[i : i + 1], settings, frozenset({EOS}))
    sampled = sample_responses(*sample, prefixes=[prefix])
    assert (sampled.tokens, sampled.endings) == ([free.tokens[i][:1]], ["stop"])
    assert sample_responses(*sample).tokens[0][:2] == free.tokens[i][:2]  # without the prefix it goes on


def test_after_a_prefix_positions_go_on_to_the_end_of_a_scaled_context(tokenizer, prompts, uniforms):
    """A factor of 2 extends 8 positions to 16: prompts of 1 to 4 tokens, the last one a prefix, and 11 free tokens."""
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    scaled = build_tiny_policy("llama", max_position_embeddings=8, rope_parameters=scaling)
    short = [i for i in range(N) if len(prompts[i]) <= 4]
    chosen, numbers = [prompts[i] for i in short], uniforms[short]
    prefixes = [prompt[-1:] for prompt in chosen]
    sampled = sample_responses(scaled, tokenizer, chosen, numbers, SETTINGS, frozenset({EOS}), prefixes)
    assert_equal_to_reference(scaled, sampled, chosen, numbers[:, : LENGTH - 1], {EOS})
