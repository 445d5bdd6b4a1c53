"""A run that continues on other data, models or code than before: refused, allowed by name, or said of a fork."""

import json
import shutil

import pytest

from apa_cli.errors import ConfigError
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.files import read_config
from apa_cli.runs.resume import find_changed_inputs, may_change
from apa_cli.training.launch import start_training

ROWS = [{"prompt": f"Human number {n} asks", "chosen": "yes", "rejected": "no", "level": n % 3} for n in range(40)]
REWARD = (
    "from lengths import count\n\n\ndef score(prompts, responses, level):\n    return [count(r) for r in responses]\n"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny):
    """A folder with data, a reward function and a module that it imports, and a copy of the tiny model."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "reward.py").write_text(REWARD)
    (folder / "lengths.py").write_text("def count(text):\n    return float(len(text))\n")
    shutil.copytree(tiny, folder / "model")
    return folder


def list_overrides(folder) -> list[str]:
    return [
        "dataset=jsonl", f"dataset.path={folder}/data.jsonl", "~dataset.train_prompts", "~dataset.test_prompts",
        f"reward.target={folder}/reward.py:score", f"model.path={folder}/model", "iterations=1", "evaluation.prompts=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(inputs, train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished") / "run", *list_overrides(inputs))


@pytest.fixture
def change(inputs):
    """change(name, edit) replaces a file of the inputs by edit(its content), b"" for none, until the test ends."""
    before = {}

    def write(name, edit):
        file = inputs / name
        before[file] = file.read_bytes() if file.exists() else None
        file.write_bytes(edit(before[file] or b""))

    yield write
    for file, content in before.items():
        file.unlink() if content is None else file.write_bytes(content)


CHANGES = {
    "dataset.train (rows to train on), dataset.test (held-out rows; some may have been trained on)": (
        "data.jsonl",
        lambda text: b'{"prompt": "A new one", "chosen": "a", "rejected": "b", "level": 1}\n' + text,
    ),
    "dataset.train (rows to train on)": ("data.jsonl", lambda text: text.replace(b'"level": 1', b'"level": 2')),
    "reward.target": ("lengths.py", lambda text: text.replace(b"len(text)", b"len(text) + 1")),
    "model.tokenizer.chat_template (chat template)": ("model/chat_template.jinja", lambda text: b"{{ messages }}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("changed", CHANGES)
def test_a_resume_on_changed_inputs_is_refused_unless_allowed(changed, finished, inputs, train, change, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    change(*CHANGES[changed])
    overrides = [*list_overrides(inputs), "iterations=2"]
    records = (run / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError) as error:
        train(run, *overrides, f"resume={run}")
    message = str(error.value)
    assert message.startswith(f"resume: the content of inputs differs from the run's: {changed}")
    assert "\n" not in message and (run / "metrics.jsonl").read_text() == records
    keys = message.partition("resume_changed=[")[2].partition("]")[0]
    train(run, *overrides, f"resume={run}", f"resume_changed=[{keys}]")
    assert f"resume: the content of inputs has changed: {changed}" in (run / "run.log").read_text()
    fork = train(tmp_path / "fork", *overrides, f"fork={finished}")
    assert f"fork: the content of inputs has changed: {changed}" in (fork / "run.log").read_text()


@pytest.mark.slow
def test_the_same_inputs_in_another_place_are_no_change(finished, inputs, make_config, tmp_path):
    run, copy = shutil.copytree(finished, tmp_path / "run"), shutil.copytree(inputs, tmp_path / "copy")
    moved = [f"model.path={copy}/model", f"reward.target={copy}/reward.py:score"]
    config = make_config("name=run", *list_overrides(inputs), *moved, "iterations=2", f"resume={run}")
    start_training(config, run, None)
    assert read_config(run)["model"]["path"] == f"{copy}/model"
    RunDirectory(finished).check_resume(config.raw)
    (copy / "lengths.py").write_text("def count(text):\n    return 0.0\n")
    with pytest.raises(ConfigError, match=r"differs from the run's: reward\.target: '.*' → '.*copy/reward\.py:score'"):
        RunDirectory(finished).check_resume(config.raw)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inputs", "copy"])
def test_another_function_of_the_same_file_is_a_change(place, finished, inputs, make_config, tmp_path):
    folder = inputs if place == "inputs" else shutil.copytree(inputs, tmp_path / "copy")
    other = make_config(*list_overrides(inputs), f"reward.target={folder}/reward.py:count", f"resume={finished}")
    with pytest.raises(ConfigError, match=r"differs from the run's: reward\.target: '.*:score' → '.*:count'"):
        RunDirectory(finished).check_resume(other.raw)


def test_inputs_on_one_side_alone_are_left_to_the_configuration():
    assert find_changed_inputs({"a": "1", "b": "2", "gone": "3"}, {"a": "1", "b": "x", "new": "4"}) == ["b"]


@pytest.mark.parametrize(
    ("key", "allowed", "may"),
    [
        ("dataset.test", ["dataset"], True),
        ("dataset.test", ["dataset.path"], True),
        ("dataset.test", ["dataset.train"], True),
        ("model.tokenizer", ["model.path"], True),
        ("model.tokenizer.chat_template", ["model.tokenizer"], True),
        ("model.tokenizer", ["model.dtype"], False),
        ("model.path", ["model.tokenizer"], False),
        ("reward.parts.0.path", ["reward.parts"], True),
        ("reward.target", ["dataset", "model"], False),
    ],
)
def test_keys_that_allow_an_input_to_differ(key, allowed, may):
    assert may_change(key, allowed) is may
