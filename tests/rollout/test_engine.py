"""Sampling: the inverse CDF, truncation, and responses that depend on model, prompt and numbers alone."""

import bisect
import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from apa_cli.models.forward import response_logprobs
from apa_cli.models.lora import POLICY, WithoutAdapter, add_adapter
from apa_cli.models.sequence_packing import packs
from apa_cli.rollout import engine as sampler
from apa_cli.rollout import steps
from apa_cli.rollout.decode_step import RoomyLayer
from apa_cli.rollout.engine import Sampled, StopStrings, left_padded, right_padded, sample
from apa_cli.rollout.token_sampling import inverse_cdf, truncated
from apa_cli.settings import LoraSettings, SamplingSettings
from apa_cli.types import Tokens

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)

# Inverse CDF


def draw(probabilities: list[float], *uniforms: float) -> list[int]:
    rows = torch.tensor(probabilities).expand(len(uniforms), len(probabilities))
    return inverse_cdf(rows, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_inverse_cdf_by_hand():
    # cumulative ¼, ¾, 1: the first token that reaches u
    assert draw([0.25, 0.5, 0.25], 0.1, 0.25, 0.26, 0.75, 0.76, 1.0) == [0, 0, 1, 1, 2, 2]


def test_u_is_of_the_total_when_probabilities_do_not_sum_to_1():
    # total 2, cumulative ½, 1½, 2
    assert draw([0.5, 1.0, 0.5], 0.25, 0.26, 0.75, 0.76) == [0, 1, 1, 2]


def test_a_token_without_probability_is_never_drawn():
    tiny = 2.0**-53  # the smallest number the generator gives
    assert draw([0.0, 0.5, 0.0, 0.5, 0.0], tiny, 0.5, 0.5 + tiny, 1.0) == [1, 1, 3, 3]
    assert draw([0.0, 0.0, 1.0], tiny, 0.5, 1.0) == [2, 2, 2]
    assert draw([1.0, 0.0, 0.0], tiny, 0.5, 1.0) == [0, 0, 0]


def test_a_token_of_tiny_probability_is_drawn_by_a_tiny_number():
    # cumulative ½, ½ + 2⁻³⁰, 1 + 2⁻³⁰, of which u is a share: u = ½ falls between the first two,
    # which float32 would merge
    assert draw([0.5, 2.0**-30, 0.5], 0.5 - 2.0**-30, 0.5, 0.5 + 2.0**-29) == [0, 1, 2]


def test_each_row_is_drawn_from_its_own_distribution():
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    assert inverse_cdf(probabilities, torch.tensor([0.5, 0.5, 0.75]).double()).tolist() == [0, 1, 1]


def test_frequencies_over_a_grid_of_numbers_are_the_probabilities_exactly():
    # 1024 equally spaced numbers, probabilities in eighths: 128, 256, 0 and 640 of them
    grid = [(k + 1) / 1024 for k in range(1024)]
    assert np.bincount(draw([1 / 8, 2 / 8, 0.0, 5 / 8], *grid)).tolist() == [128, 256, 0, 640]


# Truncation

P = [0.1, 0.4, 0.2, 0.3]


def cut(probabilities: list[float], top_k: int = 0, top_p: float = 1.0) -> list[float]:
    return truncated(torch.tensor([probabilities]), top_k, top_p)[0].tolist()


def expected(*kept: float) -> object:
    return pytest.approx(list(kept), rel=1e-6)


def test_top_k_keeps_the_likeliest():
    assert cut(P, top_k=1) == expected(0, 0.4, 0, 0)
    assert cut(P, top_k=2) == expected(0, 0.4, 0, 0.3)
    assert cut(P, top_k=3) == expected(0, 0.4, 0.2, 0.3)


@pytest.mark.parametrize("top_k", [0, 4, 50])
def test_top_k_of_nothing_or_of_all_keeps_all(top_k):
    assert cut(P, top_k=top_k) == expected(*P)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    # in order 0.4, 0.3, 0.2, 0.1 with 0, 0.4, 0.7, 0.9 before them
    assert cut(P, top_p=0.01) == expected(0, 0.4, 0, 0)
    assert cut(P, top_p=0.39) == expected(0, 0.4, 0, 0)
    assert cut(P, top_p=0.41) == expected(0, 0.4, 0, 0.3)
    assert cut(P, top_p=0.69) == expected(0, 0.4, 0, 0.3)
    assert cut(P, top_p=0.71) == expected(0, 0.4, 0.2, 0.3)
    assert cut(P, top_p=0.91) == expected(*P)
    assert cut(P, top_p=1.0) == expected(*P)


def test_top_p_stops_where_it_is_reached_exactly():
    # ½ reaches 0.5: the next token is not needed
    assert cut([0.25, 0.5, 0.25], top_p=0.5) == [0, 0.5, 0]
    assert cut([0.25, 0.5, 0.125, 0.125], top_p=0.75) == [0.25, 0.5, 0, 0]


def test_top_p_is_of_what_top_k_left():
    # top 3: 0.4, 0.3, 0.2 of 0.9, with 0, 0.4, 0.7 before them; 0.75 of 0.9 is 0.675, 0.8 is 0.72
    assert cut(P, top_k=3, top_p=0.75) == expected(0, 0.4, 0, 0.3)
    assert cut(P, top_k=3, top_p=0.8) == expected(0, 0.4, 0.2, 0.3)


def test_a_top_p_of_1_keeps_even_what_is_lost_in_the_sum():
    # 1 + 1e-9 is 1 in float32, so all of the mass comes before the second token
    assert cut([1.0, 1e-9], top_p=1.0) == expected(1.0, 1e-9)


def test_rows_are_truncated_each_for_itself():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    close(truncated(rows, 1, 1.0), torch.tensor([[0.7, 0.0, 0.0], [0.0, 0.0, 0.7]]))
    close(truncated(rows, 0, 0.8), torch.tensor([[0.7, 0.2, 0.0], [0.0, 0.2, 0.7]]))


# Padding


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    ids, mask = left_padded([[3, 1, 4], [1]], pad=9)
    assert ids.tolist() == [[3, 1, 4], [9, 9, 1]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    rows = right_padded([[0.5], [0.25, 0.75]], 0.0, width=3, dtype=torch.float32)
    assert rows.tolist() == [[0.5, 0.0, 0.0], [0.25, 0.75, 0.0]]


# Whole responses

PAD, EOS = 0, 10
LENGTH = 12
SETTINGS = SamplingSettings(
    max_prompt_tokens=8,
    max_new_tokens=LENGTH,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_strings=[],
    microbatch_size=64,
    cuda_graph=True,
)
N = 24


def tiny_policy(kind: str) -> PreTrainedModel:
    """One layer; deviations ten times the usual, so that tokens and positions matter to the outputs."""
    torch.manual_seed(0)
    if kind == "gpt_neox":
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
    config = GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2"])
def policy(request) -> PreTrainedModel:
    """GPT-NeoX knows relative positions, GPT-2 absolute ones."""
    return tiny_policy(request.param)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Eleven words: <pad>, b to j, <eos>."""
    words = ["<pad>", *"bcdefghij", "<eos>"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Twenty-four prompts of 1 to 6 tokens, in no order of length."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 10, size=1 + (5 * i) % 6).tolist() for i in range(N)]


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    return 1 - np.random.default_rng(1).random((N, LENGTH))


@torch.no_grad()
def step_by_step(
    policy: PreTrainedModel, prompt: list[int], uniforms: np.ndarray, ends: set[int], temperature: float = 1.0
) -> tuple[list[int], list[float], str, int]:
    """One response without cache, padding or company: tokens, log-probs, ending, number of clear draws.

    A draw nearer than 1e-5 to an edge of the CDF may fall either way; the count stops before the first.
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


def assert_as_step_by_step(policy, found: Sampled, prompts, uniforms, ends, temperature=1.0) -> None:
    """Equal to the reference loop, token for token, up to the first doubtful draw; nearly all are clear."""
    compared, total = 0, 0
    for i, prompt in enumerate(prompts):
        tokens, logprobs, ending, clear = step_by_step(policy, prompt, uniforms[i], ends, temperature)
        assert found.tokens[i][:clear] == tokens[:clear]
        assert found.logprobs[i][:clear] == pytest.approx(logprobs[:clear], rel=1e-5, abs=1e-5)
        if clear == len(tokens):
            assert (found.tokens[i], found.endings[i]) == (tokens, ending)
        compared, total = compared + clear, total + len(tokens)
    assert compared > 0.9 * total


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_responses_are_those_of_a_loop_without_cache_padding_or_company(
    policy, tokenizer, prompts, uniforms, temperature
):
    settings = replace(SETTINGS, temperature=temperature)
    found = sample(policy, tokenizer, prompts, uniforms, settings, frozenset({EOS}))
    assert_as_step_by_step(policy, found, prompts, uniforms, {EOS}, temperature)


def test_responses_that_have_ended_are_left_out_once_they_are_half(policy, tokenizer, prompts, uniforms):
    packs(policy)  # which makes passes of its own the first time
    seen = []
    hook = policy.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs.get("input_ids", args[0] if args else None))),
        with_kwargs=True,
    )
    try:
        found = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS, 2, 3}))
    finally:
        hook.remove()
    lengths, rows = [len(tokens) for tokens in found.tokens], N
    for t, count in enumerate(seen):
        assert count == rows
        running = sum(length > t + 1 for length in lengths)
        rows = running if 2 * running <= rows else rows
    assert len(seen) == max(lengths) and min(seen) <= N // 4
    assert_as_step_by_step(policy, found, prompts, uniforms, {EOS, 2, 3})


