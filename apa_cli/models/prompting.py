"""Prompts as a model takes them: as plain text, or in its tokenizer's chat template; and targets for SFT."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from apa_cli.datasets.base import PromptForm
from apa_cli.datasets.dialogue import dialogue_text, parse_dialogue
from apa_cli.errors import ConfigError, UserError
from apa_cli.types import Example, Prompt

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class PromptFormat:
    """Turns a data set's rows into tokens.

    In plain form a prompt's text is what the policy and the reward see. In chat form the policy sees the template,
    and the reward the dialogue as plain text in HH's form, `…\\n\\nAssistant: `, with the space that the reply
    itself has in plain form.
    """

    tokenizer: PreTrainedTokenizerBase
    form: PromptForm

    def __post_init__(self):
        if self.form is PromptForm.chat and not self.tokenizer.chat_template:
            raise ConfigError("dataset.format: chat needs a tokenizer with a chat template; give hh, or auto")

    def is_chat(self, example: Example) -> bool:
        """Whether the template renders this row: always, never, or (auto) where row and tokenizer both can."""
        if self.form is PromptForm.auto:
            return example.messages is not None and bool(self.tokenizer.chat_template)
        return self.form is PromptForm.chat

    def prompt(self, example: Example, place: int, sample: int, longest: int) -> tuple[Prompt, bool]:
        """A row's prompt in at most `longest` tokens, and whether it was cut.

        A plain prompt loses tokens on the left, a chat its earliest turns and then the beginning of the last one.
        The text of a cut prompt is the text of what is left: the reward sees what the policy saw.
        """
        if self.is_chat(example):
            messages = self.shortened(turns(example), longest)
            cut = messages != turns(example)
            return Prompt(chat_text(messages), self.rendered(messages), place, sample, example.columns), cut
        ids = self.tokenizer(example.prompt)["input_ids"]
        if len(ids) <= longest:
            return Prompt(example.prompt, ids, place, sample, example.columns), False
        ids = ids[-longest:]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Prompt(text, ids, place, sample, example.columns), True

    def target(self, example: Example, longest: int) -> tuple[list[int], list[bool]]:
        """Tokens of prompt + chosen reply + EOS and which of them are the reply's, EOS included.

        What is too long loses prompt tokens on the left; a reply that is too long by itself is cut and has no EOS.
        """
        reply = example.chosen
        if self.is_chat(example):
            prompt_ids = self.rendered(turns(example))
            reply_ids = self.tokenizer(reply.strip(), add_special_tokens=False)["input_ids"]
        else:
            prompt_ids = self.tokenizer(example.prompt)["input_ids"]
            both = self.tokenizer(example.prompt + reply)["input_ids"]
            joined = both[: len(prompt_ids)] == prompt_ids
            reply_ids = (
                both[len(prompt_ids) :] if joined else self.tokenizer(reply, add_special_tokens=False)["input_ids"]
            )
        reply_ids = [*reply_ids, self.tokenizer.eos_token_id][: longest - 1]
        prompt_ids = prompt_ids[-(longest - len(reply_ids)) :]
        return prompt_ids + reply_ids, [False] * len(prompt_ids) + [True] * len(reply_ids)

    def rendered(self, messages: Messages) -> list[int]:
        """The template's tokens, up to where the reply begins."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            why = " ".join(str(error).split())
            raise UserError(f"dataset: the tokenizer's chat template refuses {str(messages)[:200]}: {why}") from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def shortened(self, messages: Messages, longest: int) -> Messages:
        """Messages whose rendering fits: without the earliest turns (a system message stays), the last one cut."""
        system, rest = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
        while len(rest) > 1 and len(self.rendered(system + rest)) > longest:
            rest = rest[2:] if len(rest) > 2 else rest[1:]
        while (excess := len(self.rendered(system + rest)) - longest) > 0:
            ids = self.tokenizer(rest[-1]["content"], add_special_tokens=False)["input_ids"][excess:]
            if not ids:
                raise ConfigError(f"sampling.max_prompt_tokens: {longest} leaves no room beside the chat template")
            rest = [{**rest[-1], "content": self.tokenizer.decode(ids, skip_special_tokens=True)}]
        return system + rest


def turns(example: Example) -> Messages:
    """A row's messages, turns of one role in a row as one, because templates refuse them.

    A plain prompt in HH's form has messages too; any other is one user message.
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


def chat_text(messages: Messages) -> str:
    """What rewards see of a chat."""
    return dialogue_text(messages) + " "
