"""Overrides whose values are existing paths with characters of Hydra's grammar."""

import pytest

from apa_cli.cli.app import quote_path
from apa_cli.config.hydra_api import parse_override

NAMES = ["a b", "a [1]", "a,b", "(a)", "a{b}", "a=b", "a'b", 'a"b', "a#~;&?*!", "é", "[a]", "1_0", "null", "a:b", " a"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["dataset.path", "model.path", "+dataset.held_out_path", "stages.cache_dir", "resume"])
def test_an_existing_path_needs_no_quotes_for_hydra(tmp_path, monkeypatch, key, name):
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert parse_override(quote_path(f"{key}={name}")).value() == name


def test_the_file_of_a_target(tmp_path):
    (tmp_path / "my (1).py").touch()
    override = f"reward.target={tmp_path}/my (1).py:score"
    assert parse_override(quote_path(override)).value() == f"{tmp_path}/my (1).py:score"


@pytest.mark.parametrize(
    "override", ["dataset.path=a,b", "dataset.path='a,b'", "name=x,y", "dataset.path=a.jsonl", "seed"]
)
def test_other_overrides_stay_as_they_are(tmp_path, monkeypatch, override):
    monkeypatch.chdir(tmp_path)
    for name in ("x,y", "a.jsonl", "'a,b'"):
        (tmp_path / name).touch()
    assert quote_path(override) == override