def test_the_cache_gives_what_one_without_room_gives(policy, tokenizer, prompts, uniforms, monkeypatch):
    """Bit for bit, with rows that are left out on the way and room that is too little from the second token on."""
    settings, draws = replace(SETTINGS, max_new_tokens=uniforms.shape[1]), (prompts, uniforms)
    for room in (1, 3, 128):
        monkeypatch.setattr(RoomyLayer, "ROOM", room)
        found = sample(policy, tokenizer, *draws, settings, frozenset({EOS, 2}))
        with monkeypatch.context() as patch:
            patch.setattr(steps, "roomy_cache", lambda model: DynamicCache(config=model.config))
            assert found == sample(policy, tokenizer, *draws, settings, frozenset({EOS, 2}))
    assert len({len(tokens) for tokens in found.tokens}) > 2


def test_steps_that_repeat_themselves_draw_the_same(policy, tokenizer, prompts, uniforms, monkeypatch):
    """With rows that are left out on the way, and with steps that are taken before the last tokens are looked at."""
    ends, settings = frozenset({EOS, 2, 3}), replace(SETTINGS, top_k=8, top_p=0.95, temperature=0.7)
    plain = [sample(policy, tokenizer, prompts, uniforms, each, ends) for each in (SETTINGS, settings)]
    assert sampler.AHEAD == {"cuda": 1}
    for ahead in (0, 1):
        for repeated in (False, True):
            monkeypatch.setattr(sampler, "AHEAD", {"cpu": ahead})
            monkeypatch.setattr(sampler, "repeats", lambda model, repeated=repeated: repeated)
            for each, expected in zip((SETTINGS, settings), plain, strict=True):
                found = sample(policy, tokenizer, prompts, uniforms, each, ends)
                assert (found.tokens, found.endings) == (expected.tokens, expected.endings)
                for row, others in zip(found.logprobs, expected.logprobs, strict=True):
                    assert row == pytest.approx(others, abs=1e-5)
            found = sample(policy, tokenizer, prompts, uniforms, SETTINGS, ends)
            assert_as_step_by_step(policy, found, prompts, uniforms, ends)
    built = []
    monkeypatch.setattr(sampler, "Repeated", built.append)
    sample(policy, tokenizer, prompts, uniforms[:, :1], SETTINGS, ends)
    assert not built  # there is no second token


