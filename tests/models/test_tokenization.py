"""Special tokens that tokenizers add, cuts at whole characters, texts that get shorter, the end of a chat's turn."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from apa_cli.models.tokenization import (
    cut_left,
    decode_continuation,
    decode_tokens,
    drop_first_tokens,
    encode_text,
    find_added_tokens,
    find_special_tokens,
    find_turn_end,
)
from tests.builders import EOS, build_word_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_byte_tokenizer(template: str = "$A", **options) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and four special tokens; `template` is its post-processor's."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@pytest.fixture(scope="module")
def llama(shared):
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama-spm32k")


# Text to tokens


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("$A", [], []), ("<s> $A", [0], []), ("$A </s>", [], [1]), ("<s> $A </s>", [0], [1])],
)
def test_a_prompt_keeps_the_bos_that_the_tokenizer_adds_and_loses_the_eos(template, before, after):
    tokenizer = build_byte_tokenizer(template, bos_token="<s>", eos_token="</s>")
    assert find_added_tokens(tokenizer) == (before, after)
    ids = encode_text(tokenizer, "ab")
    assert ids == before + tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert ids + after == tokenizer("ab")["input_ids"]
    assert encode_text(tokenizer, "<s>ab") == [0, *ids[len(before) :]]  # not twice
    assert encode_text(tokenizer, "") == [0]  # a model needs a token to read


def test_a_cut_keeps_bos_and_begins_with_a_whole_character():
    """é is the bytes 195 and 169; each byte is a token."""
    tokenizer = build_byte_tokenizer("<s> $A", bos_token="<s>")
    ids = encode_text(tokenizer, "aéb")
    assert len(ids) == 5 and cut_left(tokenizer, ids, 5) == ids
    assert [decode_tokens(tokenizer, cut_left(tokenizer, ids, count)) for count in (4, 3, 2)] == ["éb", "b", "b"]
    assert all(cut_left(tokenizer, ids, count)[0] == 0 for count in (4, 3, 2))
    assert cut_left(tokenizer, ids, 1) == ids[-1:]  # no room for BOS and a token of the text
    assert cut_left(build_byte_tokenizer(), ids[1:], 2) == ids[-1:]


def test_a_cut_within_a_run_of_bytes_leaves_the_other_characters_whole(llama):
    """The bytes of 鑫 are three tokens each, which this tokenizer decodes as one run."""
    ids = encode_text(llama, "鑫" * 6)
    assert llama.decode(ids[-8:], skip_special_tokens=True) == "\ufffd" * 8
    assert decode_tokens(llama, cut_left(llama, ids, 9)) == "鑫鑫"


@pytest.mark.parametrize(
    "text", ["1234567890" * 20, "鑫好" * 30, "I'm fine, thank you. " * 9, "  \n x  ", "é\u0301" * 9]
)
def test_a_text_always_gets_shorter(text, llama, shared):
    wordpiece = AutoTokenizer.from_pretrained(shared / "rewards" / "bert-tiny-toxicity")
    for tokenizer in (llama, wordpiece, build_byte_tokenizer(), build_word_tokenizer()):
        rest = text
        while rest:
            shorter = drop_first_tokens(tokenizer, rest, 1)
            assert len(shorter) < len(rest) and text.endswith(shorter)
            rest = shorter


def test_a_text_loses_its_first_tokens():
    tokenizer = build_byte_tokenizer()
    assert drop_first_tokens(tokenizer, "aéb", 1) == "éb"
    assert drop_first_tokens(tokenizer, "aéb", 2) == "b"  # with the rest of the character
    assert drop_first_tokens(tokenizer, "aéb", 9) == ""


# Tokens to text


def test_tokens_are_decoded_as_they_continue_a_text(llama):
    ids = llama.convert_tokens_to_ids(["▁so", "▁on"])
    assert (llama.decode(ids), decode_continuation(llama, ids)) == ("so on", " so on")
    assert decode_continuation(llama, []) == ""
    words = build_word_tokenizer()
    assert decode_continuation(words, [1, 2]) == " b c" and decode_continuation(words, [EOS]) == ""


# The end of a turn


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}[{{ m.content }}]{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}", "</s>"),
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('only one turn') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_the_special_token_that_follows_the_reply(template, end):
    tokenizer = build_byte_tokenizer(eos_token="</s>")
    tokenizer.chat_template = template
    assert find_turn_end(tokenizer) == (None if end is None else find_special_tokens(tokenizer)[end])


def test_another_template_of_the_same_tokenizer_has_its_own_end():
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = CHATML
    assert find_turn_end(tokenizer) == 3
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    assert find_turn_end(tokenizer) == 1
