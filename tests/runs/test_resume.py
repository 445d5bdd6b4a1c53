"""Resumes and forks: settings, checkpoint and directory of the run that continues; stops; a full disk."""

import json
import os
import resource
import shlex
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from apa_cli.cli.app import check_job
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.continuation import compose_continuation, find_continued_run
from apa_cli.errors import ConfigError, UserError
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs import stopping
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.files import read_config
from apa_cli.runs.resume import build_resume_overrides, find_code
from apa_cli.runs.stopping import RunStopped
from apa_cli.training.launch import describe_restart, format_resume_command, format_sweep_command, start_training

OVERRIDES = [
    "algo=ppo",
    "algo.kl_controller=adaptive",
    "lambda=0.2",
    "seed=4",
    "checkpoint.keep_last=9",
    "evaluation.every=2",
]
"""Overrides of a group, a key in it, lambda, and keys at the top level."""

SINGLE_JOB = Namespace(config_dir=None, multirun=False)
"""Arguments of a command line without flags."""


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """A finished run of four iterations."""
    return train(tmp_path_factory.mktemp("uninterrupted") / "uninterrupted", *OVERRIDES, "iterations=4")


@pytest.fixture
def run_copy(uninterrupted, tmp_path):
    return Path(shutil.copytree(uninterrupted, tmp_path / "run_copy"))


@pytest.fixture
def half_run(run_copy):
    """The run as it was after two iterations."""
    checkpoints.remove_later_checkpoints(run_copy / "checkpoints", 2)
    RunDirectory(run_copy).truncate_records(read_config(run_copy), 2)
    return run_copy


@pytest.fixture
def target(small_overrides):
    """Override that names the reward function, which no run's directory may do by itself."""
    return next(override for override in small_overrides if override.startswith("reward.target="))


@pytest.fixture
def run_command(target, monkeypatch):
    """run_command(*overrides) → directory of the run of `apa-train` with these overrides and reward.target=."""
    monkeypatch.setattr("apa_cli.training.results.plot_curves", lambda directory: None)

    def run(*overrides: str) -> Path:
        job = check_job([*overrides, target], SINGLE_JOB, ())
        start_training(job.config, job.directory, None)
        return job.directory

    return run


def load_policy_tensors(directory: Path, iteration: int) -> dict:
    """Return the policy's tensors in a checkpoint."""
    tensors, _ = checkpoints.load_checkpoint(directory / "checkpoints" / f"iteration_{iteration:06d}")
    return tensors["policy"]