def test_the_base_of_a_model_with_an_adapter_draws_as_the_base(prompts, uniforms, tokenizer, monkeypatch):
    base, model = tiny_policy("gpt_neox"), tiny_policy("gpt_neox")
    add_adapter(model, LoraSettings(rank=2, alpha=4.0, target_modules=None), POLICY, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    given = (tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    expected = sample(base, *given)
    assert sample(model, *given).tokens != expected.tokens
    for repeated in (False, True):
        monkeypatch.setattr(sampler, "repeats", lambda model, repeated=repeated: repeated)
        assert sample(WithoutAdapter(model), *given).tokens == expected.tokens


def test_cuda_graph_false_leaves_the_trial_out(policy, tokenizer, prompts, uniforms, monkeypatch):
    asked = []
    monkeypatch.setattr(sampler, "repeats", lambda model: asked.append(model) or False)
    for cuda_graph in (False, True):
        sample(policy, tokenizer, prompts, uniforms, replace(SETTINGS, cuda_graph=cuda_graph), frozenset({EOS}))
    assert asked == [policy]


def test_several_tokens_may_end_a_response(policy, tokenizer, prompts, uniforms):
    found = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS, 4}))
    assert_as_step_by_step(policy, found, prompts, uniforms, {EOS, 4})
    last = {tokens[-1] for tokens, ending in zip(found.tokens, found.endings, strict=True) if ending == "eos"}
    assert last == {EOS, 4}


