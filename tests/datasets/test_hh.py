"""dataset=hh: pairs of dialogues."""

import gzip
import json
from types import SimpleNamespace

import pytest

from apa_cli.datasets.base import PromptForm
from apa_cli.datasets.dialogue import dialogue_text, parse_dialogue
from apa_cli.datasets.hh import HH

PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
USED = {"chosen": f"{PROMPT} See you. ", "rejected": f"{PROMPT}  Go"}


def dataset(path, subsets=("helpful-base",), train_rows=None, test_rows=None):
    names = None if subsets is None else list(subsets)
    return HH(str(path), names, PromptForm.auto, train_rows, test_rows, [])


def dialogue(number, reply=" yes"):
    return f"\n\nHuman: {number}\n\nAssistant:{reply}"


def row(number):
    return {"chosen": dialogue(number), "rejected": dialogue(number, " no")}


def questions(rows):
    return [example.messages[-1]["content"] for example in rows]


def test_a_row_is_its_prompt_and_two_replies_to_the_letter(write, tmp_path):
    write("helpful-base/train.jsonl.gz", [USED])
    (example,) = dataset(tmp_path).load("train")
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
    "pairs that are no dialogues": ("yes", "no"),
    "pairs with an empty reply": (dialogue(1), dialogue(1, " ")),
    "pairs with different prompts": (dialogue(1), dialogue(2)),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_what_cannot_be_used_is_counted(write, tmp_path, reason):
    first, second = UNUSABLE[reason]
    swapped = [] if first == second else [{"chosen": second, "rejected": first}]
    write("helpful-base/train.jsonl", [{"chosen": first, "rejected": second}, row(3), *swapped])
    rows = dataset(tmp_path).load("train")
    assert rows.dropped == {reason: 1 + len(swapped)}
    assert questions(rows) == ["3"]


def test_one_side_that_is_no_dialogue_or_has_no_reply_at_all(write, tmp_path):
    no_turn = {"chosen": dialogue(1), "rejected": "\n\nAssistant: no"}
    write("helpful-base/train.jsonl", [no_turn, {"chosen": dialogue(1, ""), "rejected": dialogue(1)}])
    assert dataset(tmp_path).load("train").dropped == {"pairs that are no dialogues": 1, "pairs with an empty reply": 1}


def test_subsets_take_turns_and_go_on_when_one_has_ended(write, tmp_path):
    write("helpful-base/test.jsonl", [row("a1"), row("a2"), row("a3")])
    write("harmless-base/test.jsonl", [row("b1")])
    write("helpful-base/train.jsonl", [row("c")])
    both = ("harmless-base", "helpful-base")
    rows = dataset(tmp_path, both).load("test")
    assert questions(rows) == ["b1", "a1", "a2", "a3"]
    assert [example.columns["subset"] for example in rows] == ["harmless-base", *["helpful-base"] * 3]
    assert questions(dataset(tmp_path, both, train_rows=1, test_rows=2).load("test")) == ["b1", "a1"]
    assert questions(dataset(tmp_path, ("helpful-base",) * 2).load("train")) == ["c"]


def test_no_names_are_all_subsets_that_are_there(write, tmp_path):
    write("harmless-base/train.jsonl", [row(1)])
    write("helpful-online/train.jsonl", [row(2)])
    write("red-team-attempts/train.jsonl", [{"transcript": "x"}])
    subsets = [example.columns["subset"] for example in dataset(tmp_path, ()).load("train")]
    assert subsets == ["helpful-online", "harmless-base"]


def test_the_form_with_prompts_in_a_column_of_their_own(write, tmp_path):
    flat = {"prompt": PROMPT, "response": " x", "chosen": " Fine.", "rejected": "no space"}
    other = {**flat, "chosen": " ", "rejected": " Fine."}
    write("train.jsonl.gz", [flat, other])
    write("test.jsonl.gz", [{**flat, "prompt": dialogue(7, "")}])
    rows = dataset(tmp_path, None).load("train")
    (example,) = rows
    assert (example.prompt, example.chosen, example.rejected) == (PROMPT, " Fine.", " no space")
    assert example.columns == {} and example.messages == parse_dialogue(PROMPT)
    assert rows.dropped == {"pairs with an empty reply": 1}
    assert questions(dataset(tmp_path, None).load("test")) == ["7"]


def test_what_is_missing_is_named_with_what_is_there(write, tmp_path, refused):
    assert "helpful-base, helpful-online" in refused(lambda: dataset(tmp_path, ()).load("train"))
    write("harmless-base/train.jsonl", [row(1)])
    message = refused(lambda: dataset(tmp_path).load("train"))
    assert message == f"dataset.path: no folder helpful-base in {tmp_path}; in it: harmless-base"
    write("helpful-base/train.jsonl", [{"chosen": dialogue(1)}])
    message = refused(lambda: dataset(tmp_path).load("train"))
    assert message == (
        f"dataset.path: {tmp_path}/helpful-base has the columns chosen; "
        "needed are prompt, chosen, rejected or chosen, rejected"
    )


def test_what_is_no_text_is_said(write, tmp_path, refused):
    write("helpful-base/train.jsonl", [{"chosen": ["a"], "rejected": "b"}])
    assert refused(lambda: dataset(tmp_path).load("train")) == "dataset.path: the column chosen holds ['a'], not text"


def test_the_form_of_prompts_is_the_users_choice():
    assert HH("x", [], PromptForm.chat, None, None, []).prompt_form is PromptForm.chat


# The real data: 1902 + 1862 rows to train on and 200 + 200 held out; 9 + 3 and 0 + 1 of the pairs have different
# prompts, in 2 + 3 and 0 + 1 a reply is a single space.


def test_the_real_rows(real):
    data = dataset(real("hh-rlhf"), ())
    train, held_out = data.load("train"), data.load("test")
    assert train.dropped == {"pairs with different prompts": 12, "pairs with an empty reply": 5}
    assert held_out.dropped == {"pairs with different prompts": 1, "pairs with an empty reply": 1}
    assert (len(train), len(held_out)) == (1902 + 1862 - 17, 400 - 2)
    subsets = [example.columns["subset"] for example in held_out]
    assert subsets[:4] == ["helpful-base", "harmless-base"] * 2
    assert (subsets.count("helpful-base"), subsets.count("harmless-base")) == (200, 198)
    for example in [*train, *held_out]:
        assert example.messages[-1]["role"] == "user" and example.prompt == dialogue_text(example.messages)
        assert example.chosen.startswith(" ") and example.rejected.startswith(" ")
        assert example.chosen != example.rejected


def test_no_real_prompt_to_train_on_is_held_out(real):
    from apa_cli.training.build import load_examples

    said = []
    train, held_out = load_examples(SimpleNamespace(dataset=dataset(real("hh-rlhf"), ())), said.append)
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    assert (len(train), len(held_out)) == (3747 - 1, 398)
    assert said[0].startswith("dataset: 3747 train rows; left out: ")
    assert "12 pairs with different prompts" in said[0] and "5 pairs with an empty reply" in said[0]
    assert said[2].startswith("dataset: 1 held-out prompts were in train too")


def test_every_real_dialogue_reads_back(real):
    count = 0
    for file in sorted(real("hh-rlhf").glob("*/*.jsonl.gz")):
        for line in gzip.decompress(file.read_bytes()).splitlines():
            for text in json.loads(line).values():
                assert dialogue_text(parse_dialogue(text)) == text + "\n\nAssistant:"
                count += 1
    assert count == 2 * (1902 + 1862 + 400)
