"""Going on with a run: whose settings, from where, in which directory; and what cannot go on."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from apa_cli.cli.app import checked_jobs
from apa_cli.config.build import build
from apa_cli.config.compose import compose, run_directory_name
from apa_cli.config.from_run import compose_again, source_of
from apa_cli.errors import ConfigError, UserError
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.records import rows_until
from apa_cli.runs.resume import code_in, resume_words
from apa_cli.runs.stopping import Stopped
from apa_cli.training.launch import checkpoint as checkpoints
from apa_cli.training.launch import resume_command, start, stopping

WORDS = [
    "algo=ppo",
    "algo.kl_controller=adaptive",
    "lambda=0.2",
    "seed=4",
    "checkpoint.keep_last=9",
    "evaluation.every=2",
]
"""A run that differs from conf/ in a group, in a key of it, in lambda and at the top."""


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """A finished run of four iterations."""
    return train(tmp_path_factory.mktemp("whole") / "whole", *WORDS, "iterations=4")


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copied"))


@pytest.fixture
def begun(copied):
    """The run as it was after two iterations."""
    checkpoints.drop_after(copied / "checkpoints", 2)
    RunDirectory(copied).cut_back(yaml.safe_load((copied / "config.yaml").read_text()), 2)
    return copied


@pytest.fixture
def target(small_words):
    """The word that names the reward function, which no run's directory may do by itself."""
    return next(word for word in small_words if word.startswith("reward.target="))


@pytest.fixture
def again(target, monkeypatch):
    """again(*words) → the directory of what `apa-train` does with these words and reward.target=, in this process."""
    monkeypatch.setattr("apa_cli.training.trainer.draw_curves", lambda directory: None)

    def go_on(*words: str) -> Path:
        ((_, config),), composed_here = checked_jobs([*words, target], False, None, ())
        assert composed_here
        path = Path(run_directory_name(config.run.name, config.run.resume))
        start(config, path, None)
        return path

    return go_on