def test_the_token_that_ends_a_response_is_its_last_and_occurs_once(policy, tokenizer, prompts, uniforms):
    found = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    assert set(found.endings) == {"eos", "length"}
    for tokens, logprobs, ending in zip(found.tokens, found.logprobs, found.endings, strict=True):
        assert len(tokens) == len(logprobs)
        if ending == "eos":
            assert tokens.index(EOS) == len(tokens) - 1
        else:
            assert EOS not in tokens
            assert len(tokens) == LENGTH


def test_without_an_end_token_every_response_reaches_the_limit(policy, tokenizer, prompts, uniforms):
    found = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset())
    assert found.endings == ["length"] * N
    assert {len(tokens) for tokens in found.tokens} == {LENGTH}


def test_an_end_on_the_last_position_is_an_end_and_not_a_cut(policy, tokenizer, prompts, uniforms):
    whole = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    i = next(i for i, ending in enumerate(whole.endings) if ending == "eos" and len(whole.tokens[i]) > 1)
    length = len(whole.tokens[i])
    for limit, ending in ((length, "eos"), (length - 1, "length")):
        found = sample(policy, tokenizer, [prompts[i]], uniforms[[i], :limit], SETTINGS, frozenset({EOS}))
        assert found.tokens == [whole.tokens[i][:limit]]
        assert found.endings == [ending]


def clear_draws(policy, prompts, uniforms) -> list[int]:
    return [step_by_step(policy, p, u, {EOS})[3] for p, u in zip(prompts, uniforms, strict=True)]


def assert_equal_where_clear(one: Sampled, other: Sampled, clear: list[int]) -> None:
    for i, count in enumerate(clear):
        assert other.tokens[i][:count] == one.tokens[i][:count]
        assert other.logprobs[i][:count] == pytest.approx(one.logprobs[i][:count], rel=1e-5, abs=1e-5)
    assert sum(clear) > 0.9 * sum(map(len, one.tokens))


@pytest.mark.parametrize("microbatch", [1, 5])
def test_responses_do_not_depend_on_the_microbatch(policy, tokenizer, prompts, uniforms, microbatch):
    whole = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    split = sample(
        policy, tokenizer, prompts, uniforms, replace(SETTINGS, microbatch_size=microbatch), frozenset({EOS})
    )
    assert_equal_where_clear(whole, split, clear_draws(policy, prompts, uniforms))


def test_responses_do_not_depend_on_the_order_of_the_prompts(policy, tokenizer, prompts, uniforms):
    whole = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    order = np.random.default_rng(2).permutation(N)
    mixed = sample(
        policy,
        tokenizer,
        [prompts[i] for i in order],
        uniforms[order],
        replace(SETTINGS, microbatch_size=7),
        frozenset({EOS}),
    )
    back = np.argsort(order)
    restored = Sampled(*([column[i] for i in back] for column in (mixed.tokens, mixed.logprobs, mixed.endings)))
    assert_equal_where_clear(whole, restored, clear_draws(policy, prompts, uniforms))


def test_responses_do_not_depend_on_what_else_is_in_the_batch(policy, tokenizer, prompts, uniforms):
    whole = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    few = sample(policy, tokenizer, prompts[:3], uniforms[:3], SETTINGS, frozenset({EOS}))
    first = Sampled(whole.tokens[:3], whole.logprobs[:3], whole.endings[:3])
    assert_equal_where_clear(first, few, clear_draws(policy, prompts[:3], uniforms[:3]))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_those_of_the_training_forward(policy, tokenizer, prompts, uniforms, temperature):
    settings = replace(SETTINGS, temperature=temperature)
    found = sample(policy, tokenizer, prompts, uniforms, settings, frozenset({EOS}))
    prompt_ids, prompt_mask = left_padded(prompts, PAD)
    mask = right_padded([[1] * len(row) for row in found.tokens], 0, LENGTH, torch.bool)
    tokens = Tokens(prompt_ids, prompt_mask.bool(), right_padded(found.tokens, PAD, LENGTH, torch.int64), mask)
    with torch.no_grad():
        scored = response_logprobs(policy, tokens, temperature)
    sampled = right_padded(found.logprobs, 0.0, LENGTH, torch.float32)
    torch.testing.assert_close(sampled, scored, rtol=1e-5, atol=1e-5)


