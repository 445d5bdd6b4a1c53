"""Encoding of rows as plain text or through a chat template, truncation, SFT's targets, and the text for rewards."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from apa_cli.datasets.base import PromptStyle
from apa_cli.errors import ConfigError, UserError
from apa_cli.models.loading import find_end_token_ids
from apa_cli.models.prompting import PromptFormat
from apa_cli.types import Example
from tests.builders import build_tiny_policy

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
    assert (prompt.place, prompt.sample) == (3, 1)
    assert prompt.columns == {"topic": "health", "messages": MESSAGES}


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
    return PromptFormat(tokenizer, PromptStyle.hh).encode_target(example, max_tokens).row


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
    ids, flags = PromptFormat(tokenizer, PromptStyle.auto).encode_target(make_row(), max_tokens=100).row
    assert tokenizer.decode([i for i, flag in zip(ids, flags, strict=True) if flag]) == f"Better.{tokenizer.eos_token}"
    prompt = [i for i, flag in zip(ids, flags, strict=True) if not flag]
    assert tokenizer.decode(prompt) == "<user>How are you?;<assistant>Fine.;<user>And now?;<assistant>"
    assert ids[-1] == tokenizer.eos_token_id


def test_style_chat_needs_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"^dataset\.format: chat needs"):
        PromptFormat(tokenizer, PromptStyle.chat)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must\nalternate') }}", "{{ messages[0].content + 1 }}", {"rag": "no default"}],
)
def test_a_template_error_is_one_line(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"^dataset: the tokenizer's chat template refuses") as error:
        encode(tokenizer, PromptStyle.auto, make_row())
    assert "\n" not in str(error.value)


# Real and unusual tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "text",
    [
        "Add these up: 1234567890 and 9876543210 and 1000 and 9999999999 and 8888888888 and 7777777777",
        "123456789" * 30,
        "请写一首关于梦想鑫鑫" * 9,
        "Ünïcödé \u0301\u0301 👩‍👩‍👧 " * 9,
        " \n\t  \n" * 40,
        "What does\n\n\nthis   mean ? " * 9,
    ],
)
@pytest.mark.parametrize(
    "name", ["tokenizers/llama-spm32k", "models/stories260k", pytest.param("tokenizers/gptj", marks=pytest.mark.slow)]
)
def test_the_cut_of_a_chat_ends_for_every_text(name, text, shared):
    """Text cut by tokens, decoded and encoded again may be as long as before."""
    tokenizer = AutoTokenizer.from_pretrained(shared / name)
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    prompt_format = PromptFormat(tokenizer, PromptStyle.chat)
    example = Example(text, None, None, {}, [{"role": "user", "content": text}])
    prompt, is_truncated = prompt_format.encode_prompt(example, 0, 0, max_tokens=32)
    (message,) = prompt.columns["messages"]
    assert is_truncated and text.endswith(message["content"]) and message["content"]
    assert prompt.token_ids == prompt_format.render_messages([message]) and 24 <= len(prompt.token_ids) <= 32


def test_a_cut_prompt_keeps_bos_and_whole_characters(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama-spm32k")
    prompt, _ = PromptFormat(tokenizer, PromptStyle.hh).encode_prompt(
        Example("Once, 鑫鑫鑫鑫", None, None, {}), 0, 0, 9
    )
    assert prompt.token_ids[0] == tokenizer.bos_token_id and prompt.text == "鑫鑫"
    assert len(prompt.token_ids) == 7  # BOS and 2 · 3 bytes; the ninth and eighth token are the rest of a character


def test_an_eos_that_the_tokenizer_adds_is_neither_in_prompts_nor_twice_in_targets(tokenizer):
    prompt, reply, eos = tokenizer(HH)["input_ids"], tokenizer(" Better.")["input_ids"], tokenizer.eos_token_id
    special = [(tokenizer.eos_token, eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {tokenizer.eos_token}", special_tokens=special)
    assert tokenizer(HH)["input_ids"] == [*prompt, eos]
    prompt_format = PromptFormat(tokenizer, PromptStyle.hh)
    assert prompt_format.encode_prompt(make_row(), 0, 0, 100)[0].token_ids == prompt
    assert prompt_format.encode_target(make_row(), 100).row[0] == [*prompt, *reply, eos]
    assert prompt_format.encode_response(make_row(), " Better.", 100) == [*reply, eos]


def test_a_reply_ends_as_the_chat_template_ends_a_turn(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat, plain = PromptFormat(tokenizer, PromptStyle.auto), PromptFormat(tokenizer, PromptStyle.hh)
    assert end != tokenizer.eos_token_id
    assert chat.encode_target(make_row(), 100).reply_ids[-1] == chat.encode_response(make_row(), "Yes", 100)[-1] == end
    assert plain.encode_target(make_row(), 100).reply_ids[-1] == tokenizer.eos_token_id
    policy = build_tiny_policy(vocab_size=len(tokenizer))
    assert find_end_token_ids(policy, tokenizer) >= {end, tokenizer.eos_token_id}


def test_a_tokenizer_without_an_end_token_needs_a_template_that_ends_turns(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"^model\.tokenizer: the tokenizer has no end token"):
        PromptFormat(tokenizer, PromptStyle.auto).encode_target(make_row(), 100)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    ids = PromptFormat(tokenizer, PromptStyle.auto).encode_target(make_row(), 100).reply_ids
    assert tokenizer.decode(ids) == "Better.<|im_end|>"


def test_the_target_of_a_long_chat_loses_turns_and_keeps_the_templates_start(tokenizer):
    prompt_format = PromptFormat(tokenizer, PromptStyle.auto)
    whole = prompt_format.encode_target(make_row(), 1000)
    length = len(whole.prompt_ids) + len(whole.reply_ids)
    assert not whole.is_prompt_cut and prompt_format.encode_target(make_row(), length) == whole
    cut = prompt_format.encode_target(make_row(), length - 1)
    assert (cut.is_prompt_cut, cut.is_reply_cut, cut.reply_ids) == (True, False, whole.reply_ids)
    assert tokenizer.decode(cut.prompt_ids) == "<user>And now?;<assistant>"
    # A reply that leaves the template no room keeps the prompt's last tokens.
    few = prompt_format.encode_target(make_row(), 4)
    assert few.prompt_ids == whole.prompt_ids[-1:] and few.reply_ids == whole.reply_ids[:3] and few.is_reply_cut
