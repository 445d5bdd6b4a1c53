"""The rule by which users' text is read."""

import codecs
import gzip
import os

import pytest

from apa_cli.datasets.text_file import read_text_lines, strip_line_end


@pytest.fixture
def read(tmp_path):
    """read(data): return the numbered lines of a file with these bytes."""

    def lines(data):
        (tmp_path / "file").write_bytes(data)
        return list(read_text_lines(tmp_path / "file", "key"))

    return lines


def test_lines_end_at_newline_or_carriage_return_only(read):
    text = "a\u2028b\x85\x0c\x1c\n\nb\r\nc\rd\r\r\n"
    assert read(text.encode()) == [
        (1, "a\u2028b\x85\x0c\x1c\n"), (2, "\n"), (3, "b\r\n"), (4, "c\r"), (5, "d\r"), (6, "\r\n"),
    ]  # fmt: skip
    assert read(b"") == [] and read(b"a\r") == [(1, "a\r")]


def test_a_byte_order_mark_is_dropped_at_the_start_only(read):
    assert read(codecs.BOM_UTF8 + "é\n\ufeffb".encode()) == [(1, "é\n"), (2, "\ufeffb")]


def test_line_ends_are_stripped_once():
    assert [strip_line_end(line) for line in ("a\n", "a\r\n", "a\r", "a \n", "a")] == ["a", "a", "a", "a ", "a"]


def test_gzip_is_recognized_by_content(read):
    assert read(gzip.compress(b"a\nb", mtime=0)) == [(1, "a\n"), (2, "b")]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"a\nb\r\ncaf\xe9 \n", "row 3: not UTF-8 (byte 0xe9 at position 4); convert it, as by iconv -f LATIN1"),
        (b"a\rb\rcaf\xe9\r", "row 3: not UTF-8 (byte 0xe9 at position 4)"),
        (b"a\n\xed\xa0\xbd\n", "row 2: not UTF-8 (byte 0xed at position 1)"),  # half of a surrogate pair
        ("a\n".encode("utf-16"), "row 1: UTF-16, not UTF-8; convert it, as by iconv -f UTF-16 -t UTF-8"),
        (codecs.BOM_UTF16_BE + "a\n".encode("utf-16-be"), "row 1: UTF-16, not UTF-8"),
        ("a\n".encode("utf-32"), "row 1: UTF-32, not UTF-8"),
        ("a\n".encode("utf-16-le"), "row 1: a NUL byte; text in UTF-8 is needed, not UTF-16 or a binary file"),
        (gzip.compress(b"a\n\xff\n", mtime=0), "row 2: not UTF-8 (byte 0xff at position 1)"),
    ],
)
def test_other_encodings_are_errors_with_file_and_row(read, tmp_path, error_line, data, problem):
    assert error_line(lambda: read(data)).startswith(f"key: {tmp_path / 'file'}, {problem}")


def test_files_that_cannot_be_read_are_errors_of_one_line(read, tmp_path, error_line):
    absent = tmp_path / "absent"
    assert (
        error_line(lambda: list(read_text_lines(absent, "key")))
        == f"key: cannot read {absent} (No such file or directory)"
    )
    message = error_line(lambda: list(read_text_lines(tmp_path, "key")))
    assert message == f"key: cannot read {tmp_path} (Is a directory)"
    assert error_line(lambda: read(gzip.compress(b"a" * 99)[:-9])).startswith(f"key: cannot read {tmp_path / 'file'} (")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    message = error_line(lambda: list(read_text_lines(tmp_path / "pipe", "key")))
    assert message == f"key: {tmp_path / 'pipe'} is not a regular file; save its content in one"
