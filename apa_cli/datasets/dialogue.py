"""Dialogues as text in the format of Anthropic's HH data, and as messages {"role", "content"}."""

from __future__ import annotations

import re

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MARKERS = {"user": HUMAN, "assistant": ASSISTANT}
"""role → marker at the start of its turns."""


def parse_dialogue(text: str) -> list[dict[str, str]]:
    """Return the turns of a dialogue without their leading space; text before the first turn is a system message.

    An assistant marker at the very end asks for a reply and is not a turn. Consecutive turns may have the same role,
    as in a few of HH's dialogues.
    """
    system, *turns = re.split(f"({HUMAN}|{ASSISTANT})", text.removesuffix(ASSISTANT))
    messages = [{"role": "system", "content": system}] if system else []
    roles = {marker: role for role, marker in MARKERS.items()}
    for marker, content in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": roles[marker], "content": content.removeprefix(" ")})
    return messages


def format_dialogue(messages: list[dict[str, str]]) -> str:
    """Return the messages as plain text that ends in "\\n\\nAssistant:", with system messages in front of all turns.

    The inverse of `parse_dialogue` for prompts whose turns begin with a space, as all of HH's do.
    """
    system = [message["content"] for message in messages if message["role"] == "system"]
    turns = [f"{MARKERS[m['role']]} {m['content']}" for m in messages if m["role"] != "system"]
    return "".join([*system, *turns, ASSISTANT])


def split_reply(text: str) -> tuple[str, str]:
    """Return a whole dialogue as (prompt, reply), split after the last "\\n\\nAssistant:"."""
    before, marker, reply = text.rpartition(ASSISTANT)
    return before + marker, reply


def add_leading_space(reply: str) -> str:
    """Return the reply as it follows a prompt: with one space in front, unless it begins with white space."""
    return reply if reply[:1].isspace() else f" {reply}"
