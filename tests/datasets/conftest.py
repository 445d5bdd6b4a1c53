"""Small data sets written as the hub's repositories lay them out, and the real ones beside the repository."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apa_cli.errors import UserError


@pytest.fixture
def write(tmp_path) -> Callable[[str, list], Path]:
    """write("a/train.jsonl.gz", rows) → that file in the test's own folder; a row that is a text is a line as it is."""

    def make(name: str, rows: list) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if file.suffix == ".gz" else open)(file, "wt", encoding="utf-8") as lines:
            lines.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        return file

    return make


@pytest.fixture
def refused(capfd) -> Callable[[Callable], str]:
    """refused(call) → the one line of the UserError that the call ends in; nothing else is printed."""

    def message(call: Callable) -> str:
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")
        return str(caught.value)

    return message


@pytest.fixture(scope="session")
def real(shared) -> Callable[[str], Path]:
    """real(name) → the folder of a real data set beside the repository."""

    def folder(name: str) -> Path:
        found = shared / "data" / name
        if not found.is_dir():
            pytest.skip(f"no folder `data/{name}` in `shared` beside the repository")
        return found

    return folder
