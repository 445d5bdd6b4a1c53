"""dataset=hh: pairs of dialogues."""

import gzip
import json
from types import SimpleNamespace

import pytest

from apa_cli.datasets.base import PromptStyle
from apa_cli.datasets.dialogue import format_dialogue, parse_dialogue
from apa_cli.datasets.hh import HH

PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
USABLE = {"chosen": f"{PROMPT} See you. ", "rejected": f"{PROMPT}  Go"}


def make_dataset(path, subsets=("helpful-base",), train_rows=None, test_rows=None):
    names = None if subsets is None else list(subsets)
    return HH(str(path), names, PromptStyle.auto, train_rows, test_rows, [])


def dialogue(number, reply=" yes"):
    return f"\n\nHuman: {number}\n\nAssistant:{reply}"


def row(number):
    return {"chosen": dialogue(number), "rejected": dialogue(number, " no")}


def last_questions(rows):
    return [example.messages[-1]["content"] for example in rows]


def test_a_row_is_split_into_prompt_and_two_replies(write, tmp_path):
    write("helpful-base/train.jsonl.gz", [USABLE])
    (example,) = make_dataset(tmp_path).load("train")
    assert (example.prompt, example.chosen, example.rejected) == (PROMPT, " See you. ", "  Go")
    assert example.columns == {"subset": "helpful-base"}
    assert example.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]