def are_equal(first: dict, second: dict) -> bool:
    """Return True if the tensors are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- settings of a resumed run ------------------------------------------------------------------------------


def test_resume_needs_only_the_directory(half_run, run_command, uninterrupted, comparable):
    run_command(f"resume={half_run}")
    assert comparable(half_run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")
    assert (half_run / "samples.jsonl").read_text() == (uninterrupted / "samples.jsonl").read_text()
    assert are_equal(load_policy_tensors(half_run, 4), load_policy_tensors(uninterrupted, 4))
    assert read_config(half_run) == read_config(uninterrupted)


def test_resume_accepts_all_or_some_of_the_original_overrides(half_run, small_overrides, target):
    recorded = read_config(half_run)
    all_overrides = [*small_overrides, *OVERRIDES, "iterations=4"]
    some_overrides = ["algo=ppo", OVERRIDES[1], "lambda=0.2"]
    for overrides in (all_overrides, some_overrides):
        config = build_config(compose_continuation([*overrides, target, f"resume={half_run}"], half_run))
        RunDirectory(half_run).check_resume(config.raw)
        assert config.raw == recorded | {"resume": str(half_run)}


def test_group_option_sets_all_that_it_sets_in_a_new_run(tmp_path):
    def compose_on(*overrides):
        return build_config(compose_continuation(list(overrides), tmp_path))

    recorded = build_config(compose(["algo=awr", "optimizer.lr=0.5", "lambda=2", "critic=head", "iterations=9"])).raw
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    changed = compose_on("algo=apa")
    assert (type(changed.algo).__name__, changed.algo.lambda_, changed.raw["lambda"]) == ("APA", 0.1, 0.1)
    assert (changed.optimizer.lr, changed.critic.kind.value) == (0.5, "head")
    assert compose_on("critic=separate").critic.kind.value == "separate"
    assert compose_on("model=embedded").optimizer.lr == 3e-4  # the embedded model sets its run learning rate
    assert compose_on("model=embedded", "optimizer.lr=3").optimizer.lr == 3
    paper = compose_on("experiment=paper/hh_125m_ppo", "iterations=7")
    assert (type(paper.algo).__name__, type(paper.dataset).__name__, paper.run.iterations) == ("PPO", "HH", 7)
    assert paper.algo.kl_coef == paper.raw["lambda"] == 0.05
    with pytest.raises(ConfigError, match=r"^algo: no 'pppo'; did you mean 'ppo'"):
        compose_on("algo=pppo")


def test_lambda_sets_the_key_of_the_runs_algorithm(half_run, target):
    config = build_config(compose_continuation(["lambda=0.9", target, f"resume={half_run}"], half_run))
    assert config.algo.kl_coef == 0.9
    with pytest.raises(ConfigError) as error:
        RunDirectory(half_run).check_resume(config.raw)
    assert "lambda: 0.2 → 0.9;" in str(error.value) and "kl_coef" not in str(error.value)
    with pytest.raises(ConfigError, match=r"dataset\.path: unknown key"):
        compose_continuation(["dataset.path=x"], half_run)


def test_differing_settings_are_listed_and_can_be_allowed(half_run, run_command, comparable, uninterrupted):
    with pytest.raises(ConfigError, match=r"lr: 0\.0003 → 0\.01.*resume_changed=\[optimizer\.lr,lambda\]") as error:
        run_command(f"resume={half_run}", "optimizer.lr=0.01", "lambda=0.5", "iterations=5")
    assert "\n" not in str(error.value) and error.value.status == 2
    with pytest.raises(ConfigError, match=r"resume_changed=\[lambda\]"):
        run_command(f"resume={half_run}", "optimizer.lr=0.01", "lambda=0.5", "resume_changed=[optimizer]")
    run_command(f"resume={half_run}", "optimizer.lr=0.01", "lambda=0.5", "resume_changed=[optimizer.lr,lambda]")
    before, after = comparable(uninterrupted / "metrics.jsonl"), comparable(half_run / "metrics.jsonl")
    assert after[:3] == before[:3]
    assert [row["optimizer/lr"] for row in after[1:]] == [3e-4, 3e-4, 0.01, 0.01]
    run_command(f"resume={half_run}")  # the run has recorded them


def test_run_directory_cannot_name_code_to_run(half_run, small_overrides):
    config = read_config(half_run)
    with pytest.raises(ConfigError, match=r"^reward\.target: .*vowels.*give reward\.target="):
        compose_continuation([f"resume={half_run}"], half_run)
    config["algo"]["_target_"] = "pathlib.Path"
    (half_run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"^algo\._target_: .*pathlib\.Path.*no yaml"):
        compose_continuation([f"resume={half_run}", *small_overrides], half_run)
    assert find_code({"a": [{"use": "f", "target": "x"}], "model": {"trust_remote_code": True}, "target": None}) == [
        ("a", [{"use": "f", "target": "x"}]),
        ("model.trust_remote_code", True),
    ]


def test_printed_overrides_parse_to_their_values():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parts = [
        {"use": "function", "target": "/a b/it's.py:f", "weight": 1.0, "timeout": None},
        {"use": "model", "path": "x/y-z", "scale": -0.5, "centered": True, "output": "no", "dtype": "float32"},
    ]
    overrides = build_resume_overrides({"reward": {"parts": parts}}, Path("outputs/run"))
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert [each.value() for each in parsed] == ["outputs/run", parts]
    assert build_resume_overrides({"reward": {"target": "my.py:f"}}, Path("r")) == ["resume=r", "reward.target=my.py:f"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluation.rewards", "${oc.decode:'[{use: vader, _target_: pathlib.Path}]'}"),
        ("evaluation.rewards", "${oc.decode:'[{use: function, target: \"evil:f\"}]'}"),
        ("model", "${oc.create:{path: /evil, trust_remote_code: true}}"),
        ("reward", "${oc.create:{target: evil}}"),
        ("reward", 5),
    ],
)
@pytest.mark.parametrize("start", ["resume", "fork"])
def test_interpolations_in_a_recorded_configuration_are_refused(start, key, value, half_run, small_overrides):
    config = read_config(half_run)
    section, _, last = key.rpartition(".")
    (config[section] if section else config)[last] = value
    (half_run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=rf"^{key}: .*config\.yaml has .*, which no run writes$"):
        compose_continuation([f"{start}={half_run}", *small_overrides[-1:]], half_run)


def test_reward_function_of_the_package_need_not_be_named_again(half_run):
    config = read_config(half_run)
    config["reward"]["target"] = "apa_cli.rewards.vader:compound"
    (half_run / "config.yaml").write_text(yaml.safe_dump(config))
    resumed = build_config(compose_continuation([f"resume={half_run}"], half_run))
    assert resumed.reward.target == "apa_cli.rewards.vader:compound"


def test_after_a_change_of_reward_the_sft_model_is_scored_again(half_run, run_command, uninterrupted, records):
    file = half_run.parent / "digits.py"
    file.write_text("def digits(prompts, responses):\n    return [float(len(text) % 7) for text in responses]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apa_cli.training.results.plot_curves", lambda directory: None)
        overrides = [f"resume={half_run}", f"reward.target={file}:digits", "resume_changed=[reward]"]
        config = build_config(compose_continuation(overrides, half_run))
        start_training(config, half_run, None)
    last = records(half_run / "metrics.jsonl")[-1]
    first = [row["response"] for row in records(uninterrupted / "samples.jsonl") if row["iteration"] == 0]
    assert last["eval/reward_mean_sft"] == pytest.approx(sum(len(text) % 7 for text in first) / 6, rel=1e-6)


# --- resume=auto --------------------------------------------------------------------------------------------


def test_auto_starts_resumes_and_ends_with_the_same_overrides(train, tmp_path, comparable, uninterrupted, capsys):
    overrides = [*OVERRIDES, "iterations=4", "resume=auto"]
    run = train(tmp_path / "uninterrupted", *overrides)  # nothing is there yet
    assert comparable(run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")
    weights = (run / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train(run, *overrides)
    assert capsys.readouterr().out == f"{run}: finished (4 iterations); nothing is left to do\n"
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == weights
    checkpoints.remove_later_checkpoints(run / "checkpoints", 2)
    (run / "result.json").unlink()
    train(run, *overrides)
    assert comparable(run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")
    assert are_equal(load_policy_tensors(run, 4), load_policy_tensors(uninterrupted, 4))
    assert json.loads((run / "result.json").read_text())["iteration"] == 4


def test_auto_restarts_a_run_without_checkpoint(train, tmp_path, comparable, uninterrupted):
    run = tmp_path / "uninterrupted"
    run.mkdir()
    (run / "config.yaml").write_text("name: who")  # killed while it was being written
    (run / "metrics.jsonl").write_text('{"iteration": 0}\n{"itera')
    train(run, *OVERRIDES, "iterations=4", "resume=auto")
    assert comparable(run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")


def test_auto_refuses_other_settings(half_run, train):
    with pytest.raises(ConfigError, match="seed: 4 → 5"):
        train(half_run, *OVERRIDES, "iterations=4", "seed=5", "resume=auto")


def test_auto_needs_a_name():
    with pytest.raises(ConfigError, match=r"^resume: auto needs name="):
        build_config(compose(["resume=auto"]))
    assert build_config(compose(["resume=auto", "name=x"])).run.resume == "auto"


def test_run_that_provides_the_settings(half_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    half_run.rename("outputs/run")
    run = Path("outputs/run")
    assert find_continued_run(["name=run", "resume=auto"]) == run
    assert find_continued_run(["name=other", "resume=auto"]) is None
    assert find_continued_run(["name=run", "seed=1"]) is None
    assert find_continued_run(["resume=outputs/run/checkpoints/iteration_000001"]) == run
    assert find_continued_run(["fork=outputs/run", "name=new", "resume=auto"]) == run
    with pytest.raises(ConfigError, match="fork: there is no run in outputs/nothing"):
        find_continued_run(["fork=outputs/nothing"])
    with pytest.raises(ConfigError, match=r"resume: there is no run in outputs/rum; did you mean outputs/run[?]$"):
        find_continued_run(["resume=outputs/rum"])


# --- forks --------------------------------------------------------------------------------------------------


def test_fork_continues_elsewhere_and_does_not_change_its_source(
    run_copy, run_command, tmp_path, monkeypatch, comparable
):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    fork = run_command(f"fork={run_copy}/checkpoints/iteration_000002", "name=same")
    assert fork == Path("outputs/same")
    assert comparable(fork / "metrics.jsonl") == comparable(run_copy / "metrics.jsonl")
    assert (fork / "samples.jsonl").read_text() == (run_copy / "samples.jsonl").read_text()
    assert are_equal(load_policy_tensors(fork, 4), load_policy_tensors(run_copy, 4))
    other_fork = [f"fork={run_copy}/checkpoints/iteration_000002", "name=other", "lambda=0.9", "iterations=3"]
    other = run_command(*other_fork)
    rows, old = comparable(other / "metrics.jsonl"), comparable(run_copy / "metrics.jsonl")
    assert rows[:3] == old[:3] and len(rows) == 4 and rows[3] != old[3]
    stored = read_config(other)
    assert (stored["name"], stored["lambda"], stored["algo"]["kl_coef"], stored["seed"]) == ("other", 0.9, 0.9, 4)
    assert before == {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    # A fork is a run like any other: with the same overrides it continues, and it can be resumed and forked.
    run_command(*other_fork, "resume=auto")
    run_command("resume=outputs/other", "iterations=4")
    run_command("fork=outputs/other/checkpoints/iteration_000003", "name=third", "lambda=0.5", "resume=auto")
    assert [row["iteration"] for row in comparable(Path("outputs/third/metrics.jsonl"))] == [0, 1, 2, 3, 4]
    assert comparable(Path("outputs/third/metrics.jsonl"))[:4] == rows


def test_overrides_that_contradict_a_fork_are_refused(run_copy):
    with pytest.raises(ConfigError, match=r"^fork: a fork is a new run"):
        find_continued_run([f"fork={run_copy}", f"resume={run_copy}"])
    with pytest.raises(ConfigError, match=r"^fork: .*-m"):
        check_job([f"fork={run_copy}", "seed=0"], Namespace(config_dir=None, multirun=True), ())


# --- one live run in a directory ----------------------------------------------------------------------------


def test_directory_is_locked_until_its_run_is_dead(half_run, run_command):
    ready, release = os.pipe()
    child = os.fork()
    if child == 0:
        with RunDirectory(half_run).lock():
            os.write(release, b"x")
            signal.pause()
    os.read(ready, 1)
    before = (half_run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=rf"^{half_run}: in use by another run; give another name=$"):
        run_command(f"resume={half_run}")
    assert (half_run / "metrics.jsonl").read_text() == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run_command(f"resume={half_run}")


def test_file_in_place_of_the_directory_is_named(train, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=rf"^{tmp_path}/run: cannot be written to \(File exists\)$"):
        train(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "a file"


# --- records ------------------------------------------------------------------------------------------------


def test_incomplete_line_and_records_after_the_checkpoint_are_removed(half_run, run_command, uninterrupted, comparable):
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (uninterrupted / name).read_bytes()
        (half_run / name).write_bytes(text[: len(text) - 25])  # the last line is cut
    run_command(f"resume={half_run}")
    assert comparable(half_run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")
    assert (half_run / "samples.jsonl").read_text() == (uninterrupted / "samples.jsonl").read_text()


def test_later_checkpoints_are_removed_on_resume(run_copy, run_command):
    (run_copy / "checkpoints" / ".iteration_000003.77").mkdir()  # left by a killed save
    run_command(f"resume={run_copy}/checkpoints/iteration_000001", "iterations=2")
    names = sorted(path.name for path in (run_copy / "checkpoints").iterdir())
    assert names == ["iteration_000001", "iteration_000002"]


def test_best_checkpoint_is_kept_although_none_was_due(run_train, records):
    run = run_train(
        "iterations=4", "evaluation.every=1", "checkpoint.every=4", "checkpoint.keep_last=1", "optimizer.lr=1e-2"
    )
    scores = [row["eval/reward_mean"] for row in records(run / "metrics.jsonl")]
    best = scores.index(max(scores))
    assert 0 < best < 4  # else this run does not test it
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"iteration_{best:06d}",
        "iteration_000004",
    ]


# --- stopping -----------------------------------------------------------------------------------------------


@pytest.fixture
def run_in_iteration(monkeypatch):
    """run_in_iteration(number, action): calls `action()` in the middle of that iteration."""
    from apa_cli.training.rollout_builder import RolloutBuilder

    original = RolloutBuilder.sample

    def patch_iteration(number, action):
        def sample(builder, iteration, state):
            if iteration == number:
                action()
            return original(builder, iteration, state)

        monkeypatch.setattr(RolloutBuilder, "sample", sample)

    yield patch_iteration
    monkeypatch.setattr(RolloutBuilder, "sample", original)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signal_ends_the_run_after_its_iteration_and_saves(
    number, status, run_in_iteration, train, run_command, tmp_path, monkeypatch, uninterrupted, comparable, target
):
    monkeypatch.chdir(tmp_path)
    run_in_iteration(2, lambda: os.kill(os.getpid(), number))
    overrides = [*OVERRIDES, "iterations=4", "checkpoint.every=0"]
    with pytest.raises(RunStopped) as error:
        train(Path("outputs/uninterrupted"), *overrides)
    assert error.value.status == status
    name = signal.Signals(number).name
    assert str(error.value) == (
        f"stopped by {name} after iteration 2 of 4, saved; continue with: "
        f"apa-train resume=outputs/uninterrupted {target}"
    )
    run = Path("outputs/uninterrupted")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_000002"]
    assert len(comparable(run / "metrics.jsonl")) == 3 and not (run / "model").exists()
    run_in_iteration(0, None)
    run_command("resume=outputs/uninterrupted")
    assert comparable(run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")


def test_stop_after_ends_the_run_with_its_own_status(run_in_iteration, train, run_command, tmp_path, monkeypatch):
    def let_time_pass():
        monkeypatch.setattr(stopping.time, "monotonic", lambda: stopping.START_TIME + 3601)

    run_in_iteration(2, let_time_pass)
    monkeypatch.setattr(stopping, "START_TIME", stopping.time.monotonic())
    with pytest.raises(RunStopped, match=r"stopped by stop_after=1h after iteration 2 of 3, saved") as error:
        train(tmp_path / "run", "stop_after=1h", "checkpoint.every=0")
    assert error.value.status == 75
    monkeypatch.undo()
    assert checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "iteration_000002"
    run_command(f"resume={tmp_path}/run")  # without the time limit
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["stop_after"] is None


def test_run_does_not_start_without_time_left(train, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "START_TIME", stopping.time.monotonic() - 100)
    with pytest.raises(RunStopped, match="no time is left to start"):
        train(tmp_path / "run", "stop_after=90s")
    assert not (tmp_path / "run").exists()


def test_signal_in_the_last_iteration_lets_the_run_finish(run_in_iteration, run_train):
    run_in_iteration(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run = run_train()
    assert (run / "result.json").is_file() and (run / "model" / "config.json").is_file()


def test_malformed_duration_is_refused():
    with pytest.raises(ConfigError, match=r"^stop_after: '90' is not a time such as 90s"):
        build_config(compose(["stop_after=90"]))


def test_resume_command_is_quoted_for_the_shell(make_config, monkeypatch):
    monkeypatch.setattr("sys.argv", ["apa-train", "--config-dir", "my conf", "seed=1"])
    command = format_resume_command("apa-train", make_config("name=x"), Path("outputs/sweeps/a/seed=1,x=(2)"))
    assert command.startswith("apa-train 'resume=outputs/sweeps/a/seed=1,x=(2)' reward.target=/")
    assert command.endswith(" --config-dir 'my conf'")


# --- disk full ----------------------------------------------------------------------------------------------


@pytest.fixture
def limit_file_size():
    """limit_file_size(bytes): no file may grow larger, as on a full disk; undone at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_full_disk_while_saving_keeps_earlier_checkpoints(
    limit_file_size, run_in_iteration, train, run_command, tmp_path, comparable, uninterrupted
):
    run = tmp_path / "uninterrupted"
    run_in_iteration(3, lambda: limit_file_size(50_000))  # the policy's file needs 140 kB
    message = r"iteration_000003: cannot be written \(.*\); earlier checkpoints are intact"
    with pytest.raises(UserError, match=message) as error:
        train(run, *OVERRIDES, "iterations=4")
    assert "\n" not in str(error.value)
    limit_file_size(resource.RLIM_INFINITY)
    run_in_iteration(0, None)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_000001", "iteration_000002"]
    run_command(f"resume={run}")
    assert comparable(run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")


@pytest.mark.slow
def test_full_disk_while_writing_results_keeps_the_checkpoint(
    limit_file_size, train, run_command, tmp_path, comparable, uninterrupted, monkeypatch
):
    from apa_cli.training import results, trainer

    run, save_models = tmp_path / "uninterrupted", results.save_models
    monkeypatch.setattr(trainer, "save_models", lambda *arguments: (limit_file_size(50_000), save_models(*arguments)))
    with pytest.raises(UserError, match=r"the trained models cannot be written \(.*\); the checkpoint is intact"):
        train(run, *OVERRIDES, "iterations=4")
    limit_file_size(resource.RLIM_INFINITY)
    monkeypatch.setattr(trainer, "save_models", save_models)
    assert not (run / "result.json").exists()
    run_command("name=uninterrupted", f"resume={run}")
    models = [(directory / "model" / "model.safetensors").read_bytes() for directory in (run, uninterrupted)]
    assert models[0] == models[1]


def test_full_disk_while_logging_stops_the_run_in_one_line(
    limit_file_size, run_in_iteration, train, run_command, tmp_path, comparable, uninterrupted
):
    run = tmp_path / "uninterrupted"
    run_in_iteration(3, lambda: limit_file_size((run / "metrics.jsonl").stat().st_size + 100))
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(File too large\)") as error:
        train(run, *OVERRIDES, "iterations=4")
    assert "\n" not in str(error.value)
    limit_file_size(resource.RLIM_INFINITY)
    run_in_iteration(0, None)
    run_command(f"resume={run}")
    assert comparable(run / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")


def test_fork_may_change_the_algorithm_and_the_reference(run_train, records):
    run = run_train("iterations=1", "algo=apa")
    fork = run_train(f"fork={run}", "algo=ppo", "reference.refresh_every=1", "iterations=2", name="fork")
    *_, first, second = records(fork / "metrics.jsonl")
    assert first == records(run / "metrics.jsonl")[-1]
    assert second["ppo/kl_coef"] == 0.05
    # The reference of the loss was still the SFT model at the start of the fork.
    assert second["kl/refreshed"] == pytest.approx(second["kl/sequence"], rel=1e-6)
    assert "from iteration 2 on: " in (log := (fork / "run.log").read_text()) and "reference.refresh_every 0 → 1" in log


def test_shortened_run_ends_with_an_evaluation(run_train, records):
    overrides = ["evaluation.every=0", "checkpoint.keep_last=3"]
    run = run_train(*overrides, "iterations=3")
    run_train(*overrides, "iterations=2", f"resume={run}/checkpoints/iteration_000002")
    rows = records(run / "metrics.jsonl")
    assert "continues after iteration 2" in (run / "run.log").read_text()
    assert [row["iteration"] for row in rows] == [0, 1, 2, 2] and rows[-1]["eval/kl_exact"] > 1e-4
    assert json.loads((run / "result.json").read_text())["eval/kl_exact"] == rows[-1]["eval/kl_exact"]


# --- commands that are printed ------------------------------------------------------------------------------


def test_command_that_continues_a_sweep_names_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["apa-train", "-m", "seed=0,1", "resume=null"])
    words = ["apa-train", "-m", "seed=0,1", "name=2026-11-28_02-46-19", "resume=auto"]
    assert shlex.split(format_sweep_command("2026-11-28_02-46-19")) == words
    monkeypatch.setattr("sys.argv", ["apa-train", "-m", "seed=0,1", "name=mine"])
    assert format_sweep_command("mine") == "apa-train -m seed=0,1 name=mine resume=auto"


def test_signal_before_there_is_a_state_names_the_command_that_starts_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/apa-train", "dataset.path=my data"])
    with pytest.raises(stopping.RunInterrupted) as error, stopping.GracefulStop():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.describe_interruption("apa-train", error.value) == (
        "stopped by SIGTERM before there was anything to save; start again with: apa-train 'dataset.path=my data'"
    )


# --- nothing left to do -------------------------------------------------------------------------------------


def test_resume_and_fork_of_a_finished_run_say_that_nothing_is_left(
    run_copy, run_command, comparable, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    weights, before = run_copy / "model" / "model.safetensors", comparable(run_copy / "metrics.jsonl")
    written = weights.stat().st_mtime_ns
    run_command(f"resume={run_copy}")
    assert f"{run_copy}: finished (4 iterations); nothing is left to do" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == written and comparable(run_copy / "metrics.jsonl") == before
    with pytest.raises(ConfigError, match=r"^fork: nothing is left to do after iteration 4 with iterations 4; raise"):
        run_command(f"fork={run_copy}", "name=other")
    assert not Path("outputs/other").exists()


def test_learning_rate_that_rises_again_is_said(make_config):
    config = make_config("iterations=8", "optimizer.lr_scheduler=linear")
    # After 4 of 4 iterations linear is at 1 − 4 / 4 = 0, after 4 of 8 at 1 − 4 / 8 = 50 %.
    (line,) = describe_restart({**config.raw, "iterations": 4}, config, 4)
    assert "with iterations 4 → 8 the learning rate rises from 0 % to 50 % of its peak" in line
    assert not describe_restart(config.raw, config, 4)
    constant = make_config("iterations=8")
    assert not describe_restart({**constant.raw, "iterations": 4}, constant, 4)
