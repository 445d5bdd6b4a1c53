"""dataset=prompts: a text file of one's own."""

import pytest

from apa_cli.datasets.base import is_held_out
from apa_cli.datasets.prompts import PromptFile
from apa_cli.errors import UserError


def dataset(tmp_path, text, every=3, prefix="", suffix=""):
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    return PromptFile(str(tmp_path / "prompts.txt"), every, prefix, suffix, [])


def texts(data, split):
    return [example.prompt for example in data.load(split)]


def test_one_in_three_distinct_lines_is_held_out_and_blank_ones_are_skipped(tmp_path):
    data = dataset(tmp_path, "a\n\nb\n  \nc\na\nd\nb\ne\nf\ng\n")
    # distinct: a b c | d e f | g; of each whole stretch one is held out, by key: the second, and the sixth
    assert texts(data, "test") == ["b", "f"]
    assert texts(data, "train") == ["a", "c", "d", "e", "g"]


def test_prompts_only_with_words_around_them(tmp_path):
    data = dataset(tmp_path, "Wie heißt du?\nb\n", every=2, prefix="Q: ", suffix="\nA:")
    (example,) = data.load("train")
    assert example.prompt == "Q: Wie heißt du?\nA:"
    assert example.chosen is None and example.rejected is None and example.columns == {}


def test_leading_spaces_stay(tmp_path):
    assert texts(dataset(tmp_path, "  indented\nb\n", every=2), "train") == ["  indented"]


def test_the_split_leaves_something_on_both_sides(tmp_path):
    data = dataset(tmp_path, "a\nb\n", every=2)
    assert texts(data, "train") == ["a"] and texts(data, "test") == ["b"]
    with pytest.raises(UserError, match="1 prompts, too few to hold out every 2th"):
        dataset(tmp_path, "a\na\n", every=2).load("train")


def test_what_cannot_be_read_is_one_line(tmp_path):
    data = PromptFile(str(tmp_path / "absent.txt"), 2, "", "", [])
    with pytest.raises(UserError, match=r"dataset\.path: cannot read .*absent\.txt") as error:
        data.load("train")
    assert "\n" not in str(error.value)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nx\n")
    with pytest.raises(UserError, match=r"latin\.txt"):
        PromptFile(str(tmp_path / "latin.txt"), 2, "", "", []).load("train")
    with pytest.raises(UserError, match=r"dataset\.path"):
        PromptFile(str(tmp_path), 2, "", "", []).load("train")


def test_a_run_trains_on_them(tmp_path, run_train, records):
    (tmp_path / "prompts.txt").write_text("".join(f"How long does tea number {i} take?\n" for i in range(20)))
    run = run_train(
        "dataset=prompts", f"dataset.path={tmp_path}/prompts.txt", "dataset.suffix=' Answer:'",
        "iterations=1", "checkpoint.every=0", "~dataset.train_prompts", "~dataset.test_prompts",
    )  # fmt: skip
    prompts = [row["prompt"] for row in records(run / "samples.jsonl") if row["iteration"] == 0]
    held_out = [i for i in range(20) if is_held_out(i + 1, 5)]
    assert prompts == [f"How long does tea number {i} take? Answer:" for i in held_out] and len(held_out) == 4