def policy(directory: Path, iteration: int) -> dict:
    return checkpoints.load(directory / "checkpoints" / f"iteration_{iteration:06d}")[0]["policy"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the run's own settings ---------------------------------------------------------------------------------


def test_a_directory_is_all_that_needs_to_be_said(begun, again, whole, comparable):
    again(f"resume={begun}")
    assert comparable(begun / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    assert (begun / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert same(policy(begun, 4), policy(whole, 4))
    assert yaml.safe_load((begun / "config.yaml").read_text()) == yaml.safe_load((whole / "config.yaml").read_text())


def test_so_are_all_words_or_some_of_them(begun, small_words):
    recorded = yaml.safe_load((begun / "config.yaml").read_text())
    target = [word for word in small_words if word.startswith("reward.target=")]
    for words in ([*small_words, *WORDS, "iterations=4"], ["algo=ppo", "lambda=0.2", "algo.kl_controller=adaptive"]):
        config = build(compose_again([*words, *target, f"resume={begun}"], begun))
        RunDirectory(begun).check_resume(config.raw)
        assert config.raw == recorded | {"resume": str(begun)}


def test_a_group_brings_what_it_brings_in_a_new_run(tmp_path):
    def on_top(*words):
        return build(compose_again(list(words), tmp_path))

    recorded = build(compose(["algo=awr", "optimizer.lr=0.5", "lambda=2", "critic=head", "iterations=9"])).raw
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    changed = on_top("algo=apa")
    assert (type(changed.algo).__name__, changed.algo.lambda_, changed.raw["lambda"]) == ("APA", 0.1, 0.1)
    assert (changed.optimizer.lr, changed.critic.kind.value) == (0.5, "head")
    assert on_top("critic=separate").critic.kind.value == "separate"
    assert on_top("model=embedded").optimizer.lr == 5e-4  # the embedded model has a learning rate of its own
    assert on_top("model=embedded", "optimizer.lr=3").optimizer.lr == 3
    paper = on_top("experiment=paper/hh_125m_ppo", "iterations=7")
    assert (type(paper.algo).__name__, type(paper.dataset).__name__, paper.run.iterations) == ("PPO", "HH", 7)
    assert paper.algo.kl_coef == paper.raw["lambda"] == 0.05
    with pytest.raises(ConfigError, match=r"^algo: no 'pppo'; did you mean 'ppo'"):
        on_top("algo=pppo")


def test_lambda_goes_where_the_runs_algorithm_has_it(begun, target):
    config = build(compose_again(["lambda=0.9", target, f"resume={begun}"], begun))
    assert config.algo.kl_coef == 0.9
    with pytest.raises(ConfigError) as error:
        RunDirectory(begun).check_resume(config.raw)
    assert "lambda: 0.2 → 0.9;" in str(error.value) and "kl_coef" not in str(error.value)
    with pytest.raises(ConfigError, match=r"unknown key 'dataset\.path'"):
        compose_again(["dataset.path=x"], begun)


def test_what_differs_is_listed_and_may_be_named(begun, again, comparable, whole):
    with pytest.raises(ConfigError, match=r"lr: 0\.0003 → 0\.01.*resume_changed=\[lambda,optimizer\.lr\]") as error:
        again(f"resume={begun}", "optimizer.lr=0.01", "lambda=0.5", "iterations=5")
    assert "\n" not in str(error.value) and error.value.status == 2
    with pytest.raises(ConfigError, match=r"resume_changed=\[lambda\]"):
        again(f"resume={begun}", "optimizer.lr=0.01", "lambda=0.5", "resume_changed=[optimizer]")
    again(f"resume={begun}", "optimizer.lr=0.01", "lambda=0.5", "resume_changed=[optimizer.lr,lambda]")
    before, after = comparable(whole / "metrics.jsonl"), comparable(begun / "metrics.jsonl")
    assert after[:3] == before[:3]
    assert [row["optimizer/lr"] for row in after[1:]] == [3e-4, 3e-4, 0.01, 0.01]
    again(f"resume={begun}")  # and from now on these are the run's own


def test_a_runs_directory_names_no_code_to_run(begun, small_words):
    config = yaml.safe_load((begun / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"^reward\.target: .*vowels.*give reward\.target="):
        compose_again([f"resume={begun}"], begun)
    config["algo"]["_target_"] = "pathlib.Path"
    (begun / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"^algo\._target_ in .*pathlib\.Path.*no yaml"):
        compose_again([f"resume={begun}", *small_words], begun)
    assert code_in({"a": [{"use": "f", "target": "x"}], "model": {"trust_remote_code": True}, "target": None}) == [
        ("a", [{"use": "f", "target": "x"}]),
        ("model.trust_remote_code", True),
    ]


def test_the_words_printed_are_read_as_what_they_say():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parts = [
        {"use": "function", "target": "/a b/it's.py:f", "weight": 1.0, "timeout": None},
        {"use": "model", "path": "x/y-z", "scale": -0.5, "centered": True, "output": "no", "dtype": "float32"},
    ]
    words = resume_words({"reward": {"parts": parts}}, Path("outputs/run"))
    parsed = OverridesParser.create().parse_overrides(words)
    assert [each.value() for each in parsed] == ["outputs/run", parts]
    assert resume_words({"reward": {"target": "my.py:f"}}, Path("r")) == ["resume=r", "reward.target=my.py:f"]


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
@pytest.mark.parametrize("word", ["resume", "fork"])
def test_nothing_is_hidden_in_a_runs_configuration(word, key, value, begun, small_words):
    config = yaml.safe_load((begun / "config.yaml").read_text())
    section, _, last = key.rpartition(".")
    (config[section] if section else config)[last] = value
    (begun / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=rf"^{key} in .*config\.yaml (refers to|is ).*no run writes that$"):
        compose_again([f"{word}={begun}", *small_words[-1:]], begun)


def test_the_packages_own_reward_function_need_not_be_named_again(begun):
    config = yaml.safe_load((begun / "config.yaml").read_text())
    config["reward"]["target"] = "apa_cli.rewards.vader:compound"
    (begun / "config.yaml").write_text(yaml.safe_dump(config))
    assert build(compose_again([f"resume={begun}"], begun)).reward.target == "apa_cli.rewards.vader:compound"


def test_other_rewards_than_before_are_compared_with_the_sft_models_own(begun, again, whole, records):
    words = ["reward.target=", "resume_changed=[reward]"]
    file = begun.parent / "digits.py"
    file.write_text("def digits(prompts, responses):\n    return [float(len(text) % 7) for text in responses]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apa_cli.training.trainer.draw_curves", lambda directory: None)
        config = build(compose_again([f"resume={begun}", f"{words[0]}{file}:digits", words[1]], begun))
        start(config, begun, None)
    last = records(begun / "metrics.jsonl")[-1]
    first = [row["response"] for row in records(whole / "samples.jsonl") if row["iteration"] == 0]
    assert last["eval/reward_mean_sft"] == pytest.approx(sum(len(text) % 7 for text in first) / 6, rel=1e-6)


# --- resume=auto --------------------------------------------------------------------------------------------


def test_auto_begins_goes_on_and_ends_with_the_same_words(train, tmp_path, comparable, whole, capsys):
    words = [*WORDS, "iterations=4", "resume=auto"]
    run = train(tmp_path / "whole", *words)  # nothing is there yet
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    weights = (run / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train(run, *words)
    assert capsys.readouterr().out == f"{run}: finished (4 iterations), nothing is left to do\n"
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == weights
    checkpoints.drop_after(run / "checkpoints", 2)
    (run / "result.json").unlink()
    train(run, *words)
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    assert same(policy(run, 4), policy(whole, 4))
    assert json.loads((run / "result.json").read_text())["iteration"] == 4


def test_auto_begins_anew_what_never_reached_a_checkpoint(train, tmp_path, comparable, whole):
    run = tmp_path / "whole"
    run.mkdir()
    (run / "config.yaml").write_text("name: who")  # killed while it was written
    (run / "metrics.jsonl").write_text('{"iteration": 0}\n{"itera')
    train(run, *WORDS, "iterations=4", "resume=auto")
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")


def test_auto_refuses_other_words(begun, train):
    with pytest.raises(ConfigError, match="seed: 4 → 5"):
        train(begun, *WORDS, "iterations=4", "seed=5", "resume=auto")


def test_auto_needs_a_name():
    with pytest.raises(ConfigError, match=r"^resume: auto needs name="):
        build(compose(["resume=auto"]))
    assert build(compose(["resume=auto", "name=x"])).run.resume == "auto"


def test_where_the_settings_come_from(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    begun.rename("outputs/run")
    own = Path("outputs/run")
    assert source_of(["name=run", "resume=auto"]) == own
    assert source_of(["name=other", "resume=auto"]) is None
    assert source_of(["name=run", "seed=1"]) is None
    assert source_of(["resume=outputs/run/checkpoints/iteration_000001"]) == own
    assert source_of(["fork=outputs/run", "name=new", "resume=auto"]) == own
    with pytest.raises(ConfigError, match="fork: there is no run in outputs/nothing"):
        source_of(["fork=outputs/nothing"])
    with pytest.raises(ConfigError, match=r"resume: there is no run in outputs/rum; did you mean outputs/run[?]$"):
        source_of(["resume=outputs/rum"])


# --- forks --------------------------------------------------------------------------------------------------


def test_a_fork_goes_on_elsewhere_and_leaves_its_origin_alone(copied, again, tmp_path, monkeypatch, comparable):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    fork = again(f"fork={copied}/checkpoints/iteration_000002", "name=same")
    assert fork == Path("outputs/same")
    assert comparable(fork / "metrics.jsonl") == comparable(copied / "metrics.jsonl")
    assert (fork / "samples.jsonl").read_text() == (copied / "samples.jsonl").read_text()
    assert same(policy(fork, 4), policy(copied, 4))
    other = again(f"fork={copied}/checkpoints/iteration_000002", "name=other", "lambda=0.9", "iterations=3")
    rows, old = comparable(other / "metrics.jsonl"), comparable(copied / "metrics.jsonl")
    assert rows[:3] == old[:3] and len(rows) == 4 and rows[3] != old[3]
    stored = yaml.safe_load((other / "config.yaml").read_text())
    assert (stored["name"], stored["lambda"], stored["algo"]["kl_coef"], stored["seed"]) == ("other", 0.9, 0.9, 4)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    # A fork is a run like any other: with the same words it is not begun twice, and it can be resumed.
    again(f"fork={copied}/checkpoints/iteration_000002", "name=other", "lambda=0.9", "iterations=3", "resume=auto")
    again("resume=outputs/other", "iterations=4")
    again("fork=outputs/other/checkpoints/iteration_000003", "name=third", "lambda=0.5", "resume=auto")
    assert [row["iteration"] for row in comparable(Path("outputs/third/metrics.jsonl"))] == [0, 1, 2, 3, 4]
    assert comparable(Path("outputs/third/metrics.jsonl"))[:4] == rows


def test_what_contradicts_a_fork_is_refused(copied):
    with pytest.raises(ConfigError, match=r"^fork: give it without resume="):
        source_of([f"fork={copied}", f"resume={copied}"])
    with pytest.raises(ConfigError, match=r"^fork: one run"):
        checked_jobs([f"fork={copied}", "seed=0,1"], True, None, ())


# --- one live run in a directory ----------------------------------------------------------------------------


def test_a_directory_in_use_is_refused_until_its_run_is_dead(begun, again):
    ready, release = os.pipe()
    child = os.fork()
    if child == 0:
        with RunDirectory(begun).held():
            os.write(release, b"x")
            signal.pause()
    os.read(ready, 1)
    before = (begun / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=rf"^{begun}: in use by another live run$"):
        again(f"resume={begun}")
    assert (begun / "metrics.jsonl").read_text() == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    again(f"resume={begun}")


def test_a_file_in_the_way_is_named(train, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=rf"^{tmp_path}/run: cannot write there \(File exists\)$"):
        train(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "a file"


# --- records ------------------------------------------------------------------------------------------------


def test_half_a_line_and_what_follows_the_checkpoint_are_cut(begun, again, whole, comparable):
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (whole / name).read_bytes()
        (begun / name).write_bytes(text[: len(text) - 25])  # its last line ends in the middle
    again(f"resume={begun}")
    assert comparable(begun / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    assert (begun / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_lines_end_only_where_the_file_ends_them(tmp_path):
    file = tmp_path / "samples.jsonl"
    odd = "a\u2028b\x85c"
    RunDirectory(tmp_path).record(file, [{"iteration": number, "response": odd} for number in (1, 2, 3)])
    assert [json.loads(row)["response"] for row in rows_until(file, 2)] == [odd, odd]
    half = file.read_bytes()[:-8]
    file.write_bytes(half)
    assert len(rows_until(file, 9)) == 2
    file.write_bytes(b'{"iteration": 1}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=f"line 2 of {file} cannot be read"):
        rows_until(file, 9)


def test_checkpoints_of_a_future_that_was_given_up_are_gone(copied, again):
    (copied / "checkpoints" / ".iteration_000003.77").mkdir()  # left by a save that was killed
    again(f"resume={copied}/checkpoints/iteration_000001", "iterations=2")
    names = sorted(path.name for path in (copied / "checkpoints").iterdir())
    assert names == ["iteration_000001", "iteration_000002"]


def test_the_best_is_kept_although_no_checkpoint_was_due(run_train, records):
    run = run_train(
        "iterations=4", "evaluation.every=1", "checkpoint.every=4", "checkpoint.keep_last=1", "optimizer.lr=1e-2"
    )
    scores = [row["eval/reward_mean"] for row in records(run / "metrics.jsonl")]
    best = scores.index(max(scores))
    assert 0 < best < 4  # else this run shows nothing
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"iteration_{best:06d}",
        "iteration_000004",
    ]


# --- stopping -----------------------------------------------------------------------------------------------


@pytest.fixture
def stopping_at(monkeypatch):
    """stopping_at(iteration, action): `action()` happens in the middle of that iteration."""
    from apa_cli.training.trainer import Trainer

    original = Trainer.sample

    def at(wanted, action):
        def sample(trainer, iteration):
            if iteration == wanted:
                action()
            return original(trainer, iteration)

        monkeypatch.setattr(Trainer, "sample", sample)

    yield at
    monkeypatch.setattr(Trainer, "sample", original)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_iteration_saved(
    number, status, stopping_at, train, again, tmp_path, monkeypatch, whole, comparable, target
):
    monkeypatch.chdir(tmp_path)
    stopping_at(2, lambda: os.kill(os.getpid(), number))
    words = [*WORDS, "iterations=4", "checkpoint.every=0"]
    with pytest.raises(Stopped) as error:
        train(Path("outputs/whole"), *words)
    assert error.value.status == status
    name = signal.Signals(number).name
    assert str(error.value) == (
        f"stopped by {name} after iteration 2 of 4, saved; go on with: apa-train resume=outputs/whole {target}"
    )
    run = Path("outputs/whole")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_000002"]
    assert len(comparable(run / "metrics.jsonl")) == 3 and not (run / "model").exists()
    stopping_at(0, None)
    again("resume=outputs/whole")
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")


def test_stop_after_ends_the_run_with_a_status_of_its_own(stopping_at, train, again, tmp_path, monkeypatch):
    def late():
        monkeypatch.setattr(stopping.time, "monotonic", lambda: stopping.STARTED + 3601)

    stopping_at(2, late)
    monkeypatch.setattr(stopping, "STARTED", stopping.time.monotonic())
    with pytest.raises(Stopped, match=r"stopped by stop_after=1h after iteration 2 of 3, saved") as error:
        train(tmp_path / "run", "stop_after=1h", "checkpoint.every=0")
    assert error.value.status == 75
    monkeypatch.undo()
    assert checkpoints.all_in(tmp_path / "run" / "checkpoints")[-1].name == "iteration_000002"
    again(f"resume={tmp_path}/run")  # without the limit
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["stop_after"] is None


def test_when_no_time_is_left_nothing_is_begun(train, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "STARTED", stopping.time.monotonic() - 100)
    with pytest.raises(Stopped, match="no time is left to begin"):
        train(tmp_path / "run", "stop_after=90s")
    assert not (tmp_path / "run").exists()


def test_a_signal_in_the_last_iteration_lets_the_run_finish(stopping_at, run_train):
    stopping_at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run = run_train()
    assert (run / "result.json").is_file() and (run / "model" / "config.json").is_file()


def test_a_wrong_time_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"^stop_after: '90' is not a time such as 90s"):
        build(compose(["stop_after=90"]))


def test_the_command_that_goes_on_is_quoted_for_the_shell(configured, monkeypatch):
    monkeypatch.setattr("sys.argv", ["apa-train", "--config-dir", "my conf", "seed=1"])
    command = resume_command("apa-train", configured("name=x"), Path("outputs/sweeps/a/seed=1,x=(2)"))
    assert command.startswith("apa-train 'resume=outputs/sweeps/a/seed=1,x=(2)' reward.target=/")
    assert command.endswith(" --config-dir 'my conf'")


# --- disk full ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """small_files(bytes): no file may grow larger, as on a disk that is full; undone at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_saving_costs_nothing_that_was_saved(
    small_files, stopping_at, train, again, tmp_path, comparable, whole
):
    run = tmp_path / "whole"
    stopping_at(3, lambda: small_files(50_000))  # the policy's file needs 140 kB
    with pytest.raises(UserError, match=r"iteration_000003 cannot be written \(.*\); what was saved before") as error:
        train(run, *WORDS, "iterations=4")
    assert "\n" not in str(error.value)
    small_files(resource.RLIM_INFINITY)
    stopping_at(0, None)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_000001", "iteration_000002"]
    again(f"resume={run}")
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")


def test_results_that_cannot_be_written_leave_the_checkpoint(
    small_files, train, again, tmp_path, comparable, whole, monkeypatch
):
    from apa_cli.training.trainer import Trainer

    run, writing = tmp_path / "whole", Trainer.save_models
    monkeypatch.setattr(Trainer, "save_models", lambda *arguments: (small_files(50_000), writing(*arguments)))
    with pytest.raises(UserError, match=r"the trained models cannot be written \(.*\); the checkpoint is intact"):
        train(run, *WORDS, "iterations=4")
    small_files(resource.RLIM_INFINITY)
    monkeypatch.setattr(Trainer, "save_models", writing)
    assert not (run / "result.json").exists()
    again("name=whole", f"resume={run}")
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_a_disk_that_fills_up_while_logging_stops_the_run_in_one_line(
    small_files, stopping_at, train, again, tmp_path, comparable, whole
):
    run = tmp_path / "whole"
    stopping_at(3, lambda: small_files((run / "metrics.jsonl").stat().st_size + 100))
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(File too large\)") as error:
        train(run, *WORDS, "iterations=4")
    assert "\n" not in str(error.value)
    small_files(resource.RLIM_INFINITY)
    stopping_at(0, None)
    again(f"resume={run}")
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")


def test_a_fork_may_take_another_algorithm_and_a_reference_that_moves(run_train, records):
    run = run_train("iterations=1", "algo=apa")
    fork = run_train(f"fork={run}", "algo=ppo", "reference.refresh_every=1", "iterations=2", name="fork")
    *_, first, second = records(fork / "metrics.jsonl")
    assert first == records(run / "metrics.jsonl")[-1]
    assert second["ppo/kl_coef"] == 0.05
    # The loss's reference was still the SFT model when the fork began.
    assert second["kl/refreshed"] == pytest.approx(second["kl/sequence"], rel=1e-6)
    assert "from iteration 2 on: " in (log := (fork / "run.log").read_text()) and "reference.refresh_every 0 → 1" in log


def test_a_shortened_run_ends_with_an_evaluation_of_the_policy_that_it_leaves(run_train, records):
    words = ["evaluation.every=0", "checkpoint.keep_last=3"]
    run = run_train(*words, "iterations=3")
    run_train(*words, "iterations=2", f"resume={run}/checkpoints/iteration_000002")
    rows = records(run / "metrics.jsonl")
    assert "goes on after iteration 2" in (run / "run.log").read_text()
    assert [row["iteration"] for row in rows] == [0, 1, 2, 2] and rows[-1]["eval/kl_exact"] > 1e-4
    assert json.loads((run / "result.json").read_text())["eval/kl_exact"] == rows[-1]["eval/kl_exact"]