def test_top_k_draws_the_likeliest_and_keeps_the_log_probs_of_the_whole_distribution(
    policy, tokenizer, prompts, uniforms
):
    found = sample(policy, tokenizer, prompts, uniforms, replace(SETTINGS, top_k=1), frozenset({EOS}))
    for prompt, tokens, logprobs in zip(prompts, found.tokens, found.logprobs, strict=True):
        with torch.no_grad():
            distribution = policy(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert tokens[0] == int(distribution.argmax())
        assert logprobs[0] == pytest.approx(float(distribution.max()), abs=1e-5)


def test_a_nucleus_of_almost_nothing_is_the_likeliest_token(policy, tokenizer, prompts, uniforms):
    greedy = sample(policy, tokenizer, prompts, uniforms, replace(SETTINGS, top_k=1), frozenset({EOS}))
    nucleus = sample(policy, tokenizer, prompts, uniforms, replace(SETTINGS, top_p=1e-6), frozenset({EOS}))
    assert nucleus.tokens == greedy.tokens


def test_a_low_precision_models_distribution_is_normalised_in_float32(tokenizer, prompts, uniforms):
    rough = tiny_policy("gpt_neox").bfloat16()
    found = sample(rough, tokenizer, prompts[1:2], uniforms[1:2, :1], SETTINGS, frozenset({EOS}))
    with torch.no_grad():
        logits = rough(input_ids=torch.tensor(prompts[1:2])).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    exact = float(logits.float().log_softmax(-1)[found.tokens[0][0]])
    assert found.logprobs[0] == pytest.approx([exact], rel=1e-6)


@pytest.mark.parametrize(
    ("strings", "tokens", "completed"),
    [
        ([], [4, 5], False),
        ([""], [4, 5], False),  # a text that is in every text ends nothing
        (["e f"], [4], False),
        (["e f"], [4, 5], True),
        (["e f"], [5, 4], False),
        (["e f"], [1] * 100 + [4, 5], True),
        (["j j", "e f"], [4, 5], True),  # any of several
        (["e f"], [4, PAD, 5], True),  # special tokens are not in the text
        (["e f", " ".join("bcdefghijbcde")], [*range(1, 10), 1, 2, 3, 4], True),  # the longest one fits
    ],
)
def test_a_stop_string_is_found_in_the_decoded_text(tokenizer, strings, tokens, completed):
    assert StopStrings(tokenizer, strings).completed(tokens) is completed


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(policy, tokenizer, prompts, uniforms):
    # "e f" are tokens 4 and 5 in a row
    settings = replace(SETTINGS, stop_strings=["e f"])
    free = sample(policy, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS}))
    found = sample(policy, tokenizer, prompts, uniforms, settings, frozenset({EOS}))
    stopped = 0
    for i, tokens in enumerate(free.tokens):
        ends = [t + 2 for t in range(len(tokens) - 1) if tokens[t : t + 2] == [4, 5]]
        if ends:
            assert (found.tokens[i], found.endings[i]) == (tokens[: ends[0]], "stop")
            assert len(found.logprobs[i]) == ends[0]
            stopped += 1
        else:
            assert (found.tokens[i], found.endings[i]) == (tokens, free.endings[i])
    assert 0 < stopped < N


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
def test_a_model_that_has_computed_something_draws_as_a_new_one_does(kind, tokenizer, prompts, uniforms):
    """A resumed run samples first, an uninterrupted one computes log-probs before; in bfloat16 rounding tells."""
    new, used = tiny_policy(kind).bfloat16(), tiny_policy(kind).bfloat16()
    assert packs(used)
    first, second = (sample(model, tokenizer, prompts, uniforms, SETTINGS, frozenset({EOS})) for model in (new, used))
    assert first == second
