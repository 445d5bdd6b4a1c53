"""Encoding of data set rows: prompts as plain text or in the tokenizer's chat template, and targets for SFT."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from apa_cli.datasets.base import PromptStyle
from apa_cli.datasets.dialogue import format_dialogue, parse_dialogue
from apa_cli.errors import ConfigError, UserError
from apa_cli.models.tokenization import cut_left, decode_tokens, drop_first_tokens, encode_text, find_turn_end
from apa_cli.types import MESSAGES, Example, Prompt

Messages = list[dict[str, str]]
"""The turns of a chat, {"role", "content"} each."""


@dataclass(frozen=True)
class Target:
    """Tokens of a prompt and of the reply to it, which are trained on."""

    prompt_ids: list[int]
    reply_ids: list[int]
    """With the end token, unless it was cut off."""
    is_prompt_cut: bool
    is_reply_cut: bool

    @property
    def row(self) -> tuple[list[int], list[bool]]:
        """All tokens, and for each True if it is the reply's."""
        flags = [False] * len(self.prompt_ids) + [True] * len(self.reply_ids)
        return self.prompt_ids + self.reply_ids, flags


@dataclass(frozen=True)
class PromptFormat:
    """Encoder of a data set's rows for one tokenizer.

    Policy and reward read the text of a plain prompt. The policy reads a chat through the chat template; the reward
    reads it as plain text in HH's format, which ends in `\\n\\nAssistant: ` with the space that begins a plain reply.
    """

    tokenizer: PreTrainedTokenizerBase
    style: PromptStyle

    def __post_init__(self) -> None:
        if self.style is PromptStyle.chat and not self.tokenizer.chat_template:
            raise ConfigError("dataset.format: chat needs a tokenizer with a chat template; give hh, or auto")

    def is_chat(self, example: Example) -> bool:
        """Return True if the row is rendered by a chat template; with style auto, if messages and template exist."""
        if self.style is PromptStyle.auto:
            return example.messages is not None and bool(self.tokenizer.chat_template)
        return self.style is PromptStyle.chat

    def encode_prompt(self, example: Example, place: int, sample: int, max_tokens: int) -> tuple[Prompt, bool]:
        """Return a row's prompt in at most `max_tokens` tokens, and True if it was truncated.

        A plain prompt loses tokens on the left, but not BOS; a chat loses its earliest turns, then the start of its
        last turn. The text of a truncated prompt is that of its remaining tokens, so that the reward reads what the
        policy reads. The column MESSAGES has the turns of a chat, and those of a row with messages.
        """
        if self.is_chat(example):
            messages = self.truncate_messages(build_messages(example), max_tokens)
            is_truncated = messages != build_messages(example)
            ids = self.render_messages(messages)
            columns = {**example.columns, MESSAGES: messages}
            return Prompt(format_chat(messages), ids, place, sample, columns), is_truncated
        ids = encode_text(self.tokenizer, example.prompt)
        turns = {} if example.messages is None else {MESSAGES: example.messages}
        if len(ids) <= max_tokens:
            return Prompt(example.prompt, ids, place, sample, {**example.columns, **turns}), False
        ids = cut_left(self.tokenizer, ids, max_tokens)
        text = decode_tokens(self.tokenizer, ids)
        turns = {MESSAGES: build_messages(Example(text, None, None, {}))} if turns else {}
        return Prompt(text, ids, place, sample, {**example.columns, **turns}), True

    def encode_instructed(
        self, example: Example, instructed: Example, place: int, sample: int, max_tokens: int
    ) -> tuple[Prompt, bool]:
        """Return the prompt of `instructed`, of which rewards read the text of `example`; True if it was truncated."""
        prompt, is_truncated = self.encode_prompt(instructed, place, sample, max_tokens)
        if instructed is not example:
            plain, _ = self.encode_prompt(example, place, sample, max_tokens)
            prompt = replace(prompt, text=plain.text, columns=plain.columns)
        return prompt, is_truncated

    def encode_response(self, example: Example, text: str, max_tokens: int) -> list[int]:
        """Return the tokens of a response to a row's prompt with its end token, cut to `max_tokens` on the right."""
        return [*self.split_target(example, text)[1], self.get_end_token(example)][:max_tokens]

    def get_end_token(self, example: Example) -> int:
        """Return the token that ends the reply to a row: by which the chat template ends the turn, or else EOS.

        Raise UserError if there is neither.
        """
        end = find_turn_end(self.tokenizer) if self.is_chat(example) else None
        end = self.tokenizer.eos_token_id if end is None else end
        if end is None:
            raise UserError(
                "model.tokenizer: the tokenizer has no end token, by which a reply has to end; give one as eos_token "
                "in its tokenizer_config.json"
            )
        return end

    def encode_target(self, example: Example, max_tokens: int) -> Target:
        """Return the tokens of prompt + chosen reply + end token.

        Beyond `max_tokens`, the prompt is cut as `encode_prompt` does it, or if that leaves no turn of a chat, on the
        left; a reply that is too long by itself is cut off on the right, with its end token.
        """
        assert example.chosen is not None, "a target needs a chosen reply"
        prompt_ids, reply_ids = self.split_target(example, example.chosen)
        whole = [*reply_ids, self.get_end_token(example)]
        reply_ids = whole[: max_tokens - 1]
        room = max_tokens - len(reply_ids)
        is_prompt_cut = len(prompt_ids) > room
        if is_prompt_cut:
            try:
                prompt_ids = self.encode_prompt(example, 0, 0, room)[0].token_ids
            except ConfigError:  # the chat template alone is longer
                prompt_ids = cut_left(self.tokenizer, prompt_ids, room)
        return Target(prompt_ids, reply_ids, is_prompt_cut, len(reply_ids) < len(whole))

    def split_target(self, example: Example, reply: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a row's prompt and of a reply to it, without an end token, neither cut."""
        if self.is_chat(example):
            prompt_ids = self.render_messages(build_messages(example))
            return prompt_ids, self.tokenizer(reply.strip(), add_special_tokens=False)["input_ids"]
        prompt_ids = encode_text(self.tokenizer, example.prompt)
        joined_ids = encode_text(self.tokenizer, example.prompt + reply)
        if joined_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, joined_ids[len(prompt_ids) :]
        return prompt_ids, self.tokenizer(reply, add_special_tokens=False)["input_ids"]

    def render_messages(self, messages: Messages) -> list[int]:
        """Return the chat template's tokens, up to the start of the reply. Raise UserError if the template fails."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, which raises many types
            reason = " ".join(str(error).split())
            raise UserError(
                f"dataset: the tokenizer's chat template refuses {str(messages)[:200]}: {reason}"
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def truncate_messages(self, messages: Messages, max_tokens: int) -> Messages:
        """Drop the earliest turns but no system message, then the start of the last turn, until the chat fits.

        Raise ConfigError if the template alone does not fit.
        """
        system, rest = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
        while len(rest) > 1 and len(self.render_messages(system + rest)) > max_tokens:
            rest = rest[2:] if len(rest) > 2 else rest[1:]
        while (excess := len(self.render_messages(system + rest)) - max_tokens) > 0:
            content = drop_first_tokens(self.tokenizer, rest[-1]["content"], excess)
            if not content:
                raise ConfigError(
                    f"sampling.max_prompt_tokens: {max_tokens} leaves no room for a turn in the chat template; raise it"
                )
            rest = [{**rest[-1], "content": content}]
        return system + rest


def build_messages(example: Example) -> Messages:
    """Return a row's messages; consecutive turns of one role are joined, because templates refuse them.

    A plain prompt in HH's format is parsed into messages; any other becomes one user message.
    """
    messages = example.messages if example.messages is not None else parse_dialogue(example.prompt)
    if not any(message["role"] == "user" for message in messages):
        return [{"role": "user", "content": example.prompt}]
    merged: Messages = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = {**message, "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def format_chat(messages: Messages) -> str:
    """Return the plain text of a chat, as rewards read it."""
    return format_dialogue(messages) + " "
