"""Hundreds of wrong words, by seed, given to the commands in this process: one line that names the key, never more."""

import random
import re
import sys

import pytest

from apa_cli.cli.app import run_command
from apa_cli.config.hydra_api import find_config_dir

COMMANDS = {"apa-train": (), "apa-sft": (), "apa-reward": (), "apa-eval": ("run", "model.path"),
            "apa-export": ("run",), "apa-chat": ("run", "model.path")}  # fmt: skip
VALUES = [
    "", "null", "true", "maybe", "-1", "0", "1", "1.5", "1e400", "-1e-400", "nan", "inf", "9" * 40, "0x10",
    "abc", "a b", "ä€😀", "\u202e", "[", "]", "{", "}", "[]", "{}", "[1", "{a:", "[1,[2]", "{a:1}",
    "[{use: vadr}]", "[{use: 3}]", "[{}]", "[{use: vader, weight: x}]", "[{use: vader, nmae: y}]",
    "[{use: sum, parts: [vadr]}]", "[{use: sum, parts: [{use: sum, parts: {}}]}]", "[null]", "[[vader]]", "'",
    '"', "'a", '"a', "\\", "\\'", "${", "${x", "${x}", "${seed}", "${name}", "${lambda}", "${oc.env:HOME}",
    "${oc.env:SECRET_KEY}", "${oc.decode:[1}", "${foo:1}", "${run_directory:1}", "${..}", "$", "%", "a=b", "=",
    "==", "a,b", "1,2", ",", "choice(1,2)", "glob(*)", "range(1,3)", "sort(3,1)", "int(x)", "str(",
    "float(nan)", "tag(a,b)", "extend_list(1)", "???", "~", "*", "&a", "!a",
    "!!python/object/apply:os.system [true]", "a: b", "a/b", "../..", "/proc/x/y", "~/x", "\t", "\n", "a\nb",
    "-", "--", "#", "apa", "ppo", "a2po", "online_init", "vader", "[apa]", "x" * 300, "{_target_: os.system}",
    "{_target_: pathlib.Path}", "file:///x", "[a,b,c]",
]  # fmt: skip


def keys() -> list[str]:
    """Every key of every yaml, and every group."""
    found = {folder.name for folder in find_config_dir().iterdir() if folder.is_dir()}
    for file in find_config_dir().rglob("*.yaml"):
        group = file.relative_to(find_config_dir()).parts[0]
        section = "" if file.parent == find_config_dir() or group == "experiment" else f"{group}."
        text = file.read_text()
        found |= {f"{section}{name}" for name in re.findall(r"^(\w+):", text, flags=re.M)}
        if group == "algo":
            found |= {f"algo.{name}" for name in re.findall(r"^  (\w+):", text, flags=re.M)}
    return sorted(found | {"model.architecture.hidden_size", "reward.parts", "dataset.path", "lambda"})


def misspelt(key: str, rng: random.Random) -> str:
    """A key with a letter too many, too few, swapped or of another alphabet, or with parts too many or too few."""
    place = rng.randrange(len(key))
    return rng.choice(
        [
            key[:place] + key[place + 1 :],
            key[:place] + key[place] + key[place:],
            key[:place] + rng.choice("xyz._/@:-ä ") + key[place:],
            key[:place] + key[place:][1::-1] + key[place + 2 :],
            key.upper(), f"{key}.x", f"x.{key}", key.partition(".")[2], f"{key}@x", f".{key}", f"{key}.", f"{key}[0]",
        ]
    )  # fmt: skip


def words(rng: random.Random, names: list[str]) -> list[str]:
    """One to three words, of which at least one is probably wrong."""
    found = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key = rng.choice(names)
        key = misspelt(key, rng) if rng.random() < 0.3 else key
        sign = rng.choice(["", "", "", "", "+", "++", "~"])
        word = f"{sign}{key}={rng.choice(VALUES)}"
        found.append(rng.choice([word] * 8 + [word.replace("=", ""), f"{sign}{key}"]))
    if rng.random() < 0.1:
        found.append(rng.choice(found))
    if rng.random() < 0.1:
        found.insert(
            0, rng.choice(["-m", "--cfg=job", "--nonsense", "-x", "--cfg=none", "--config-dir=nowhere", "--info"])
        )
    return found


@pytest.fixture
def answer(monkeypatch, tmp_path, capfd):
    """answer(command, words) → (exit status, what went to stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def ask(command: str, given: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [command, *given])
        status = 0
        try:
            run_command(command, lambda settings: None, COMMANDS[command])
        except SystemExit as error:
            status = error.code
        return status, capfd.readouterr().err

    return ask


def check(given: list[str], status: int, said: str, command: str) -> None:
    if status == 0:
        assert said == ""
        return
    assert status == 2, (status, said)
    assert said.startswith(f"{command}: ") and said.count("\n") == 1 and said.endswith("\n")
    assert len(said) > len(command) + 10 and "Traceback" not in said
    parts = {part for word in given for part in re.findall(r"[\w.]+", word)} | set(given)
    parts |= {part.rpartition(".")[2] for part in parts} | {part.partition(".")[0] for part in parts}
    assert any(part and part in said for part in parts) or "run: a model is needed" in said or "''" in said


def fuzz(answer, seeds) -> None:
    names = keys()
    for seed in seeds:
        rng = random.Random(seed)
        command = rng.choice(list(COMMANDS))
        given = words(rng, names)
        try:
            check(given, *answer(command, given), command)
        except BaseException as error:
            error.add_note(f"seed {seed}: {command} {given}")
            raise


def test_wrong_words_end_in_one_line(answer):
    fuzz(answer, range(60))


@pytest.mark.parametrize(
    "given",
    [
        ["name=/proc/x/y"], [f"name={'x' * 300}"], ["hydra.run.dir=/proc/x"],
        ["-m", "hydra.sweep.dir=/proc/x", "seed=1,2"],
        ["--config-name", "x"], ["--config-path", "nowhere"], ["--nonsense"], ["--cfg", "none"], ["-m", "seed=glob(*)"],
    ],
    ids=str,
)  # fmt: skip
def test_what_only_hydra_finds_is_one_line_too(given, answer):
    status, said = answer("apa-train", given)
    assert status in (1, 2) and said.startswith("apa-train: ") and said.count("\n") == 1


@pytest.mark.slow
def test_many_more_wrong_words_end_in_one_line(answer):
    fuzz(answer, range(1000, 2000))
