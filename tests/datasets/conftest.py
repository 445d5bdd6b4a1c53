"""Small data sets with the layout of the hub's repositories, and the real data sets beside the repository."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apa_cli.errors import UserError


@pytest.fixture
def write(tmp_path) -> Callable[[str, list], Path]:
    """write("a/train.jsonl.gz", rows): write a file in the test's folder, return its path; text rows are raw lines."""

    def make(name: str, rows: list) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if file.suffix == ".gz" else open)(file, "wt", encoding="utf-8") as lines:
            lines.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        return file

    return make


@pytest.fixture
def error_line(capfd) -> Callable[[Callable], str]:
    """error_line(call): return the message, one line, of the UserError that the call raises without printing."""

    def message(call: Callable) -> str:
        with pytest.raises(UserError) as error_info:
            call()
        assert "\n" not in str(error_info.value)
        assert capfd.readouterr() == ("", "")
        return str(error_info.value)

    return message


@pytest.fixture(scope="session")
def real(shared) -> Callable[[str], Path]:
    """real(name): return the folder of a real data set beside the repository; skip the test without it."""

    def folder(name: str) -> Path:
        path = shared / "data" / name
        if not path.is_dir():
            pytest.skip(f"no folder `data/{name}` in `shared` beside the repository")
        return path

    return folder
