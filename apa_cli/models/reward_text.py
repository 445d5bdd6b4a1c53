"""Texts that a reward model reads: prompt + response as plain text, or as a chat in its tokenizer's template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from apa_cli.errors import UserError
from apa_cli.models.prompting import Messages, build_messages
from apa_cli.settings import RewardFormat
from apa_cli.types import Example


@dataclass(frozen=True)
class RewardTextEncoder:
    """Encoder of prompt + response in at most `max_tokens` tokens, for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    is_chat: bool
    """True: through the chat template. False: as plain text, with the special tokens that the tokenizer adds."""
    max_tokens: int

    def encode(self, prompt: str, response: str, messages: Messages | None = None) -> tuple[list[int], bool]:
        """Return the tokens of a text, and True if it was cut.

        A chat's turns are `messages`, or if None those of `prompt`: a dialogue in HH's format, or else one user turn.
        What is too long loses text of the prompt on the left; special tokens stay. A response that is too long by
        itself loses its start, because the score is read at the end.
        """
        if self.is_chat:
            return self.encode_chat(build_messages(Example(prompt, None, None, {}, messages)), response.strip())
        ids = encode_reward_text(self.tokenizer, prompt, response, self.max_tokens)
        return ids, self.is_cut(ids, prompt + response)

    def is_cut(self, ids: list[int], text: str) -> bool:
        """Return True if `ids` are the tokens of a plain text that was cut."""
        return len(ids) == self.max_tokens and len(self.tokenizer(text)["input_ids"]) > self.max_tokens

    def encode_chat(self, messages: Messages, reply: str) -> tuple[list[int], bool]:
        """Return the tokens of a chat, and True if it was cut.

        The earliest turns are dropped; then the start of the last turn, of the system message and of the reply.
        """
        ids = self.render_chat(messages, reply)
        if len(ids) <= self.max_tokens:
            return ids, False
        system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]

        def fits(system: Messages, turns: Messages, reply: str) -> bool:
            return len(self.render_chat(system + turns, reply)) <= self.max_tokens

        while len(turns) > 1 and not fits(system, turns, reply):
            turns = turns[1:]
            while len(turns) > 1 and turns[0]["role"] != "user":  # most templates begin with the user's turn
                turns = turns[1:]
        if turns:
            turns = shorten_message(turns, lambda part: fits(system, part, reply))
        if system:
            system = shorten_message(system, lambda part: fits(part, turns, reply))
        reply = keep_end(reply, lambda part: fits(system, turns, part))
        return self.render_chat(system + turns, reply)[-self.max_tokens :], True

    def render_chat(self, messages: Messages, reply: str) -> list[int]:
        """Return the tokens of the chat template, which adds all special tokens. Raise UserError if it fails."""
        turns = [*messages, {"role": "assistant", "content": reply}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template is a program, which raises many types
            reason = " ".join(str(error).split())
            raise UserError(
                f"reward.format: the reward tokenizer's chat template refuses {str(turns)[:200]}: {reason}; "
                "give reward.format=plain"
            ) from error
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def check_room(self, key: str) -> None:
        """Raise UserError, naming the key of `max_tokens`, if special tokens and template leave no room for a text."""
        if self.is_chat:
            taken = len(self.render_chat([{"role": "user", "content": "a"}], ""))
        else:
            taken = len(self.tokenizer("")["input_ids"])
        if taken >= self.max_tokens:
            what = "the chat template" if self.is_chat else "the tokenizer"
            raise UserError(
                f"{key}: {self.max_tokens} leaves no room for a text, because {what} adds {taken} tokens; raise it"
            )


def select_chat_format(
    tokenizer: PreTrainedTokenizerBase, chosen: RewardFormat, stored: str | None, key: str = "reward.format"
) -> bool:
    """Return True if a reward model reads chats: as chosen, or for auto as `stored` with it, or if a template exists.

    Raise UserError, naming `key`, for a chat without a chat template.
    """
    if chosen is RewardFormat.auto:
        is_chat = bool(tokenizer.chat_template) if stored is None else stored == RewardFormat.chat.value
    else:
        is_chat = chosen is RewardFormat.chat
    if is_chat and not tokenizer.chat_template:
        raise UserError(f"{key}: chat needs a reward tokenizer with a chat template; give {key}=plain")
    return is_chat


def encode_reward_text(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_tokens: int) -> list[int]:
    """Return the tokens of prompt + response with the tokenizer's special tokens, the text cut on the left.

    A text without any token becomes one special token, since a model needs a position to read.
    """
    tokenizer.truncation_side = "left"
    ids = tokenizer(prompt + response, truncation=True, max_length=max_tokens)["input_ids"]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return ids or [next(token for token in special if token is not None)]


def shorten_message(messages: Messages, fits: Callable[[Messages], bool]) -> Messages:
    """Return the messages with the start of the last one cut off until they fit, or with the last one empty."""
    *others, last = messages
    return [
        *others,
        {**last, "content": keep_end(last["content"], lambda text: fits([*others, {**last, "content": text}]))},
    ]


def keep_end(text: str, fits: Callable[[str], bool]) -> str:
    """Return `text` if it fits, else its longest end found by bisection that does; "" if none is found.

    Bisection over characters ends for every tokenizer; text cut by tokens, decoded and encoded again may not get
    shorter.
    """
    if fits(text):
        return text
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[len(text) - middle :]) else (low, middle - 1)
    return text[len(text) - low :]
