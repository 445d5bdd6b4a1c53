"""One line for overrides that cannot be composed: paths with Hydra's characters, mappings."""

import pytest

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.errors import ConfigError

JSONL = ["dataset=jsonl", "dataset.path=x.jsonl"]


def explain(*overrides):
    with pytest.raises(ConfigError) as error:
        build_config(compose([*JSONL, *overrides]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key", ["dataset.path", "model.path", "reward.path", "dataset.held_out_path", "resume"])
@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("a [1].jsonl", "'a [1].jsonl'"),
        ("a (1)", "'a (1)'"),
        ("a{b}", "'a{b}'"),
        ("a'b", r"'a\\'b'"),  # the shell keeps one of the backslashes, which Hydra takes as part of the quote
        ('a"b$', r"'a\"b\$'"),
        ("é#~;", "'é#~;'"),
    ],
)
def test_a_path_with_other_characters_is_shown_in_quotes(key, value, quoted):
    message = explain(f"{key}={value}")
    assert message.startswith(f"{f'{key}={value}'!r}: not an override (")
    assert message.endswith(f'; quote the value twice, "{key}={quoted}"')


@pytest.mark.parametrize("key", ["dataset.path", "model.path"])
def test_a_path_with_a_comma_is_shown_in_quotes(key):
    assert explain(f"{key}=a,b") == (
        f"{key}: several values need -m (a sweep), a path with a comma quotes, \"{key}='a,b'\""
    )


def test_other_keys_with_several_values_are_explained_as_before():
    assert explain("seed=1,2").endswith("several values need -m (a sweep), a list needs brackets")


def test_mappings():
    assert explain("dataset.columns={prompt: q, chosn: a}") == (
        "dataset.columns.chosn: unknown key; did you mean 'dataset.columns.chosen'?"
    )
    assert explain("dataset.columns.promt=q") == (
        "dataset.columns.promt: unknown key; did you mean 'dataset.columns.prompt'?"
    )
    assert explain("dataset.columns=q") == "dataset.columns: 'q' is not a mapping, as {name: value}"
    assert explain("dataset.columns={prompt: [a]}") == "dataset: columns.prompt: ['a'] is not the name of a column"
    split_by_shell = "dataset.columns={prompt:"
    assert explain(split_by_shell).endswith("quote the whole override, as 'key={name: value}' or 'key=[value, value]'")


@pytest.mark.parametrize("override", ["dataset.columns={prompt: q}", "dataset.columns.prompt=q"])
def test_columns_can_be_given_one_by_one_or_together(override):
    columns = build_config(compose([*JSONL, override])).dataset.columns
    assert columns["prompt"] == "q" and {columns[name] for name in columns if name != "prompt"} == {None}


def test_a_file_or_hub_data_set_as_the_option_is_answered_with_jsonl():
    for path in ("rows.csv", "rows.jsonl.gz", "owner/name"):
        with pytest.raises(ConfigError, match=rf"give dataset=jsonl dataset\.path={path}"):
            compose([f"dataset={path}"])
    with pytest.raises(ConfigError, match=r"give dataset=jsonl dataset\.path=FILE_FOLDER_OR_HUB_ID"):
        compose(["dataset=csv"])
