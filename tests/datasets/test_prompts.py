"""dataset=prompts: the user's own text file."""

import pytest

from apa_cli.datasets.base import is_held_out
from apa_cli.datasets.prompts import PromptFile
from apa_cli.errors import UserError


def make_dataset(tmp_path, text, every=3, prefix="", suffix=""):
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    return PromptFile(str(tmp_path / "prompts.txt"), every, prefix, suffix, [])


def texts(data, split):
    return [example.prompt for example in data.load(split)]


def test_one_in_three_distinct_lines_is_held_out_and_blank_lines_are_skipped(tmp_path):
    data = make_dataset(tmp_path, "a\n\nb\n  \nc\na\nd\nb\ne\nf\ng\n")
    # distinct: a b c | d e f | g; the second and the sixth are held out, one of each whole group of three
    assert texts(data, "test") == ["b", "f"]
    assert texts(data, "train") == ["a", "c", "d", "e", "g"]


def test_examples_are_prompts_with_prefix_and_suffix(tmp_path):
    data = make_dataset(tmp_path, "Wie heißt du?\nb\n", every=2, prefix="Q: ", suffix="\nA:")
    (example,) = data.load("train")
    assert example.prompt == "Q: Wie heißt du?\nA:"
    assert example.chosen is None and example.rejected is None and example.columns == {}


def test_lines_end_at_line_ends_only_and_a_byte_order_mark_is_dropped(tmp_path):
    odd = "a\u2028b\x85c\x0cd\x0be\x1ff\u2029g"  # str.splitlines would end a line at each of these
    data = make_dataset(tmp_path, f"\ufeff{odd}\r\nx\ry\r\nz\n", every=2)
    assert sorted(texts(data, "train") + texts(data, "test")) == [odd, "x", "y", "z"]


def test_repeated_lines_are_counted_and_lines_that_differ_in_white_space_stay_on_one_side(tmp_path):
    data = make_dataset(tmp_path, "a b\nc\nd\na b\na  b \ne\nf\n\ta b\ng\n")
    # distinct: a b, c, d | e, f, g; the second and the sixth are held out
    assert texts(data, "test") == ["c", "g"]
    assert texts(data, "train") == ["a b", "d", "a  b ", "e", "f", "\ta b"]
    assert data.load("train").drop_counts == {"repeated lines": 1} and data.load("test").drop_counts == {}


def test_a_file_of_rows_is_not_read_as_lines_of_text(tmp_path, error_line):
    for name in ("rows.jsonl", "rows.JSON.gz", "rows.csv", "rows.parquet"):
        message = error_line(lambda name=name: PromptFile(str(tmp_path / name), 2, "", "", []).load("train"))
        assert message == f"dataset.path: {tmp_path / name} holds rows, not lines of text; give dataset=jsonl"


def test_leading_spaces_are_kept(tmp_path):
    assert texts(make_dataset(tmp_path, "  indented\nb\n", every=2), "train") == ["  indented"]


def test_each_split_has_a_prompt_or_the_file_is_refused(tmp_path):
    data = make_dataset(tmp_path, "a\nb\n", every=2)
    assert texts(data, "train") == ["a"] and texts(data, "test") == ["b"]
    with pytest.raises(UserError, match=r"has 1 distinct prompts, fewer than dataset\.held_out_every=2"):
        make_dataset(tmp_path, "a\na\n", every=2).load("train")


def test_unreadable_files_are_errors_of_one_line(tmp_path):
    data = PromptFile(str(tmp_path / "absent.txt"), 2, "", "", [])
    with pytest.raises(UserError, match=r"dataset\.path: cannot read .*absent\.txt") as error:
        data.load("train")
    assert "\n" not in str(error.value)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nx\n")
    with pytest.raises(UserError, match=r"latin\.txt, row 1: not UTF-8 \(byte 0xe9 at position 4\)"):
        PromptFile(str(tmp_path / "latin.txt"), 2, "", "", []).load("train")
    with pytest.raises(UserError, match=r"dataset\.path"):
        PromptFile(str(tmp_path), 2, "", "", []).load("train")


@pytest.mark.slow
def test_a_run_trains_on_a_prompt_file(tmp_path, run_train, records):
    (tmp_path / "prompts.txt").write_text("".join(f"How long does tea number {i} take?\n" for i in range(20)))
    run = run_train(
        "dataset=prompts", f"dataset.path={tmp_path}/prompts.txt", "dataset.suffix=' Answer:'",
        "iterations=1", "checkpoint.every=0", "~dataset.train_prompts", "~dataset.test_prompts",
    )  # fmt: skip
    prompts = [row["prompt"] for row in records(run / "samples.jsonl") if row["iteration"] == 0]
    held_out = [i for i in range(20) if is_held_out(i + 1, 5)]
    assert prompts == [f"How long does tea number {i} take? Answer:" for i in held_out] and len(held_out) == 4
