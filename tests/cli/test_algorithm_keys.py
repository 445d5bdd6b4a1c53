"""Wrong values of every key of every algorithm: exit status 2, one line that names the key, nothing written."""

import re
import sys
import types
import typing
from dataclasses import fields
from functools import cache

import pytest

from apa_cli.cli.app import run_command
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.explain import LAMBDA
from apa_cli.config.hydra_api import find_config_dir, list_groups, to_dict
from apa_cli.settings import Config
from apa_cli.types import Range

ALGORITHMS = sorted(list_groups(None)["algo"])
FEW = [name if name in ("a2po", "dpo", "ppo") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
"""All of them, of which the quick tests run three: with a plan of its own, in pairs, with a critic."""
LINK = f"${{{LAMBDA}}}"
"""Value, in a yaml, of the keys that `lambda` sets."""


REFUSED = {
    **dict.fromkeys(("lambda_", "beta", "beta1", "beta2", "inverse_eta", "kl_target", "kl_horizon"), ("0",)),
    **dict.fromkeys(("score_clip", "weight_clip", "value_clip_range", "clip_range_high", "max_new_tokens"), ("0",)),
    **dict.fromkeys(("kl_coef", "value_coef", "entropy_coef"), ("-0.01",)),
    **dict.fromkeys(("gamma", "gae_lambda"), ("-0.01", "1.01")),
    "clip_range": ("0", "1"),
}
"""Field → numbers just out of its range; of other fields, the ranges of their types say which."""


@cache
def make_config(name: str) -> Config:
    """Return the configuration of an algorithm as its yaml has it."""
    return build_config(compose([f"algo={name}"]))


@cache
def list_linked_keys(name: str) -> list[str]:
    """Return the keys of an algorithm that `lambda` sets."""
    return [key for key, value in to_dict(compose([f"algo={name}"]).algo).items() if value == LINK]


def list_values_outside(allowed: Range, is_whole: bool) -> list[str]:
    """Return the numbers next to the ends of a range that it does not contain."""
    step, found = 1 if is_whole else 0.01, []
    if allowed.low is not None:
        found.append(allowed.low if allowed.open_low else allowed.low - step)
    if allowed.high is not None:
        found.append(allowed.high if allowed.open_high else allowed.high + step)
    return [f"{value:g}" for value in found]


def list_wrong_values(field: str, hint: object) -> list[str]:
    """Return values that a field of this type must refuse: of other types, or out of range."""
    ranges = getattr(hint, "__metadata__", ())
    kind = typing.get_args(hint)[0] if ranges else hint
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    is_whole = int in kinds
    wrong = ["maybe", "[1,2]", *(["nan"] if is_whole or float in kinds else []), *(["1.5"] if is_whole else [])]
    outside = [value for allowed in ranges for value in list_values_outside(allowed, is_whole)]
    return list(dict.fromkeys([*wrong, *outside, *REFUSED.get(field, ())]))


def is_null_documented(name: str, field: str) -> bool:
    """Return True if the comment above a key of an algorithm's yaml, or of the yaml that it shares, explains null."""
    folder = find_config_dir() / "algo"
    texts = [file.read_text() for file in (folder / f"{name}.yaml", *sorted(folder.glob("_*.yaml")))]
    comments = [re.search(rf"((?: *#.*\n)*) *\b{field}:", text) for text in texts]
    return "null" in next(found for found in comments if found).group(1)


def list_keys(name: str) -> list[tuple[str, str, object]]:
    """Return every key of an algorithm that a user may set, `lambda` among them, each with its field and type.

    A key that `lambda` sets may be set if `lambda` sets another one too.
    """
    kind = type(make_config(name).algo)
    hints, linked = typing.get_type_hints(kind, include_extras=True), list_linked_keys(name)
    names = [f.name for f in fields(kind)]
    own = [(f"algo.{field}", field, hints[field]) for field in names if field not in linked or len(linked) > 1]
    return [*own, *((LAMBDA, field, hints[field]) for field in linked)]


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


@pytest.mark.parametrize("name", FEW)
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


@pytest.mark.parametrize("name", FEW)
def test_plans_that_do_not_fit_are_refused(name, assert_refused, answer):
    for plan in sorted(list_groups(None)["plan"]):
        overrides = [f"algo={name}", f"plan={plan}"]
        if plan in make_config(name).algo.plans:
            assert answer(*overrides) == (0, "")
        else:
            assert_refused("plan", *overrides)


@pytest.mark.parametrize("name", FEW)
def test_keys_that_lambda_sets_are_refused(name, assert_refused):
    keys = list_linked_keys(name)
    assert bool(keys) == (make_config(name).algo.lambda_meaning is not None)
    if keys:
        assert_refused(LAMBDA, f"algo={name}", *(f"algo.{key}=0.5" for key in keys))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_wrong_values_and_misspelt_keys_are_refused(name, assert_refused, answer):
    for number, (key, field, hint) in enumerate(list_keys(name)):
        for value in list_wrong_values(field, hint):
            assert_refused(key, f"algo={name}", f"{key}={value}")
        if is_null_documented(name, field):
            assert answer(f"algo={name}", f"{key}=null") == (0, "")
        else:
            assert_refused(key, f"algo={name}", f"{key}=null")
        if key != LAMBDA:
            misspelt = "algo." + [field[:-1], f"{field}x", f"x{field}", field.upper()][number % 4]
            assert_refused(misspelt, f"algo={name}", f"{misspelt}=1")
            assert_refused(key, f"algo={name}", f"~{key}")
    for target in ("null", "nowhere:Nothing", "apa_cli.types:Range"):
        assert_refused("algo._target_", f"algo={name}", f"algo._target_={target}")
