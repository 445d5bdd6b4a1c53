"""The text of sampled responses and the stop strings in it: one rule for the sampler and for the scored text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from apa_cli.errors import ConfigError
from apa_cli.models.tokenization import REPLACEMENT, decode_continuation, find_special_tokens

EOS, STOP, LENGTH = "eos", "stop", "length"
"""Endings of a response: an end token, a stop string, the length limit."""


class StopSearch:
    """Search for stop strings in the text of one response, token by token.

    A stop string that is a special token, which no text contains, is found as that token. Only the tokens since the
    last whole character are decoded again, after the tokens of the step before them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: list[str]):
        self.tokenizer = tokenizer
        self.strings = [string for string in strings if string]
        self.stop_tokens = find_stop_tokens(tokenizer, self.strings)
        self.longest = max(map(len, self.strings), default=0)
        """Characters of the longest stop string."""
        self.settled = ""
        """The text so far, up to the last whole character."""
        self.added = ""
        """The text after `settled`."""
        self.context: list[int] = []
        """The tokens that added the last characters of `settled`."""
        self.rest: list[int] = []
        """The tokens after those in `settled`."""

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return self.settled + self.added

    def add(self, token: int) -> bool:
        """Return True if the response contains a stop string with this further token."""
        self.rest.append(token)
        before = decode_continuation(self.tokenizer, self.context)
        joined = decode_continuation(self.tokenizer, self.context + self.rest)
        is_kept = joined.startswith(before)
        self.added = joined[len(before) :] if is_kept else decode_continuation(self.tokenizer, self.rest)
        recent = self.settled[-self.longest :] + self.added
        if token in self.stop_tokens or any(string in recent for string in self.strings):
            return True
        if not self.added.endswith(REPLACEMENT):
            self.settled, self.added = self.text, ""
            self.context, self.rest = self.rest, []
        return False


def start_searches(
    tokenizer: PreTrainedTokenizerBase, strings: list[str], prefixes: list[list[int]]
) -> list[StopSearch]:
    """Return the search in each response, with its prefix read; an empty list without stop strings."""
    searches = [StopSearch(tokenizer, strings) for _ in prefixes] if any(strings) else []
    for search, prefix in zip(searches, prefixes, strict=False):
        for token in prefix:
            search.add(token)
    return searches


def find_stop_tokens(tokenizer: PreTrainedTokenizerBase, strings: list[str]) -> frozenset[int]:
    """Return the ids of the stop strings that are special tokens, with or without white space around them."""
    special = find_special_tokens(tokenizer)
    return frozenset(special[string.strip()] for string in strings if string.strip() in special)


def check_stop_strings(tokenizer: PreTrainedTokenizerBase, strings: list[str]) -> None:
    """Raise ConfigError for a stop string that can never be found: a special token together with other text."""
    special = find_special_tokens(tokenizer)
    for string in strings:
        inside = [token for token in special if token and token in string]
        if inside and string.strip() not in special:
            raise ConfigError(
                f"sampling.stop_strings: {string!r} is never found, because the text of a response has no special "
                f"tokens; give {max(inside, key=len)!r} alone"
            )


def read_response(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], ending: str, stop_strings: list[str]
) -> tuple[int, str, str]:
    """Return the number of a response's tokens up to a stop string, its ending, and the text that is scored.

    The token that completes the first stop string is the last. The text is without the end token, cut before the stop
    string, and stripped on the right; it begins with a space if its first token does.
    """
    body = tokens[:-1] if ending == EOS else tokens
    search, text = StopSearch(tokenizer, stop_strings), decode_continuation(tokenizer, body)
    has_stop = any(string in text for string in search.strings) or not search.stop_tokens.isdisjoint(body)
    if REPLACEMENT not in text and not has_stop:
        return len(tokens), ending, text.rstrip()
    # Some tokenizers decode whole characters next to bytes that are no character as such bytes; the search does not.
    for count, token in enumerate(body, 1):
        if search.add(token):
            return count, STOP, cut_at_stop_string(search.text, search.strings)
    return len(tokens), ending, search.text.rstrip()


def cut_at_stop_string(text: str, strings: list[str]) -> str:
    """Return the text before the first stop string, stripped on the right; a stop token leaves no text to cut."""
    cuts = [text.index(string) for string in strings if string in text]
    return text[: min(cuts, default=len(text))].rstrip()
