"""Rows as tokens: plain text or a chat template, cut to fit; what the reward sees of either."""

import pytest
from transformers import AutoTokenizer

from apa_cli.datasets.base import PromptForm
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


def row(prompt=HH, messages=MESSAGES, chosen=" Better."):
    return Example(prompt, chosen, None, {"topic": "health"}, messages)


def seen(tokenizer, form, example, longest=100):
    prompt, cut = PromptFormat(tokenizer, form).prompt(example, place=3, sample=1, longest=longest)
    return tokenizer.decode(prompt.token_ids), prompt.text, cut


@pytest.mark.parametrize(
    ("form", "messages", "template", "chat"),
    [
        (PromptForm.auto, MESSAGES, TEMPLATE, True),
        (PromptForm.auto, None, TEMPLATE, False),
        (PromptForm.auto, MESSAGES, None, False),
        (PromptForm.hh, MESSAGES, TEMPLATE, False),
        (PromptForm.chat, None, TEMPLATE, True),
    ],
)
def test_which_rows_the_template_renders(form, messages, template, chat, tokenizer):
    tokenizer.chat_template = template
    policy, reward, cut = seen(tokenizer, form, row(messages=messages))
    if chat:
        assert policy == "<user>How are you?;<assistant>Fine.;<user>And now?;<assistant>"
        assert reward == HH + " "  # so that with the reply, which begins without a space, it reads as in HH
    else:
        assert policy == reward == HH
    assert not cut


def test_place_sample_and_columns_are_passed_on(tokenizer):
    prompt, _ = PromptFormat(tokenizer, PromptForm.auto).prompt(row(), place=3, sample=1, longest=100)
    assert (prompt.place, prompt.sample, prompt.columns) == (3, 1, {"topic": "health"})


def test_a_plain_prompt_becomes_one_user_message(tokenizer):
    policy, reward, _ = seen(tokenizer, PromptForm.chat, row("Say hello.", None))
    assert policy == "<user>Say hello.;<assistant>"
    assert reward == "\n\nHuman: Say hello.\n\nAssistant: "


def test_turns_of_one_role_in_a_row_are_one(tokenizer):
    twice = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    assert seen(tokenizer, PromptForm.auto, row(messages=twice))[0] == "<user>One.\n\nTwo.;<assistant>"


def test_a_plain_prompt_loses_tokens_on_the_left(tokenizer):
    whole = tokenizer(HH)["input_ids"]
    for longest in (len(whole), len(whole) - 1, 4):
        prompt, cut = PromptFormat(tokenizer, PromptForm.hh).prompt(row(), 0, 0, longest)
        assert prompt.token_ids == whole[-longest:] and cut == (longest < len(whole))
        assert prompt.text == tokenizer.decode(whole[-longest:])


def test_a_chat_loses_its_earliest_turns_then_the_beginning_of_the_last(tokenizer):
    system = [{"role": "system", "content": "Be kind."}]
    example = row(messages=system + MESSAGES)
    whole = len(
        tokenizer("<system>Be kind.;<user>How are you?;<assistant>Fine.;<user>And now?;<assistant>")["input_ids"]
    )
    assert not seen(tokenizer, PromptForm.auto, example, whole)[2]
    policy, reward, cut = seen(tokenizer, PromptForm.auto, example, whole - 1)
    assert cut and policy == "<system>Be kind.;<user>And now?;<assistant>"
    assert reward == "Be kind.\n\nHuman: And now?\n\nAssistant: "
    one_turn = len(tokenizer("<system>Be kind.;<user>And now?;<assistant>")["input_ids"])
    policy, reward, cut = seen(tokenizer, PromptForm.auto, example, one_turn - 1)
    content = policy.removeprefix("<system>Be kind.;<user>").removesuffix(";<assistant>")
    assert cut and "And now?".endswith(content) and 0 < len(content) < len("And now?")
    assert reward == f"Be kind.\n\nHuman: {content}\n\nAssistant: "
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        seen(tokenizer, PromptForm.auto, example, 5)


def test_the_target_of_a_chat_ends_with_eos_and_begins_without_a_space(tokenizer):
    ids, flags = PromptFormat(tokenizer, PromptForm.auto).target(row(), longest=100)
    assert tokenizer.decode([i for i, flag in zip(ids, flags, strict=True) if flag]) == f"Better.{tokenizer.eos_token}"
    prompt = [i for i, flag in zip(ids, flags, strict=True) if not flag]
    assert tokenizer.decode(prompt) == "<user>How are you?;<assistant>Fine.;<user>And now?;<assistant>"
    assert ids[-1] == tokenizer.eos_token_id


def test_a_chat_form_needs_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"^dataset\.format: chat needs"):
        PromptFormat(tokenizer, PromptForm.chat)


def test_what_the_template_refuses_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(UserError, match=r"^dataset: the tokenizer's chat template refuses") as error:
        seen(tokenizer, PromptForm.auto, row())
    assert "\n" not in str(error.value)
