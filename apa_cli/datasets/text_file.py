"""The rule by which users' text is read: UTF-8, lines that end at \\n, \\r\\n or \\r only, gzip by content."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from apa_cli.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order mark → encoding; UTF-32 first, since its little-endian mark begins with that of UTF-16."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
LONE_CARRIAGE_RETURN = re.compile(rb"(?<=\r)(?!\n|\Z)")


def read_text_lines(file: Path, key: str) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a file, line end included, byte order mark dropped.

    Other separators, such as U+2028 and form feeds, are characters of a line. Raise UserError naming `key`, file and,
    for text that is not UTF-8, row.
    """
    number = 0
    if file.exists() and not (file.is_file() or file.is_dir()):  # a pipe cannot be read for one split after the other
        raise UserError(f"{key}: {file} is not a regular file; save its content in one")
    try:
        with open(file, "rb") as raw:
            is_gzip = raw.peek(2)[:2] == GZIP_MAGIC
            for line in gzip.GzipFile(fileobj=raw) if is_gzip else raw:
                for part in LONE_CARRIAGE_RETURN.split(line) if b"\r" in line else [line]:
                    number += 1
                    try:
                        text = decode_text(part, is_start=number == 1)
                    except ValueError as error:
                        raise UserError(f"{key}: {file}, row {number}: {error}") from error
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: cannot read {file} ({reason})") from error


def decode_text(data: bytes, is_start: bool = False) -> str:
    """Return UTF-8 text, without a byte order mark if it `is_start`. Raise ValueError, for the user, for other bytes.

    NUL bytes are refused as well: text in UTF-16 without a byte order mark consists of them, and so do binary files.
    """
    if is_start:
        for mark, encoding in OTHER_ENCODINGS.items():
            if data.startswith(mark):
                raise ValueError(f"{encoding}, not UTF-8; convert it, as by iconv -f {encoding} -t UTF-8")
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start + 1}); convert it, as by "
            "iconv -f LATIN1 -t UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError("a NUL byte; text in UTF-8 is needed, not UTF-16 or a binary file")
    return text


def strip_line_end(line: str) -> str:
    """Return a line without its \\n, \\r\\n or \\r."""
    return line.removesuffix("\n").removesuffix("\r")


def has_lone_surrogate(text: str) -> bool:
    """Return True if half of a surrogate pair stands alone in the text, which no encoding can represent."""
    return LONE_SURROGATE.search(text) is not None
