"""Dialogues as text and as messages."""

import pytest

from apa_cli.datasets.dialogue import dialogue_text, parse_dialogue, spaced, split_reply


def said(role, content):
    return {"role": role, "content": content}


PROMPTS = {
    "\n\nHuman: Hi\n\nAssistant:": [said("user", "Hi")],
    "\n\nHuman: Hi\n\nAssistant: Hello.\n\nAs they say\n\nHuman:  Two spaces \n\nAssistant:": [
        said("user", "Hi"),
        said("assistant", "Hello.\n\nAs they say"),
        said("user", " Two spaces "),
    ],
    "Be kind.\n\nHuman: Hi\n\nAssistant:": [said("system", "Be kind."), said("user", "Hi")],
    "\n\nHuman: Hi\n\nAssistant: One\n\nAssistant: Two\n\nHuman: \n\nAssistant:": [
        said("user", "Hi"),
        said("assistant", "One"),
        said("assistant", "Two"),
        said("user", ""),
    ],
    "\n\nHuman: Is\nHuman: or Assistant: a turn?\n\nAssistant:": [said("user", "Is\nHuman: or Assistant: a turn?")],
    "\n\nAssistant:": [],
}


@pytest.mark.parametrize("text", PROMPTS)
def test_a_prompt_and_its_messages(text):
    assert parse_dialogue(text) == PROMPTS[text]
    assert dialogue_text(PROMPTS[text]) == text


def test_a_whole_dialogue_has_the_reply_as_its_last_turn():
    text = "\n\nHuman: Hi\n\nAssistant: Hello"
    assert parse_dialogue(text) == [said("user", "Hi"), said("assistant", "Hello")]
    assert split_reply(text) == ("\n\nHuman: Hi\n\nAssistant:", " Hello")
    assert split_reply("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c") == (
        "\n\nHuman: a\n\nAssistant: b\n\nAssistant:",
        " c",
    )
    assert split_reply("no dialogue") == ("", "no dialogue")


def test_one_space_goes_before_a_reply_that_begins_with_none():
    assert [spaced(reply) for reply in ("a", " a", "  a", "\na")] == [" a", " a", "  a", "\na"]
