"""Message lists of users' rows: OpenAI's {"role", "content"} and ShareGPT's {"from", "value"}."""

from __future__ import annotations

from typing import Any

from apa_cli.datasets.row_file import abbreviate

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""Role in users' data → role here."""

Turns = list[dict[str, str]]
"""Messages, {"role", "content"} each, of system, user or assistant."""


def parse_messages(messages: object, name: str) -> Turns:
    """Return the messages of the field `name` reduced to role and content, roles by the names that are used here.

    Raise ValueError, with a message for the user, if the list, a role or a content is invalid.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a non-empty list of messages, got {abbreviate(messages)}")
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f'{name}: message {number} must be {{"role": …, "content": …}}, got {abbreviate(message)}')
        given = get_first(message, "role", "from")
        role = ROLES.get(given) if isinstance(given, str) else None
        if role is None or (role == "system" and number > 1):
            raise ValueError(
                f"{name}: the role of message {number} must be user, assistant or, in the first message, system, "
                f"got {abbreviate(given)}"
            )
        content = join_parts(get_first(message, "content", "value"), f"{name}: the content of message {number}")
        turns.append({"role": role, "content": content})
    return turns


def get_first(fields: dict[str, Any], *names: str) -> Any:
    """Return the first of these fields that is not null, or None."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def join_parts(content: object, name: str) -> str:
    """Return the text of a message, whose content is a text or a list of {"type": "text", "text"} parts.

    Raise ValueError, which begins with `name`, for an empty text and for parts of another type, such as images.
    """
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{name} has a part of type {abbreviate(kind)}; only text can be read")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{name} must be a non-empty text, got {abbreviate(content)}")
    return content


def split_reply(reply: object, name: str) -> tuple[Turns | None, str | None]:
    """Return the turns before a reply and the reply's text.

    The reply is a text; a message by the assistant, alone or in a list; or a whole dialogue that ends with it. The
    turns are None for a text, [] without turns before the message. Raise ValueError, with a message for the user, if
    the reply is invalid.
    """
    if reply is None or isinstance(reply, str):
        if reply is not None and not reply.strip():
            raise ValueError(f"{name} must be a non-empty text, got {abbreviate(reply)}")
        return None, reply
    if not isinstance(reply, list | dict):
        raise ValueError(f"{name} must be a non-empty text or a list of messages, got {abbreviate(reply)}")
    turns = parse_messages([reply] if isinstance(reply, dict) else reply, name)
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{name}: the last message must be the assistant's, got the role {turns[-1]['role']}")
    return turns[:-1], turns[-1]["content"]
