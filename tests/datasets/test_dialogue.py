"""Dialogues as text and as messages."""

import pytest

from apa_cli.datasets.dialogue import add_leading_space, format_dialogue, parse_dialogue, split_reply


def turn(role, content):
    return {"role": role, "content": content}


PROMPTS = {
    "\n\nHuman: Hi\n\nAssistant:": [turn("user", "Hi")],
    "\n\nHuman: Hi\n\nAssistant: Hello.\n\nAs they say\n\nHuman:  Two spaces \n\nAssistant:": [
        turn("user", "Hi"),
        turn("assistant", "Hello.\n\nAs they say"),
        turn("user", " Two spaces "),
    ],
    "Be kind.\n\nHuman: Hi\n\nAssistant:": [turn("system", "Be kind."), turn("user", "Hi")],
    "\n\nHuman: Hi\n\nAssistant: One\n\nAssistant: Two\n\nHuman: \n\nAssistant:": [
        turn("user", "Hi"),
        turn("assistant", "One"),
        turn("assistant", "Two"),
        turn("user", ""),
    ],
    "\n\nHuman: Is\nHuman: or Assistant: a turn?\n\nAssistant:": [turn("user", "Is\nHuman: or Assistant: a turn?")],
    "\n\nAssistant:": [],
}


@pytest.mark.parametrize("text", PROMPTS)
def test_prompt_and_messages_convert_into_each_other(text):
    assert parse_dialogue(text) == PROMPTS[text]
    assert format_dialogue(PROMPTS[text]) == text


def test_last_turn_of_a_whole_dialogue_is_the_reply():
    text = "\n\nHuman: Hi\n\nAssistant: Hello"
    assert parse_dialogue(text) == [turn("user", "Hi"), turn("assistant", "Hello")]
    assert split_reply(text) == ("\n\nHuman: Hi\n\nAssistant:", " Hello")
    assert split_reply("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c") == (
        "\n\nHuman: a\n\nAssistant: b\n\nAssistant:",
        " c",
    )
    assert split_reply("no dialogue") == ("", "no dialogue")


def test_a_reply_without_leading_white_space_gets_one_space():
    assert [add_leading_space(reply) for reply in ("a", " a", "  a", "\na")] == [" a", " a", "  a", "\na"]
