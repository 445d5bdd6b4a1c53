"""Texts as tokens and tokens as texts, alike for every tokenizer: special tokens, bytes of characters, cuts."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""Character that stands for bytes that are no whole character."""
MAX_CHARACTER_TOKENS = 4
"""Tokens that one character may be spread over: UTF-8 has at most four bytes per character."""
PROBE = "hello"
"""Text by which a chat template and the special tokens that a tokenizer adds are found out."""


# --- special tokens -----------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def find_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens, which no decoded text contains, and their ids."""
    marked = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


@lru_cache(maxsize=8)
def find_added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text by itself, such as BOS and EOS."""
    whole, bare = tokenizer(PROBE)["input_ids"], tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def find_turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token by which the chat template ends the assistant's turn; None without template or such a token."""
    return _find_turn_end(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else None


@lru_cache(maxsize=8)
def _find_turn_end(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int | None:
    """Return `find_turn_end` of a tokenizer with this template, which is part of the cache's key."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
    try:
        text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may raise anything; the first row that it renders reports the error
        return None
    _, found, rest = text.rpartition(PROBE)
    for number in tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []:
        if cast(str, tokenizer.decode([number])).strip():
            return number if number in tokenizer.added_tokens_decoder else None
    return None


# --- text to tokens -----------------------------------------------------------------------------------------


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text that a response follows: with BOS if the tokenizer adds it, never with EOS.

    BOS is not added to a text that begins with it. A text without any token is one special token, because a model needs
    a token to read.
    """
    before, _ = find_added_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids if before and ids[: len(before)] == before else before + ids
    start = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return ids or [token for token in start if token is not None][:1]


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: list[int], max_tokens: int) -> list[int]:
    """Return tokens cut on the left to `max_tokens`: BOS stays, and the rest begins with a whole character.

    Without room for BOS and another token, BOS is cut off too.
    """
    if len(ids) <= max_tokens:
        return ids
    before, _ = find_added_tokens(tokenizer)
    kept = before if ids[: len(before)] == before and len(before) < max_tokens else []
    return kept + drop_partial_character(tokenizer, ids[len(ids) - (max_tokens - len(kept)) :])


def drop_partial_character(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return tokens without those at their start that are the rest of a character; unchanged if nothing would stay."""
    for start in range(min(MAX_CHARACTER_TOKENS, len(ids))):
        if not decode_tokens(tokenizer, ids[start:]).startswith(REPLACEMENT):
            return ids[start:]
    return ids


def drop_first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """Return a text without about its first `count` ≥ 1 tokens: an end of the text, shorter by a character or more.

    The tokens of the result may be as many as the text's: tokens depend on what stands before them.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][count:]
    rest = decode_tokens(tokenizer, drop_partial_character(tokenizer, ids))
    if text.endswith(rest) and len(rest) < len(text):
        return rest
    # The tokenizer's text is not the original one (case, Unicode normalization), or lacks its first space only.
    return text[max(1, len(text) - len(rest)) :]


# --- tokens to text -----------------------------------------------------------------------------------------


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of tokens, without special tokens and with all spaces as the tokens have them."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def show_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of tokens with the special tokens visible."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode_continuation(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text that tokens add to a text before them, without special tokens.

    The tokens are decoded after a token that is one letter, because some tokenizers drop the first space of a text.
    The text before them is not decoded with them: bytes of a character that is not complete would spoil its last one.
    """
    anchor = find_anchor(tokenizer)
    if anchor is not None:
        number, letter = anchor
        text = decode_tokens(tokenizer, [number, *ids])
        if text.startswith(letter):
            return text[len(letter) :]
    return decode_tokens(tokenizer, ids)


@lru_cache(maxsize=8)
def find_anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    """Return an ordinary token that decodes to itself, a letter if possible, and its text; None if there is none."""
    vocabulary = tokenizer.get_vocab()
    plain = [token for token in vocabulary if token.isascii() and token.isalnum()]
    for token in sorted(plain, key=lambda token: (len(token), not token.isalpha(), token)):
        if decode_tokens(tokenizer, [vocabulary[token]]) == token:
            return vocabulary[token], token
    return None
