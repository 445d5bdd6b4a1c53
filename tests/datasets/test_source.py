"""Rows of a hub repository or a folder, and errors for files that cannot be read."""

import pytest

from apa_cli.datasets.source import Source, list_folder, select_split, take_examples
from apa_cli.types import Example

LAYOUTS = {"two": ("a", "b"), "one": ("a",)}


def test_the_first_layout_whose_columns_exist_applies(write, tmp_path):
    write("both/train.jsonl", [{"c": 1, "b": 2, "a": 3}, {"c": 4, "b": 5, "a": 6}])
    write("one/train.jsonl.gz", [{"a": 1}])
    layout, rows = Source(str(tmp_path), "both").rows("train", LAYOUTS)
    assert layout == "two" and list(rows) == [{"c": 1, "b": 2, "a": 3}, {"c": 4, "b": 5, "a": 6}]
    layout, rows = Source(str(tmp_path / "one")).rows("train", LAYOUTS)
    assert layout == "one" and list(rows) == [{"a": 1}]


def test_each_file_is_a_split(write, tmp_path):
    write("train.jsonl", [{"a": 1}])
    write("test.jsonl", [{"a": 2}])
    source = Source(str(tmp_path))
    assert "train" in source and "test" in source and "validation" not in source
    assert [row["a"] for row in source.rows("test", LAYOUTS)[1]] == [2]


def test_parquet_files_in_the_hubs_layout(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for split, values in (("train", [1, 2]), ("test", [3])):
        parquet.write_table(pyarrow.table({"a": values}), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    source = Source(str(tmp_path))
    assert [row["a"] for row in source.rows("train", LAYOUTS)[1]] == [1, 2]
    assert [row["a"] for row in source.rows("test", LAYOUTS)[1]] == [3]


def test_missing_folders_splits_and_columns_are_named_with_the_existing_ones(write, tmp_path, error_line):
    write("one/train.jsonl", [{"x": 1, "y": 2}])
    write("two/train.jsonl", [{"x": 1}])
    path = str(tmp_path)
    assert error_line(lambda: Source(path, "three")) == f"dataset.path: no folder three in {path}; in it: one, two"
    assert error_line(lambda: Source(path, "one").rows("test", LAYOUTS)) == (
        f"dataset.path: {path}/one has no split test, only train"
    )
    assert error_line(lambda: Source(path, "one").rows("train", LAYOUTS)) == (
        f"dataset.path: {path}/one has the columns x, y; needed are a, b or a"
    )
    assert error_line(lambda: Source(f"{path}/absent")) == f"dataset.path: there is no folder {path}/absent"
    file = f"{path}/one/train.jsonl"
    assert error_line(lambda: Source(file)).startswith(f"dataset.path: {file} is a file; give a folder")


def test_broken_files_are_errors_of_one_line(write, tmp_path, error_line):
    write("empty/train.jsonl", [])
    write("broken/train.jsonl", [{"a": 1}, "no json"])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "train.jsonl.gz").write_bytes(b"not zipped")

    def rows(name):
        return list(Source(str(tmp_path / name)).rows("train", LAYOUTS)[1])

    for name in ("empty", "broken", "nothing", "zip"):
        assert str(tmp_path / name) in error_line(lambda name=name: rows(name))
    assert "is empty" in error_line(lambda: rows("empty"))


def test_an_unreachable_hub_is_an_error_of_one_line(error_line, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error_line(lambda: Source("nobody/has-such-a-data-set", "part"))
    assert "nobody/has-such-a-data-set/part" in message
    assert "hub" in message and "cannot be reached" in message and "a local folder" in message


def test_the_listing_of_a_long_folder_is_shortened(tmp_path):
    for number in range(13):
        (tmp_path / f"{number:02}").touch()
    assert list_folder(tmp_path) == "in it: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 3 more"
    (tmp_path / "new").mkdir()
    assert list_folder(tmp_path / "new") == "in it: nothing"


def test_one_in_three_distinct_keys_is_held_out_with_all_its_rows():
    rows = ["a1", "b1", "a2", "c1", "d1", "c2", "e1", "f1", "b2"]
    # distinct keys: a b c | d e f; the second and the sixth are held out, one of each group of three
    assert list(select_split(rows, lambda row: row[0], 3, True)) == ["b1", "f1", "b2"]
    assert list(select_split(rows, lambda row: row[0], 3, False)) == ["a1", "a2", "c1", "d1", "c2", "e1"]


@pytest.mark.parametrize(
    ("limit", "prompts", "drop_counts"),
    [(None, "abc", {"bad": 2, "worse": 1}), (3, "abc", {"bad": 1, "worse": 1}), (2, "ab", {"bad": 1}), (1, "a", {})],
)
def test_limit_of_examples_and_counts_of_unusable_rows_before_it(limit, prompts, drop_counts):
    a, b, c = (Example(prompt, None, None, {}) for prompt in "abc")
    examples = take_examples(iter([a, "bad", b, "worse", c, "bad"]), limit)
    assert "".join(row.prompt for row in examples) == prompts
    assert examples.drop_counts == drop_counts
