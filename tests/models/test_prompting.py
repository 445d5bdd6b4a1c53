"""Encoding of rows as plain text or through a chat template, truncation, SFT's targets, and the text for rewards."""

import pytest
from transformers import AutoTokenizer

from apa_cli.datasets.base import PromptStyle
from apa_cli.errors import ConfigError, UserError
from apa_cli.models.prompting import PromptFormat
from apa_cli.types import Example

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HH = "\n\nHuman: How are you?\n\nAssistant: Fine.\n\nHuman: And now?\n\nAssistant:"
MESSAGES = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "And now?"},
]


@pytest.fixture
def tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_row(prompt=HH, messages=MESSAGES, chosen=" Better."):
    return Example(prompt, chosen, None, {"topic": "health"}, messages)


def encode(tokenizer, style, example, max_tokens=100):
    prompt, is_truncated = PromptFormat(tokenizer, style).encode_prompt(
        example, place=3, sample=1, max_tokens=max_tokens
    )
    return tokenizer.decode(prompt.token_ids), prompt.text, is_truncated


@pytest.mark.parametrize(
    ("style", "messages", "template", "chat"),
    [
        (PromptStyle.auto, MESSAGES, TEMPLATE, True),
        (PromptStyle.auto, None, TEMPLATE, False),
        (PromptStyle.auto, MESSAGES, None, False),
        (PromptStyle.hh, MESSAGES, TEMPLATE, False),
        (PromptStyle.chat, None, TEMPLATE, True),
    ],
)
def test_rows_that_go_through_the_template(style, messages, template, chat, tokenizer):
    tokenizer.chat_template = template
    policy, reward, is_truncated = encode(tokenizer, style, make_row(messages=messages))
    if chat:
        assert policy == "<user>How are you?;<assistant>Fine.;<user>And now?;<assistant>"
        assert reward == HH + " "  # a space, since a chat's reply begins without one
    else:
        assert policy == reward == HH
    assert not is_truncated


def test_place_sample_and_columns_are_copied(tokenizer):
    prompt, _ = PromptFormat(tokenizer, PromptStyle.auto).encode_prompt(make_row(), place=3, sample=1, max_tokens=100)
    assert (prompt.place, prompt.sample, prompt.columns) == (3, 1, {"topic": "health"})


def test_a_plain_prompt_becomes_one_user_message(tokenizer):
    policy, reward, _ = encode(tokenizer, PromptStyle.chat, make_row("Say hello.", None))
    assert policy == "<user>Say hello.;<assistant>"
    assert reward == "\n\nHuman: Say hello.\n\nAssistant: "


def test_consecutive_turns_of_one_role_are_joined(tokenizer):
    twice = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    assert encode(tokenizer, PromptStyle.auto, make_row(messages=twice))[0] == "<user>One.\n\nTwo.;<assistant>"


def test_a_plain_prompt_is_truncated_on_the_left(tokenizer):
    full = tokenizer(HH)["input_ids"]
    for max_tokens in (len(full), len(full) - 1, 4):
        prompt, is_truncated = PromptFormat(tokenizer, PromptStyle.hh).encode_prompt(make_row(), 0, 0, max_tokens)
        assert prompt.token_ids == full[-max_tokens:] and is_truncated == (max_tokens < len(full))
        assert prompt.text == tokenizer.decode(full[-max_tokens:])


def test_a_chat_loses_its_earliest_turns_then_the_start_of_the_last_turn(tokenizer):
    system = [{"role": "system", "content": "Be kind."}]
    example = make_row(messages=system + MESSAGES)
    full = len(
        tokenizer("<system>Be kind.;<user>How are you?;<assistant>Fine.;<user>And now?;<assistant>")["input_ids"]
    )
    assert not encode(tokenizer, PromptStyle.auto, example, full)[2]
    policy, reward, is_truncated = encode(tokenizer, PromptStyle.auto, example, full - 1)
    assert is_truncated and policy == "<system>Be kind.;<user>And now?;<assistant>"
    assert reward == "Be kind.\n\nHuman: And now?\n\nAssistant: "
    one_turn = len(tokenizer("<system>Be kind.;<user>And now?;<assistant>")["input_ids"])
    policy, reward, is_truncated = encode(tokenizer, PromptStyle.auto, example, one_turn - 1)
    content = policy.removeprefix("<system>Be kind.;<user>").removesuffix(";<assistant>")
    assert is_truncated and "And now?".endswith(content) and 0 < len(content) < len("And now?")
    assert reward == f"Be kind.\n\nHuman: {content}\n\nAssistant: "
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        encode(tokenizer, PromptStyle.auto, example, 5)


QUESTION, REPLY = "\n\nHuman: How long does it take?\n\nAssistant:", " It takes about three hours."


def encode_target(tokenizer, max_tokens: int):
    """Return the token ids of QUESTION and REPLY as plain text, and for each token if it is one of the reply."""
    example = make_row(QUESTION, None, REPLY)
    return PromptFormat(tokenizer, PromptStyle.hh).encode_target(example, max_tokens)


def test_the_target_is_the_reply_and_eos(tokenizer):
    ids, flags = encode_target(tokenizer, max_tokens=100)
    prompt = tokenizer(QUESTION)["input_ids"]
    assert ids[: len(prompt)] == prompt and not any(flags[: len(prompt)]) and all(flags[len(prompt) :])
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[len(prompt) : -1]) == REPLY
    assert len(ids) == len(flags)


def test_a_long_dialogue_loses_prompt_tokens_on_the_left(tokenizer):
    whole, flags = encode_target(tokenizer, max_tokens=100)
    reply = sum(flags)
    for max_tokens in (len(whole), len(whole) - 1, reply + 3, reply + 1):
        ids, cut_flags = encode_target(tokenizer, max_tokens)
        assert ids == whole[-max_tokens:] and sum(cut_flags) == reply and cut_flags == flags[-max_tokens:]


def test_a_long_reply_is_cut_and_has_no_eos(tokenizer):
    whole, flags = encode_target(tokenizer, max_tokens=100)
    prompt, reply = whole[: -sum(flags)], whole[-sum(flags) :]
    max_tokens = 4
    ids, cut_flags = encode_target(tokenizer, max_tokens)
    # The last token of the prompt, which predicts the first of the reply, and the reply's first three.
    assert ids == [prompt[-1], *reply[:3]] and cut_flags == [False, True, True, True]
    assert tokenizer.eos_token_id not in ids


def test_the_target_of_a_chat_ends_with_eos_and_begins_without_a_space(tokenizer):
    ids, flags = PromptFormat(tokenizer, PromptStyle.auto).encode_target(make_row(), max_tokens=100)
    assert tokenizer.decode([i for i, flag in zip(ids, flags, strict=True) if flag]) == f"Better.{tokenizer.eos_token}"
    prompt = [i for i, flag in zip(ids, flags, strict=True) if not flag]
    assert tokenizer.decode(prompt) == "<user>How are you?;<assistant>Fine.;<user>And now?;<assistant>"
    assert ids[-1] == tokenizer.eos_token_id


def test_style_chat_needs_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"^dataset\.format: chat needs"):
        PromptFormat(tokenizer, PromptStyle.chat)


def test_a_template_error_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(UserError, match=r"^dataset: the tokenizer's chat template refuses") as error:
        encode(tokenizer, PromptStyle.auto, make_row())
    assert "\n" not in str(error.value)