UNUSABLE = {
    "identical pairs": (dialogue(1), dialogue(1)),
    "pairs that end on the human's turn": (dialogue(1) + "\n\nHuman: And?", dialogue(1, " no")),
    "pairs that are not dialogues": ("yes", "no"),
    "pairs with an empty reply": (dialogue(1), dialogue(1, " ")),
    "pairs with different prompts": (dialogue(1), dialogue(2)),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_unusable_pairs_are_counted_by_reason(write, tmp_path, reason):
    first, second = UNUSABLE[reason]
    swapped = [] if first == second else [{"chosen": second, "rejected": first}]
    write("helpful-base/train.jsonl", [{"chosen": first, "rejected": second}, row(3), *swapped])
    rows = make_dataset(tmp_path).load("train")
    assert rows.drop_counts == {reason: 1 + len(swapped)}
    assert last_questions(rows) == ["3"]


def test_a_pair_is_unusable_if_one_side_is(write, tmp_path):
    no_turn = {"chosen": dialogue(1), "rejected": "\n\nAssistant: no"}
    write("helpful-base/train.jsonl", [no_turn, {"chosen": dialogue(1, ""), "rejected": dialogue(1)}])
    assert make_dataset(tmp_path).load("train").drop_counts == {
        "pairs that are not dialogues": 1,
        "pairs with an empty reply": 1,
    }


def test_subsets_alternate_until_each_ends(write, tmp_path):
    write("helpful-base/test.jsonl", [row("a1"), row("a2"), row("a3")])
    write("harmless-base/test.jsonl", [row("b1")])
    write("helpful-base/train.jsonl", [row("c")])
    both = ("harmless-base", "helpful-base")
    rows = make_dataset(tmp_path, both).load("test")
    assert last_questions(rows) == ["b1", "a1", "a2", "a3"]
    assert [example.columns["subset"] for example in rows] == ["harmless-base", *["helpful-base"] * 3]
    assert last_questions(make_dataset(tmp_path, both, train_rows=1, test_rows=2).load("test")) == ["b1", "a1"]
    assert last_questions(make_dataset(tmp_path, ("helpful-base",) * 2).load("train")) == ["c"]


def test_an_empty_list_selects_all_existing_subsets(write, tmp_path):
    write("harmless-base/train.jsonl", [row(1)])
    write("helpful-online/train.jsonl", [row(2)])
    write("red-team-attempts/train.jsonl", [{"transcript": "x"}])
    subsets = [example.columns["subset"] for example in make_dataset(tmp_path, ()).load("train")]
    assert subsets == ["helpful-online", "harmless-base"]


def test_layout_with_a_prompt_column(write, tmp_path):
    flat = {"prompt": PROMPT, "response": " x", "chosen": " Fine.", "rejected": "no space"}
    other = {**flat, "chosen": " ", "rejected": " Fine."}
    write("train.jsonl.gz", [flat, other])
    write("test.jsonl.gz", [{**flat, "prompt": dialogue(7, "")}])
    rows = make_dataset(tmp_path, None).load("train")
    (example,) = rows
    assert (example.prompt, example.chosen, example.rejected) == (PROMPT, " Fine.", " no space")
    assert example.columns == {} and example.messages == parse_dialogue(PROMPT)
    assert rows.drop_counts == {"pairs with an empty reply": 1}
    assert last_questions(make_dataset(tmp_path, None).load("test")) == ["7"]


def test_missing_folders_and_columns_are_named_with_the_existing_ones(write, tmp_path, error_line):
    assert "helpful-base, helpful-online" in error_line(lambda: make_dataset(tmp_path, ()).load("train"))
    write("harmless-base/train.jsonl", [row(1)])
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert message == f"dataset.path: no folder helpful-base in {tmp_path}; in it: harmless-base"
    write("helpful-base/train.jsonl", [{"chosen": dialogue(1)}])
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert message == (
        f"dataset.path: {tmp_path}/helpful-base has the columns chosen; "
        "needed are prompt, chosen, rejected or chosen, rejected"
    )


def test_a_column_that_is_not_text_is_an_error_with_file_and_row(write, tmp_path, error_line):
    file = write("helpful-base/train.jsonl", [row(1), {"chosen": ["a"], "rejected": "b"}])
    assert error_line(lambda: make_dataset(tmp_path).load("train")) == (
        f'dataset.path: {file}, row 2: column chosen must be text, got ["a"]; dataset=jsonl reads lists of messages'
    )


def test_prompt_style_is_the_users_choice():
    assert HH("x", [], PromptStyle.chat, None, None, []).prompt_style is PromptStyle.chat


# The real data (helpful + harmless): 1902 + 1862 training rows and 200 + 200 held-out rows; 9 + 3 and 0 + 1 pairs have
# different prompts, 2 + 3 and 0 + 1 pairs have a reply of a single space.


def test_real_rows_and_their_unusable_pairs(real):
    data = make_dataset(real("hh-rlhf"), ())
    train, held_out = data.load("train"), data.load("test")
    assert train.drop_counts == {"pairs with different prompts": 12, "pairs with an empty reply": 5}
    assert held_out.drop_counts == {"pairs with different prompts": 1, "pairs with an empty reply": 1}
    assert (len(train), len(held_out)) == (1902 + 1862 - 17, 400 - 2)
    subsets = [example.columns["subset"] for example in held_out]
    assert subsets[:4] == ["helpful-base", "harmless-base"] * 2
    assert (subsets.count("helpful-base"), subsets.count("harmless-base")) == (200, 198)
    for example in [*train, *held_out]:
        assert example.messages[-1]["role"] == "user" and example.prompt == format_dialogue(example.messages)
        assert example.chosen.startswith(" ") and example.rejected.startswith(" ")
        assert example.chosen != example.rejected


def test_no_real_training_prompt_is_held_out(real):
    from apa_cli.training.examples import load_examples

    messages = []
    train, held_out = load_examples(SimpleNamespace(dataset=make_dataset(real("hh-rlhf"), ())), messages.append)
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    assert (len(train), len(held_out)) == (3747 - 1, 398)
    assert messages[0].startswith("dataset: 3747 train rows; left out: ")
    assert "12 pairs with different prompts" in messages[0] and "5 pairs with an empty reply" in messages[0]
    assert messages[2].startswith("dataset: 1 held-out prompts are also in train")


def test_every_real_dialogue_survives_parsing_and_formatting(real):
    count = 0
    for file in sorted(real("hh-rlhf").glob("*/*.jsonl.gz")):
        for line in gzip.decompress(file.read_bytes()).splitlines():
            for text in json.loads(line).values():
                assert format_dialogue(parse_dialogue(text)) == text + "\n\nAssistant:"
                count += 1
    assert count == 2 * (1902 + 1862 + 400)
