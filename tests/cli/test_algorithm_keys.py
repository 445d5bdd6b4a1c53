"""Wrong values of every key of every algorithm: exit status 2, one line that names the key, nothing written."""

import re
import sys
import types
import typing
from dataclasses import fields
from enum import Enum
from functools import cache

import pytest

from apa_cli.cli.app import run_command
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.explain import LAMBDA
from apa_cli.config.hydra_api import list_groups, to_dict
from apa_cli.settings import Config
from apa_cli.types import Range

ALGORITHMS = sorted(list_groups(None)["algo"])
LINK = f"${{{LAMBDA}}}"
"""Value, in a yaml, of the keys that `lambda` sets."""


@cache
def make_config(name: str) -> Config:
    """Return the configuration of an algorithm as its yaml has it."""
    return build_config(compose([f"algo={name}"]))


@cache
def list_linked_keys(name: str) -> list[str]:
    """Return the keys of an algorithm that `lambda` sets."""
    return [key for key, value in to_dict(compose([f"algo={name}"]).algo).items() if value == LINK]


def list_values_outside(allowed: Range, is_whole: bool) -> list[float]:
    """Return the numbers next to the ends of a range that it does not contain."""
    step, found = 1 if is_whole else 0.01, []
    if allowed.low is not None:
        found.append(allowed.low if allowed.open_low else allowed.low - step)
    if allowed.high is not None:
        found.append(allowed.high if allowed.open_high else allowed.high + step)
    return [int(value) if is_whole else value for value in found]


def list_wrong_values(hint: object) -> list[object]:
    """Return values that a field of this type must refuse: of other types, null, out of range."""
    ranges = getattr(hint, "__metadata__", ())
    kind = typing.get_args(hint)[0] if ranges else hint
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    is_whole = int in kinds
    wrong: list[object] = ["maybe", "[1,2]"] + ([] if type(None) in kinds else ["null"])
    if is_whole or float in kinds:
        wrong += ["nan", *(["1.5"] if is_whole else [])]
    return wrong + [value for allowed in ranges for value in list_values_outside(allowed, is_whole)]


def list_keys(name: str) -> dict[str, object]:
    """Return the keys that a user sets, `lambda` for those that it sets, with their types."""
    kind = type(make_config(name).algo)
    hints, linked = typing.get_type_hints(kind, include_extras=True), list_linked_keys(name)
    return {LAMBDA if f.name in linked else f"algo.{f.name}": hints[f.name] for f in fields(kind)}


@pytest.fixture
def answer(monkeypatch, tmp_path, capfd):
    """answer(*overrides) → (exit status, stderr) of apa-train, which checks them but does not train."""
    monkeypatch.chdir(tmp_path)

    def ask(*overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["apa-train", *overrides])
        status = 0
        try:
            run_command("apa-train", lambda job: None)
        except SystemExit as error:
            status = error.code
        return status, capfd.readouterr().err

    return ask


@pytest.fixture
def assert_refused(answer, tmp_path):
    """assert_refused(key, *overrides): the status is 2, the one line begins with the key, and no file is written.

    Of a deletion, `~key`, the line begins with that if Hydra refuses it.
    """

    def check(key: str, *overrides: str) -> None:
        status, errors = answer(*overrides)
        assert status == 2, (overrides, errors)
        name = f"({re.escape(key)}|'~{re.escape(key)}')" if f"~{key}" in overrides else re.escape(key)
        assert re.fullmatch(rf"apa-train: {name}: .{{10,}}\n", errors), (overrides, errors)
        assert not list(tmp_path.iterdir()), overrides

    return check


@pytest.mark.parametrize("name", ALGORITHMS)
def test_numbers_of_samples_that_do_not_fit_are_refused(name, assert_refused):
    needs = make_config(name).needs
    wrong = [0, *([needs.least_samples - 1] if needs.least_samples > 1 else [])]
    wrong += [needs.least_samples + 1] if needs.samples_multiple > 1 else []
    for samples in wrong:
        assert_refused("samples_per_prompt", f"algo={name}", f"samples_per_prompt={samples}")


@pytest.mark.parametrize(
    "override", ["algo=apa algo.advantage_estimator=group_mean", "algo=reinforce_pp algo.baseline=group_mean"]
)
def test_group_mean_of_one_sample_is_refused(override, assert_refused, answer):
    assert answer(*override.split()) == (0, "")
    assert_refused("samples_per_prompt", *override.split(), "samples_per_prompt=1")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_plans_that_do_not_fit_are_refused(name, assert_refused, answer):
    for plan in sorted(list_groups(None)["plan"]):
        overrides = [f"algo={name}", f"plan={plan}"]
        if plan in make_config(name).algo.plans:
            assert answer(*overrides) == (0, "")
        else:
            assert_refused("plan", *overrides)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_keys_that_lambda_sets_are_refused(name, assert_refused):
    keys = list_linked_keys(name)
    assert keys
    assert_refused(LAMBDA, f"algo={name}", *(f"algo.{key}=0.5" for key in keys))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_wrong_values_and_misspelt_keys_are_refused(name, assert_refused):
    keys = list_keys(name)
    assert LAMBDA in keys
    for number, (key, hint) in enumerate(keys.items()):
        for value in list_wrong_values(hint):
            assert_refused(key, f"algo={name}", f"{key}={value}")
        if key != LAMBDA:
            section, _, field = key.partition(".")
            misspelt = f"{section}.{[field[:-1], f'{field}x', f'x{field}', field.upper()][number % 4]}"
            assert_refused(misspelt, f"algo={name}", f"{misspelt}=1")
            assert_refused(key, f"algo={name}", f"~{key}")
    for target in ("null", "nowhere:Nothing", "apa_cli.types:Range"):
        assert_refused("algo._target_", f"algo={name}", f"algo._target_={target}")
