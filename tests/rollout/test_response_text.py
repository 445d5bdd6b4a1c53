"""The text of a response, and stop strings: what the sampler finds and what is cut from the scored text is the same."""

import random

import pytest
from transformers import AutoTokenizer

from apa_cli.errors import ConfigError
from apa_cli.models.tokenization import decode_continuation
from apa_cli.rollout.response_text import StopSearch, check_stop_strings, read_response
from tests.builders import PAD, build_word_tokenizer

TOKENIZERS = {
    "llama": "tokenizers/llama-spm32k",  # bytes of rare characters are tokens, which are decoded together
    "stories": "models/stories260k",  # 512 tokens, hence many bytes
    "gptj": "tokenizers/gptj",  # every token is a piece of bytes
    "gpt_neox": "tokenizers/gpt-neox-pythia",
    "wordpiece": "rewards/bert-tiny-toxicity",
}


@pytest.fixture(scope="module")
def load(shared):
    """load(name) → a real tokenizer."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(shared / TOKENIZERS[name])
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def byte_level(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def tokenize(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read_text(tokenizer, response: str, ending: str = "length", stop_strings=()):
    """Return the scored text of the tokens of `response`."""
    return read_response(tokenizer, tokenize(tokenizer, response), ending, list(stop_strings))[2]


def find_end(tokenizer, tokens: list[int], strings: list[str]) -> int | None:
    """Return the number of tokens at which the sampler ends the response; None if it does not."""
    search = StopSearch(tokenizer, strings)
    return next((count for count, token in enumerate(tokens, 1) if search.add(token)), None)


# The text


def test_a_text_is_stripped_on_the_right_only(byte_level):
    assert read_text(byte_level, "  Yes, I do. \n\n ") == "  Yes, I do."
    assert read_text(byte_level, "\n Yes") == "\n Yes"


def test_the_end_token_is_not_in_the_text_also_if_it_is_an_ordinary_token(byte_level):
    tokens = byte_level(" Yes!")["input_ids"]
    assert byte_level.decode(tokens[-1:]) == "!"  # an ordinary token; a special one is not decoded anyway
    for ending, text in (("eos", " Yes"), ("length", " Yes!"), ("stop", " Yes!")):
        assert read_response(byte_level, tokens, ending, []) == (len(tokens), ending, text)
    eos = byte_level.eos_token_id
    assert read_response(byte_level, [*tokens, eos], "eos", [])[2] == " Yes!"
    assert read_response(byte_level, [eos], "eos", [])[2] == ""


def test_the_first_space_is_kept_by_a_tokenizer_that_drops_that_of_a_text(load):
    tokenizer = load("llama")
    tokens = tokenizer.convert_tokens_to_ids(["▁Yes", ",", "▁I", "▁do"])
    assert tokenizer.decode(tokens) == "Yes, I do"
    assert read_response(tokenizer, tokens, "length", [])[2] == " Yes, I do"
    assert read_response(tokenizer, tokens[2:], "length", [])[2] == " I do"
    assert read_response(tokenizer, tokenizer.convert_tokens_to_ids(["Y", "es"]), "length", [])[2] == "Yes"


@pytest.mark.parametrize("strings", [[], ["Human:"]])
@pytest.mark.parametrize("name", ["llama", "stories", "gptj"])
def test_whole_characters_stay_also_next_to_a_character_that_was_cut(name, strings, load):
    """鑫 and 梦 are 3 bytes each; a response may end at the length limit after two of them."""
    tokenizer = load(name)
    tokens = tokenize(tokenizer, "a鑫鑫")
    assert len(tokens) >= 6 and tokenizer.decode(tokens[-2:]) != "鑫"
    assert read_response(tokenizer, tokens, "length", strings)[2].strip() == "a鑫鑫"
    assert read_response(tokenizer, tokens[:-1], "length", strings)[2].strip().rstrip("\ufffd") == "a鑫"


# Stop strings


@pytest.mark.parametrize("stop_strings", [["Human:", "Assistant:"], ["Assistant:", "Human:"], ["", "Assistant:", "x"]])
def test_the_first_stop_string_in_the_text_cuts_it(byte_level, stop_strings):
    response = " No. \n\nAssistant: Yes.\n\nHuman: Sure? Assistant:"
    assert read_text(byte_level, response, "stop", stop_strings) == " No."


def test_a_stop_string_cuts_at_any_place_and_with_any_ending(byte_level):
    assert read_text(byte_level, "Human: Hi", "length", ["Human:"]) == ""
    assert read_text(byte_level, " A human. Human:", "stop", ["human:", "Human:"]) == " A human."
    assert read_text(byte_level, " Yes", "length", ["Human:"]) == " Yes"


@pytest.mark.parametrize(
    ("strings", "tokens", "expected"),
    [
        ([], [4, 5], None),
        ([""], [4, 5], None),  # the empty string is in every text, and is ignored
        (["e f"], [4], None),
        (["e f"], [4, 5], 2),
        (["e f"], [5, 4], None),
        (["e f"], [1] * 100 + [4, 5, 1], 102),
        (["j j", "e f"], [4, 5], 2),  # any of several
        (["e f"], [4, PAD, 5, 1], 3),  # special tokens are not in the text
        ([" e"], [4, 4], 1),  # the space before the first token counts
        (["e f", " ".join("bcdefghijbcde")], [*range(1, 10), 1, 2, 3, 4], 5),
        ([" ".join("bcdefghijbcde")], [*range(1, 10), 1, 2, 3, 4, 9], 13),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(strings, tokens, expected):
    tokenizer = build_word_tokenizer()
    assert find_end(tokenizer, tokens, strings) == expected
    ending = "length" if expected is None else "stop"
    assert read_response(tokenizer, tokens, "length", strings)[:2] == (expected or len(tokens), ending)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_sampler_and_the_scored_text_agree_on_random_texts(name, load):
    """The sampler ends a response at the first token with which the whole decoded text contains a stop string.

    Texts are of random characters; a quarter has tokens of the vocabulary in between, as a model may sample.
    """
    tokenizer, rng = load(name), random.Random(0)
    parts = [*"abc AB.,!'\n", "the ", "Human:", " not", "'m", "é", "鑫", "好", "梦", "😀", "🇩🇪", "가", "ع", "  ", "12"]
    found, size = 0, len(tokenizer)
    for trial in range(120):
        tokens = tokenize(tokenizer, "".join(rng.choice(parts) for _ in range(rng.randint(1, 12))))
        if trial % 4 == 0:
            tokens.insert(rng.randrange(len(tokens) + 1), rng.randrange(size))
        if not tokens or set(tokens) & set(tokenizer.all_special_ids):
            continue
        texts = [decode_continuation(tokenizer, tokens[:count]) for count in range(1, len(tokens) + 1)]
        start = rng.randrange(len(texts[-1]) or 1)
        strings = [texts[-1][start : start + rng.randint(1, 5)], rng.choice(parts)]
        strings = [string for string in strings if "\ufffd" not in string and string]
        expected = next((i for i, text in enumerate(texts, 1) if any(string in text for string in strings)), None)
        assert find_end(tokenizer, tokens, strings) == expected, (tokens, strings)
        count, ending, text = read_response(tokenizer, tokens, "length", strings)
        assert (count, ending) == ((len(tokens), "length") if expected is None else (expected, "stop"))
        assert not any(string in text for string in strings)
        found += expected is not None
    assert found > 30


@pytest.mark.parametrize("string", ["👩‍👩‍👧", " Human", "鑫好", "\n\n", "  x"])
@pytest.mark.parametrize("name", ["llama", "stories", "gptj"])
def test_stop_strings_of_many_tokens_or_with_a_space_first(name, string, load):
    """An emoji of five code points is up to 25 byte tokens."""
    tokenizer = load(name)
    before, after = tokenize(tokenizer, f"I say{string}"), tokenize(tokenizer, "b more")
    count, ending, text = read_response(tokenizer, before + after, "length", [string])
    assert (count, ending, text.strip()) == (len(before), "stop", "I say")
    assert find_end(tokenizer, before + after, [string]) == len(before)


@pytest.mark.parametrize("string", ["</s>", "</s>\n"])
def test_a_special_token_as_stop_string_is_found_as_that_token(string, load):
    tokenizer = load("llama")
    tokens = [*tokenize(tokenizer, "Yes"), 2, *tokenize(tokenizer, "No")]
    check_stop_strings(tokenizer, [string, "Human:"])
    assert find_end(tokenizer, tokens, [string]) == 2
    assert read_response(tokenizer, tokens, "length", [string]) == (2, "stop", " Yes")


def test_a_stop_string_with_a_special_token_among_other_text_is_refused(load):
    with pytest.raises(ConfigError, match=r"^sampling\.stop_strings: 'Bye</s>' is never found.*give '</s>' alone"):
        check_stop_strings(load("llama"), ["Bye</s>"])
