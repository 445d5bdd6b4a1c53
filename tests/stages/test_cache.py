"""The cache of stage models: what its key holds, failed builds, and runs that share a stage."""

import json
from dataclasses import replace

import pytest

from apa_cli.stages import cache
from apa_cli.training.launch import start_training
from apa_cli.types import Example


@pytest.fixture
def build():
    """Return a stand-in for a stage that counts its calls."""

    def builder(folder):
        builder.calls += 1
        (folder / "weights").write_text("some")
        if builder.fails:
            raise RuntimeError("out of memory")
        return {"accuracy": 0.5}

    builder.calls, builder.fails = 0, False
    return builder


@pytest.fixture
def find_or_build(make_config, tmp_path, build):
    """Return a function (*overrides, key=, rows=, stage=) → the folder of the cached stage model."""

    def call(*overrides, key=None, rows=(), stage="sft"):
        config = make_config(f"stages.cache_dir={tmp_path}/cache", *overrides)
        return cache.find_or_build(config, stage, key or {"lr": 1}, [list(rows), []], build, lambda text: None)

    return call


def test_a_stage_is_built_once(find_or_build, build):
    folder = find_or_build()
    assert (folder / "weights").read_text() == "some"
    assert json.loads((folder / "stage.json").read_text())["result"] == {"accuracy": 0.5}
    assert find_or_build() == folder and build.calls == 1


def test_the_cache_key_holds_what_determines_a_stage_but_not_the_runs_seed(find_or_build, build):
    row = Example("prompt", "good", "bad", {})
    folders = [
        find_or_build(),
        find_or_build("stages.seed=1"),
        find_or_build(key={"lr": 2}),
        find_or_build(rows=[row]),
        find_or_build(rows=[replace(row, chosen="better")]),
        find_or_build(rows=[replace(row, rejected="worse")]),
        find_or_build(stage="reward"),
    ]
    assert len(set(folders)) == build.calls == 7
    assert find_or_build("seed=5", "iterations=9", "optimizer.lr=0.1") == folders[0] and build.calls == 7


def test_a_failed_build_leaves_nothing_behind(find_or_build, build, tmp_path):
    build.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        find_or_build()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    build.fails = False
    assert (find_or_build() / "stage.json").is_file() and build.calls == 2


@pytest.mark.slow
def test_runs_of_several_seeds_share_their_stages(make_config, tmp_path, capsys):
    overrides = [
        "reward=model", "model=embedded", "dataset=embedded", "~reward.target", "~model.path",
        "model.tokenizer_vocabulary=400",
        "model.architecture.hidden_size=32", "model.architecture.num_hidden_layers=1", "sft.epochs=1",
        "model.architecture.intermediate_size=32", f"stages.cache_dir={tmp_path}/cache", "iterations=1",
        "checkpoint.every=0",
    ]  # fmt: skip
    for seed in (0, 1):
        start_training(make_config(*overrides, f"name=seed_{seed}", f"seed={seed}"), tmp_path / f"seed_{seed}", None)
    logs = [(tmp_path / f"seed_{seed}" / "run.log").read_text() for seed in (0, 1)]
    for stage in ("training the SFT model", "training the reward model"):
        assert stage in logs[0] and stage not in logs[1]
    assert "sft model from the cache" in logs[1] and "reward model from the cache" in logs[1]
    folders = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert folders == ["reward", "sft"]
