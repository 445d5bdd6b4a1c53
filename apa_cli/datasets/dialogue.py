"""Dialogues as text in the form of Anthropic's HH data, and as messages, {"role", "content"} each."""

from __future__ import annotations

import re

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MARKERS = {"user": HUMAN, "assistant": ASSISTANT}


def parse_dialogue(text: str) -> list[dict[str, str]]:
    """The turns of a dialogue, without the space that begins each; text before the first turn is a system message.

    A marker of the assistant's at the very end asks for a reply and is no turn. Turns of one role may follow each
    other, as they do in a few of HH's dialogues.
    """
    system, *turns = re.split(f"({HUMAN}|{ASSISTANT})", text.removesuffix(ASSISTANT))
    messages = [{"role": "system", "content": system}] if system else []
    roles = {marker: role for role, marker in MARKERS.items()}
    for marker, said in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": roles[marker], "content": said.removeprefix(" ")})
    return messages


def dialogue_text(messages: list[dict[str, str]]) -> str:
    """The messages as plain text that ends in "\\n\\nAssistant:", what a system message says in front of all turns.

    The inverse of `parse_dialogue` for prompts whose turns begin with a space, as all of HH's do.
    """
    system = [message["content"] for message in messages if message["role"] == "system"]
    turns = [f"{MARKERS[m['role']]} {m['content']}" for m in messages if m["role"] != "system"]
    return "".join([*system, *turns, ASSISTANT])


def split_reply(text: str) -> tuple[str, str]:
    """A whole dialogue as (prompt, reply): up to and including the last "\\n\\nAssistant:", and what follows it."""
    before, marker, reply = text.rpartition(ASSISTANT)
    return before + marker, reply


def spaced(reply: str) -> str:
    """The reply as it follows a prompt: with one space in front, unless it begins with white space."""
    return reply if reply[:1].isspace() else f" {reply}"
