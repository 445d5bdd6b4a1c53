"""Rows of JSON, CSV and Parquet files."""

import json

import pytest

from apa_cli.datasets.row_file import abbreviate, find_split_file, read_row_file


@pytest.fixture
def read(tmp_path):
    """read(name, text): return the rows of a file with this text."""

    def rows(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        return list(read_row_file(tmp_path / name, "key"))

    return rows


def number(row):
    return int(row.place.rpartition(" ")[2])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a"])
def test_json_lines_and_a_json_array_are_told_apart_by_their_first_character(read, tmp_path, name):
    rows = read(name, '{"a": 1}\r\n\n {"a": "x\u2028"}')
    assert rows == [{"a": 1}, {"a": "x\u2028"}] and [row.place for row in rows] == [
        f"{tmp_path / name}, row 1",
        f"{tmp_path / name}, row 3",
    ]
    rows = read(name, '\ufeff\n [\n{"a":\n 1},\n{"a": 2}]\n')
    assert rows == [{"a": 1}, {"a": 2}] and [number(row) for row in rows] == [1, 2]
    assert read(name, " \n") == read(name, "[]") == []


def test_csv_cells_are_text_and_empty_ones_null(read):
    rows = read("a.csv", '\ufeffprompt, n ,x\r\n"a ""b"",\r\nc",007, NA\r\n\r\nd,,\r\n')
    assert rows == [{"prompt": 'a "b",\r\nc', "n": "007", "x": " NA"}, {"prompt": "d", "n": None, "x": None}]
    assert [number(row) for row in rows] == [2, 4]  # as a spreadsheet shows them


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.CSV", ",")])
def test_the_delimiter_is_the_most_frequent_one_of_the_header(read, name, delimiter):
    assert read(name, f"a{delimiter}b\n1{delimiter}2\n") == [{"a": "1", "b": "2"}]


def test_a_csv_file_of_one_column_and_long_cells(read):
    assert read("a.csv", "prompt\nx; y\n") == [{"prompt": "x; y"}]
    assert len(read("a.csv", f"prompt\n{'x' * 200_000}\n")[0]["prompt"]) == 200_000  # beyond csv's default limit
    assert read("a.csv", "") == read("a.csv", "prompt,b\n") == []


def test_parquet_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"m": [{"role": "user", "content": "x"}], "s": 0.5}, {"m": None, "s": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a [1].parquet")
    read = list(read_row_file(tmp_path / "a [1].parquet", "key"))
    assert read == rows and [number(row) for row in read] == [1, 2]


INVALID = {
    (
        "a.jsonl",
        '{"a": 1}\n{"a": 1\n',
    ): ", row 2: not JSON (Expecting ',' delimiter at line 2); one object per",
    ("a.jsonl", '{"a": 1} {"a": 2}'): ", row 1: not JSON (Extra data)",
    ("a.json", '{"a":\n 1}'): ", row 1: not JSON (Expecting value at line 2); one object per line, or one array of",
    ("a.json", '[{"a": 1},\n{"a": 1]'): ": not JSON (Expecting ',' delimiter at line 2)",
    ("a.jsonl", "null"): ", row 1: not an object with fields",
    ("a.jsonl", '[{"a": 1}, [1]]'): ", row 2: not an object with fields",
    ("a.json", '["p", "q"]'): ", row 1: not an object with fields; lines of text are for dataset=prompts",
    ("a.jsonl", "{" + '"a": {' * 9): ", row 1: not JSON (",
    ("a.jsonl", '{"a": ' + "[" * 100_000): ", row 1: JSON nested too deeply",
    ("a.jsonl", '{"a": ' + "9" * 5000 + "}"): ", row 1: Exceeds the limit",
    (
        "a.jsonl",
        '{"a": 1}\n{"a": "\\ud83d"}',
    ): ", row 2: half of a surrogate pair, which is no character, in '\\ud83d'",
    ("a.jsonl", '{"a": 1}\n{"\\ud83d": 1}'): ", row 2: half of a surrogate pair",
    ("a.jsonl", '{"a": [{"b": [["\\ud83d"]]}]}'): ", row 1: half of a surrogate pair",
    ("a.json", '[{"a": "\\uD83D\\uDE00"}, {"a": "x\\uDE00"}]'): ", row 2: half of a surrogate pair",
    ("a.csv", "a,b\n1,2\n1,2,3\n"): ', row 3: 3 cells, but the header has 2; put cells with a delimiter in "…"',
    ("a.csv", "a,b\n1\n"): ", row 2: 1 cells, but the header has 2",
    ("a.csv", "a,a\n1,2\n"): ", row 1: two columns have the same name, a, a",
    ("a.csv", 'a,b\n1,2\n"1,2\n'): ", row 3: not CSV (unexpected end of data)",
    ("a.csv", 'a,b\n1,"2"x\n'): ", row 2: not CSV (",
    ("a.parquet", "text"): ", after row 0: not Parquet (",
}


@pytest.mark.parametrize(("name", "text"), INVALID)
def test_invalid_rows_are_errors_with_file_and_row(read, tmp_path, error_line, name, text):
    assert error_line(lambda: read(name, text)).startswith(f"key: {tmp_path / name}{INVALID[name, text]}")


def test_a_whole_surrogate_pair_is_a_character(read):
    assert read("a.jsonl", '{"a": "\\ud83d\\ude00"}') == [{"a": "😀"}]


def test_an_absent_parquet_file(tmp_path, error_line):
    message = error_line(lambda: list(read_row_file(tmp_path / "a.parquet", "key")))
    assert message.startswith(f"key: cannot read {tmp_path / 'a.parquet'} (")


def test_the_file_of_a_split(tmp_path, error_line):
    assert find_split_file(tmp_path, "train") is None
    (tmp_path / "train.csv.gz").touch()
    assert find_split_file(tmp_path, "train") == tmp_path / "train.csv.gz"
    (tmp_path / "train.json").touch()
    message = error_line(lambda: find_split_file(tmp_path, "train"))
    assert message == f"dataset.path: both train.json and train.csv.gz are in {tmp_path}; remove one"


def test_values_are_abbreviated_as_json():
    assert abbreviate({"a": None}) == json.dumps({"a": None}) and abbreviate("é" * 70) == '"' + "é" * 59 + "…"
