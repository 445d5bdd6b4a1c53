"""Reading what lies on the hub or in a folder, and what cannot be read."""

import pytest

from apa_cli.datasets.source import Source, inside, share, usable
from apa_cli.types import Example

FORMS = {"two": ("a", "b"), "one": ("a",)}


def test_the_first_form_whose_columns_are_there(write, tmp_path):
    write("both/train.jsonl", [{"c": 1, "b": 2, "a": 3}, {"c": 4, "b": 5, "a": 6}])
    write("one/train.jsonl.gz", [{"a": 1}])
    form, rows = Source(str(tmp_path), "both").rows("train", FORMS)
    assert form == "two" and list(rows) == [{"c": 1, "b": 2, "a": 3}, {"c": 4, "b": 5, "a": 6}]
    form, rows = Source(str(tmp_path / "one")).rows("train", FORMS)
    assert form == "one" and list(rows) == [{"a": 1}]


def test_splits_are_the_files(write, tmp_path):
    write("train.jsonl", [{"a": 1}])
    write("test.jsonl", [{"a": 2}])
    source = Source(str(tmp_path))
    assert "train" in source and "test" in source and "validation" not in source
    assert [row["a"] for row in source.rows("test", FORMS)[1]] == [2]


def test_the_files_of_the_hubs_own_format(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for split, values in (("train", [1, 2]), ("test", [3])):
        parquet.write_table(pyarrow.table({"a": values}), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    source = Source(str(tmp_path))
    assert [row["a"] for row in source.rows("train", FORMS)[1]] == [1, 2]
    assert [row["a"] for row in source.rows("test", FORMS)[1]] == [3]


def test_a_folder_a_split_or_a_column_that_is_missing_is_named_with_what_is_there(write, tmp_path, refused):
    write("one/train.jsonl", [{"x": 1, "y": 2}])
    write("two/train.jsonl", [{"x": 1}])
    path = str(tmp_path)
    assert refused(lambda: Source(path, "three")) == f"dataset.path: no folder three in {path}; in it: one, two"
    assert refused(lambda: Source(path, "one").rows("test", FORMS)) == (
        f"dataset.path: {path}/one has no split test, only train"
    )
    assert refused(lambda: Source(path, "one").rows("train", FORMS)) == (
        f"dataset.path: {path}/one has the columns x, y; needed are a, b or a"
    )
    assert refused(lambda: Source(f"{path}/absent")) == f"dataset.path: there is no folder {path}/absent"
    file = f"{path}/one/train.jsonl"
    assert refused(lambda: Source(file)).startswith(f"dataset.path: {file} is a file; a folder")


def test_what_is_broken_is_one_line(write, tmp_path, refused):
    write("empty/train.jsonl", [])
    write("broken/train.jsonl", [{"a": 1}, "no json"])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "train.jsonl.gz").write_bytes(b"not zipped")

    def rows(name):
        return list(Source(str(tmp_path / name)).rows("train", FORMS)[1])

    for name in ("empty", "broken", "nothing", "zip"):
        assert str(tmp_path / name) in refused(lambda name=name: rows(name))
    assert "is empty" in refused(lambda: rows("empty"))


def test_a_hub_that_cannot_be_reached(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(lambda: Source("nobody/has-such-a-data-set", "part"))
    assert "nobody/has-such-a-data-set/part" in message
    assert "hub" in message and "cannot be reached" in message and "a local folder" in message


def test_a_long_folder_is_not_listed_whole(tmp_path):
    for number in range(13):
        (tmp_path / f"{number:02}").touch()
    assert inside(tmp_path) == "in it: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 3 more"
    (tmp_path / "new").mkdir()
    assert inside(tmp_path / "new") == "in it: nothing"


def test_one_in_three_distinct_keys_is_held_out_with_all_its_rows():
    rows = ["a1", "b1", "a2", "c1", "d1", "c2", "e1", "f1", "b2"]
    # distinct keys: a b c | d e f; of each stretch one is held out, by key: the second, and the sixth
    assert list(share(rows, lambda row: row[0], 3, True)) == ["b1", "f1", "b2"]
    assert list(share(rows, lambda row: row[0], 3, False)) == ["a1", "a2", "c1", "d1", "c2", "e1"]


@pytest.mark.parametrize(
    ("most", "prompts", "dropped"),
    [(None, "abc", {"bad": 2, "worse": 1}), (3, "abc", {"bad": 1, "worse": 1}), (2, "ab", {"bad": 1}), (1, "a", {})],
)
def test_as_many_as_are_asked_for_and_what_was_passed_over_on_the_way(most, prompts, dropped):
    a, b, c = (Example(prompt, None, None, {}) for prompt in "abc")
    found = usable(iter([a, "bad", b, "worse", c, "bad"]), most)
    assert "".join(row.prompt for row in found) == prompts
    assert found.dropped == dropped
