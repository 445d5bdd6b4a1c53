"""Texts of reward models: special tokens and replies stay whole, prompts are cut on the left, chats lose turns."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from apa_cli.errors import UserError
from apa_cli.models.reward_text import RewardTextEncoder, encode_reward_text, keep_end, select_chat_format
from apa_cli.settings import RewardFormat

TEMPLATE = "<s> {% for m in messages %}{{m.role}} {{m.content}} </s> {% endfor %}"
WORDS = ["<unk>", "<s>", "</s>", "system", "user", "assistant", *"abcdefghij"]
BOS, EOS, SYSTEM, USER, ASSISTANT = 1, 2, 3, 4, 5
A, B, C, D, E = range(6, 11)


def build_tokenizer(added: str | None = None, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words; `added` is the pattern of the special tokens that it adds, such as "<s> $A"."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if added:
        ids = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=ids)
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    built.chat_template = template
    return built


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (None, [B, C, D, E]),
        ("<s> $A", [BOS, C, D, E]),
        ("$A </s>", [C, D, E, EOS]),
        ("<s> $A </s>", [BOS, D, E, EOS]),
    ],
)
def test_a_plain_text_loses_words_on_the_left_and_keeps_its_special_tokens(added, expected):
    tokenizer = build_tokenizer(added)  # no token has a role such as BOS, and none pads
    assert RewardTextEncoder(tokenizer, False, 4).encode("a b c", " d e") == (expected, True)
    whole = tokenizer("a b c d e")["input_ids"]
    assert RewardTextEncoder(tokenizer, False, len(whole)).encode("a b c", " d e") == (whole, False)


def test_a_text_without_tokens_is_one_special_token():
    assert encode_reward_text(build_tokenizer(), "", "", 9) == [0]
    assert encode_reward_text(build_tokenizer(eos_token="</s>"), "", " ", 9) == [EOS]


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c d"},
]
LAST = [USER, C, D, EOS, ASSISTANT, E, EOS]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (14, [BOS, USER, A, EOS, ASSISTANT, B, EOS, *LAST]),
        (13, [BOS, *LAST]),  # a turn of the user comes first
        (8, [BOS, *LAST]),
        (7, [BOS, USER, D, EOS, ASSISTANT, E, EOS]),
        (6, [BOS, USER, EOS, ASSISTANT, E, EOS]),
    ],
)
def test_a_long_chat_loses_its_first_turns_then_the_start_of_the_last(limit, expected):
    # The tokenizer would add a second BOS; the template has it already.
    encoder = RewardTextEncoder(build_tokenizer("<s> $A", TEMPLATE), True, limit)
    assert encoder.encode("unused", " e", CHAT) == (expected, limit < 14)


def test_the_system_message_stays_longer_than_the_last_turn_and_the_reply_longest():
    chat = [{"role": "system", "content": "a b"}, *CHAT]
    tokenizer = build_tokenizer(None, TEMPLATE)
    # Without any text: <s> system </s> user </s> assistant </s>, 7 tokens.
    for limit, system, reply in ((11, [A, B], [D, E]), (10, [B], [D, E]), (9, [], [D, E]), (8, [], [E])):
        ids, is_cut = RewardTextEncoder(tokenizer, True, limit).encode("", "d e", chat)
        assert ids == [BOS, SYSTEM, *system, EOS, USER, EOS, ASSISTANT, *reply, EOS] and is_cut


def test_a_prompt_without_messages_is_a_dialogue_or_one_turn_of_the_user():
    encoder = RewardTextEncoder(build_tokenizer(None, TEMPLATE), True, 30)
    assert encoder.encode("a b", " e ")[0] == [BOS, USER, A, B, EOS, ASSISTANT, E, EOS]
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d\n\nAssistant:"
    assert encoder.encode(dialogue, " e")[0] == [BOS, USER, A, EOS, ASSISTANT, B, EOS, *LAST]


def test_a_cut_ends_for_every_text():
    assert keep_end("abcdef", lambda text: len(text) <= 4) == "cdef"
    assert keep_end("abcdef", lambda text: True) == "abcdef"
    assert keep_end("abcdef", lambda text: False) == "" == keep_end("", lambda text: False)


def test_the_format_is_chosen_stored_or_the_templates():
    chat, plain = build_tokenizer(None, TEMPLATE), build_tokenizer()
    assert select_chat_format(chat, RewardFormat.auto, None) and not select_chat_format(plain, RewardFormat.auto, None)
    assert select_chat_format(chat, RewardFormat.auto, "chat")
    assert not select_chat_format(chat, RewardFormat.auto, "plain")
    assert select_chat_format(chat, RewardFormat.chat, "plain")
    assert not select_chat_format(chat, RewardFormat.plain, "chat")
    for chosen, stored in ((RewardFormat.chat, None), (RewardFormat.auto, "chat")):
        with pytest.raises(UserError, match=r"^reward\.format: chat needs a reward tokenizer with a chat template; "):
            select_chat_format(plain, chosen, stored)


def test_a_template_that_fails_or_leaves_no_room_is_a_one_line_error():
    strict = build_tokenizer(None, "{{ raise_exception('no\nsystem') }}")
    with pytest.raises(UserError, match=r"^reward\.format: .* refuses .*: no system; give reward.format=plain$"):
        RewardTextEncoder(strict, True, 30).encode("a", "b")
    encoder = RewardTextEncoder(build_tokenizer(None, TEMPLATE), True, 6)  # <s> user a </s> assistant </s>
    with pytest.raises(UserError, match=r"^KEY: 6 leaves no room .* the chat template adds 6 tokens; raise it$"):
        encoder.check_room("KEY")
    RewardTextEncoder(encoder.tokenizer, True, 7).check_room("KEY")
    with pytest.raises(UserError, match=r"^KEY: 2 leaves no room .* the tokenizer adds 2 tokens; raise it$"):
        RewardTextEncoder(build_tokenizer("<s> $A </s>"), False, 2).check_room("KEY")
    RewardTextEncoder(build_tokenizer("<s> $A </s>"), False, 3).check_room("KEY")
