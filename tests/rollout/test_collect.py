"""From prompts to a rollout: the text that is scored, and prefixes of one policy completed by another."""

import bisect
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from apa_cli.randomness import Stream, generator, uniforms
from apa_cli.rollout.collect import assembled, collect, response_text
from apa_cli.rollout.engine import Sampled
from apa_cli.settings import SamplingSettings
from apa_cli.types import Prompt, Rollout, RolloutPlan

# The text that is scored


@pytest.fixture(scope="module")
def byte_level(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def text_of(tokenizer, response: str, ending: str = "length", stop_strings=(), prompt="\n\nHuman: Hi\n\nAssistant:"):
    """What is scored of a response that is spelt like this."""
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    return response_text(tokenizer, tokenizer(prompt)["input_ids"], tokens, ending, list(stop_strings))


def test_a_text_keeps_its_spaces_on_the_left_and_loses_those_on_the_right(byte_level):
    assert text_of(byte_level, "  Yes, I do. \n\n ") == "  Yes, I do."
    assert text_of(byte_level, "\n Yes") == "\n Yes"


def test_the_token_that_ended_a_response_is_not_in_its_text_whatever_it_is(byte_level):
    tokens = byte_level(" Yes!")["input_ids"]
    assert byte_level.decode(tokens[-1:]) == "!"  # no special token, which would not be decoded anyway
    for ending, text in (("eos", " Yes"), ("length", " Yes!"), ("stop", " Yes!")):
        assert response_text(byte_level, byte_level("Hi")["input_ids"], tokens, ending, []) == text
    eos = byte_level.eos_token_id
    assert response_text(byte_level, byte_level("Hi")["input_ids"], [*tokens, eos], "eos", []) == " Yes!"
    assert response_text(byte_level, byte_level("Hi")["input_ids"], [eos], "eos", []) == ""


@pytest.mark.parametrize("stop_strings", [["Human:", "Assistant:"], ["Assistant:", "Human:"], ["", "Assistant:", "x"]])
def test_the_stop_string_that_comes_first_cuts(byte_level, stop_strings):
    said = " No. \n\nAssistant: Yes.\n\nHuman: Sure? Assistant:"
    assert text_of(byte_level, said, "stop", stop_strings) == " No."


def test_a_stop_string_is_cut_wherever_it_is_and_however_the_response_ended(byte_level):
    assert text_of(byte_level, "Human: Hi", "length", ["Human:"]) == ""
    assert text_of(byte_level, " A human. Human:", "stop", ["human:", "Human:"]) == " A human."
    assert text_of(byte_level, " Yes", "length", ["Human:"]) == " Yes"  # the prompt's own are not looked at


@pytest.mark.parametrize("prompt", ["Human: Hi\n\nAssistant:", "A:", "Assistant: "])
def test_a_tokenizer_that_drops_the_first_space_of_a_text_keeps_that_of_a_response(shared, prompt):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama-spm32k")
    tokens = tokenizer.convert_tokens_to_ids(["▁Yes", ",", "▁I", "▁do"])
    assert tokenizer.decode(tokens) == "Yes, I do"
    ids = tokenizer(prompt)["input_ids"]
    assert response_text(tokenizer, ids, tokens, "length", []) == " Yes, I do"
    assert response_text(tokenizer, ids, tokens[2:], "length", []) == " I do"
    bare = tokenizer.convert_tokens_to_ids(["Y", "es"])
    assert response_text(tokenizer, ids, bare, "length", []) == "Yes"


# Whole rollouts

PAD, EOS, LENGTH, SEED, ITERATION = 0, 10, 6, 5, 3
N = 16
SETTINGS = SamplingSettings(
    max_prompt_tokens=8,
    max_new_tokens=LENGTH,
    temperature=0.7,
    top_k=0,
    top_p=1.0,
    stop_strings=[],
    microbatch_size=5,
    cuda_graph=True,
)


def tiny_model(seed: int) -> PreTrainedModel:
    """One layer; deviations ten times the usual, so that models differ and tokens matter."""
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


@pytest.fixture(scope="module")
def both() -> dict[str, PreTrainedModel]:
    return {"policy": tiny_model(0), "guide": tiny_model(1)}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Eleven words: <pad>, b to j, <eos>."""
    names = ["<pad>", *"bcdefghij", "<eos>"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """1 to 4 tokens each, two samples of every prompt, places in no order."""
    rng = np.random.default_rng(0)
    places = [7, 2, 5, 0, 6, 1, 4, 3]
    tokens = {place: rng.integers(1, 10, size=1 + place % 4).tolist() for place in places}
    return [
        Prompt(f"prompt {place}", tokens[place], place, number, {"row": place}) for place in places for number in (0, 1)
    ]


@torch.no_grad()
def drawn(model: PreTrainedModel, start: list[int], numbers: np.ndarray, ends: set[int]) -> tuple[list, list, str]:
    """Tokens, log-probs and ending of one response by full passes in float64, at temperature 0.7."""
    tokens, logprobs = [], []
    for u in numbers.tolist():
        logits = model(input_ids=torch.tensor([start + tokens])).logits[0, -1].double() / 0.7
        weights = logits.softmax(-1).tolist()
        edges = list(itertools.accumulate(weights))
        assert min(abs(edge - u) for edge in edges[:-1]) > 1e-6  # else rounding may decide: take another seed
        tokens.append(min(bisect.bisect_left(edges, u), len(edges) - 1))
        logprobs.append(math.log(weights[tokens[-1]]))
        if tokens[-1] in ends:
            return tokens, logprobs, "eos"
    return tokens, logprobs, "length"


def rows(rollout: Rollout, values: torch.Tensor) -> list[list]:
    """The values under the mask, which is true from the left and nowhere else."""
    lengths = rollout.mask.sum(-1).tolist()
    assert rollout.mask.tolist() == [[t < length for t in range(rollout.mask.shape[1])] for length in lengths]
    assert not values.masked_select(~rollout.mask).any()
    return [row[:length].tolist() for row, length in zip(values, lengths, strict=True)]


def collected(models, tokenizer, prompts, plan=None, ends=frozenset({EOS}), settings=SETTINGS) -> Rollout:
    return collect(models, tokenizer, prompts, settings, ends, SEED, Stream.rollout, ITERATION, plan)


def test_by_default_the_policy_draws_everything_by_numbers_of_its_own(both, words, prompts):
    rollout = collected(both, words, prompts)
    numbers = uniforms(SEED, Stream.rollout, ITERATION, [(p.place, p.sample) for p in prompts], LENGTH)
    expected = [drawn(both["policy"], p.token_ids, u, {EOS}) for p, u in zip(prompts, numbers, strict=True)]
    assert rows(rollout, rollout.response_ids) == [tokens for tokens, _, _ in expected]
    for found, (_, logprobs, _) in zip(rows(rollout, rollout.sampler_logprobs), expected, strict=True):
        assert found == pytest.approx(logprobs, rel=1e-5, abs=1e-6)
    assert rollout.endings == [ending for _, _, ending in expected]
    assert set(rollout.endings) == {"eos", "length"} and not rollout.prefix_mask.any()
    assert rollout.groups.tolist() == [p.place for p in prompts]
    assert (rollout.prompts, rollout.columns) == ([p.text for p in prompts], [p.columns for p in prompts])
    shown = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert shown == [p.token_ids for p in prompts] and rollout.prompt_mask[:, -1].all()


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_a_prefix_of_what_rolls_in_is_completed_by_what_rolls_out(both, words, prompts, probability):
    rollout = collected(both, words, prompts, RolloutPlan("guide", "policy", probability))
    responses, logprobs = rows(rollout, rollout.response_ids), rows(rollout, rollout.sampler_logprobs)
    kept, whole, over = 0, 0, 0
    for i, prompt in enumerate(prompts):
        key = (prompt.place, prompt.sample)
        into, out = (uniforms(SEED, s, ITERATION, [key], LENGTH)[0] for s in (Stream.roll_in, Stream.rollout))
        rolled, rolled_logprobs, _ = drawn(both["guide"], prompt.token_ids, into, {EOS})
        cut = int(rollout.prefix_mask[i].sum())
        assert rollout.prefix_mask[i].tolist() == [t < cut for t in range(rollout.mask.shape[1])]
        # the numbers of the cut: whether, and where in 1 … len − 1
        rng = generator(SEED, Stream.roll_in_cut, ITERATION, *key)
        wanted = rng.random() < probability
        assert cut == (int(rng.integers(1, len(rolled))) if wanted and len(rolled) > 1 else 0)
        prefix, done = rolled[:cut], drawn(both["policy"], prompt.token_ids + rolled[:cut], out, {EOS})
        assert responses[i] == (prefix + done[0])[:LENGTH]
        expected = (rolled_logprobs[:cut] + done[1])[:LENGTH]
        assert logprobs[i] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        cut_off = cut + len(done[0]) > LENGTH
        assert rollout.endings[i] == ("length" if cut_off else done[2])
        kept, whole, over = kept + (cut > 0), whole + (wanted and len(rolled) == 1), over + cut_off
    # There was something of each kind: a prefix, a sequence too short for one, a completion over the limit.
    assert kept and over and (whole or probability < 1)
    if probability < 1:
        assert kept < N - 2


def test_prefixes_are_of_every_length_but_the_whole_alike_often(both, words):
    prompts = [Prompt("", [1 + place % 9], place, 0, {}) for place in range(600)]
    settings = replace(SETTINGS, max_new_tokens=4, microbatch_size=600)
    plan = RolloutPlan("guide", "policy", 1.0)
    whole = collected(both, words, prompts, plan, frozenset(), settings)
    # 600 of lengths 1, 2, 3: 200 each, with a deviation of √(600 · ⅓ · ⅔) = 11.5
    counts = np.bincount(whole.prefix_mask.sum(-1).numpy(), minlength=5)
    assert counts[0] == counts[4] == 0 and all(abs(count - 200) < 35 for count in counts[1:4])
    half = collected(both, words, prompts, replace(plan, rollin_probability=0.25), frozenset(), settings)
    # a quarter of 600 is 150, with a deviation of √(600 · ¼ · ¾) = 10.6
    assert abs(int(half.prefix_mask[:, 0].sum()) - 150) < 32
    where = half.prefix_mask[:, 0]
    assert torch.equal(half.prefix_mask[where], whole.prefix_mask[where])  # the same cuts, where there are any


@pytest.mark.parametrize("limit", [1, 2])
def test_a_sequence_of_one_token_has_no_prefix(both, words, prompts, limit):
    settings = replace(SETTINGS, max_new_tokens=limit)
    plan = RolloutPlan("guide", "policy", 1.0)
    rollout = collected(both, words, prompts, plan, frozenset(), settings)
    assert rollout.prefix_mask.sum(-1).tolist() == [limit - 1] * N
    without = collected(both, words, prompts, None, frozenset(), settings)
    assert torch.equal(rollout.response_ids, without.response_ids) is (limit == 1)


def test_a_stop_string_that_begins_in_the_prefix_ends_the_response(both, words):
    """With `e f` a stop string: 4, the last token of a prefix, and 5, the first one that completes it."""
    prompts = [Prompt("", [1 + place % 9], place, 0, {}) for place in range(200)]
    settings, plan = replace(SETTINGS, stop_strings=["e f"], microbatch_size=200), RolloutPlan("guide", "policy", 1.0)
    rollout = collected(both, words, prompts, plan, settings=settings)
    prefixes, joined = rollout.prefix_mask.sum(-1).tolist(), 0
    for cut, tokens, ending in zip(prefixes, rows(rollout, rollout.response_ids), rollout.endings, strict=True):
        if cut and tokens[cut - 1 : cut + 1] == [4, 5]:
            assert (len(tokens), ending) == (cut + 1, "stop")
            joined += 1
    assert joined


def test_prefixes_and_completions_are_joined_and_cut_at_the_limit(words):
    """The limit is 6: 2 + 3 tokens, 3 + 3 with the end on the last place, 4 + 3 one too many, 0 + 2, 5 + 6."""
    prefixes = [[1, 2], [3, 4, 5], [6, 7, 8, 9], [], [1, 2, 3, 4, 5]]
    completions = [[3, 4, 5], [6, 7, EOS], [1, 2, EOS], [8, EOS], [6, 7, 8, 9, 1, 2]]
    prompts = [Prompt("p", [1] * (1 + i % 3), i, 0, {}) for i in range(5)]
    numbers = itertools.count(1)
    before, after = ([[-next(numbers) / 8 for _ in row] for row in part] for part in (prefixes, completions))
    drawn = Sampled(completions, after, ["stop", "eos", "eos", "eos", "length"])
    rollout = assembled(words, prompts, prefixes, before, drawn, SETTINGS)
    assert rows(rollout, rollout.response_ids) == [
        [1, 2, 3, 4, 5],
        [3, 4, 5, 6, 7, EOS],
        [6, 7, 8, 9, 1, 2],
        [8, EOS],
        [1, 2, 3, 4, 5, 6],
    ]
    # The prefixes' log-probs are −1/8 … −14/8 in order, the completions' go on from −15/8.
    eighths = [[round(-8 * x) for x in row] for row in rows(rollout, rollout.sampler_logprobs)]
    assert eighths == [
        [1, 2, 15, 16, 17],
        [3, 4, 5, 18, 19, 20],
        [6, 7, 8, 9, 21, 22],
        [24, 25],
        [10, 11, 12, 13, 14, 26],
    ]
    assert rollout.endings == ["stop", "eos", "length", "eos", "length"]
    assert rollout.prefix_mask.sum(-1).tolist() == [2, 3, 4, 0, 5]
    assert not (rollout.prefix_mask & ~rollout.mask).any()
    # Words are joined by spaces; the second and the fourth lose their end, the third keeps what is not one.
    assert [text.split() for text in rollout.responses] == [
        ["b", "c", "d", "e", "f"],
        ["d", "e", "f", "g", "h"],
        ["g", "h", "i", "j", "b", "c"],
        ["i"],
        ["b", "c", "d", "e", "f", "g"],
    ]
