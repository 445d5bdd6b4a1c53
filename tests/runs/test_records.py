"""Runs read back: find a run by its name, its files, its configuration, damaged and missing files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apa_cli.errors import ConfigError, UserError
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.files import read_lines, read_rows
from apa_cli.runs.records import RecordedRun, find_runs

CONFIG = {
    "name": "first",
    "seed": 3,
    "lambda": 0.1,
    "algo": {"_target_": "apa_cli.algorithms.apa.APA"},
    "model": {"path": None},
    "reward": {"path": None},
}


@pytest.fixture
def write_run(tmp_path):
    """write_run(config=…, environment=…) → directory of a run of two iterations and a checkpoint of the first."""

    def write(config: dict = CONFIG, environment: dict | None = None) -> Path:
        directory = tmp_path / "run"
        checkpoint = directory / "checkpoints" / "iteration_000001"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.json").write_text('{"iteration": 1, "wandb_id": "abc"}')
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        facts = {"policy": "cache/sft", "reward": "cache/reward"} if environment is None else environment
        (directory / "environment.json").write_text(json.dumps(facts))
        rows = [{"iteration": number, "samples": 8 * number} for number in range(3)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / "samples.jsonl").write_text('{"iteration": 0, "response": "yes"}\n')
        return directory

    return write


def test_run_and_checkpoint_are_found(write_run):
    directory = write_run()
    run = RecordedRun.find(str(directory))
    assert (run.directory, run.checkpoint, run.iteration) == (directory, None, 2)
    checkpoint = RecordedRun.find(f"{directory}/checkpoints/iteration_000001")
    assert (checkpoint.directory, checkpoint.iteration) == (directory, 1)
    assert checkpoint.checkpoint == directory / "checkpoints" / "iteration_000001"
    assert run.wandb_id == checkpoint.wandb_id == "abc"
    assert run.samples == [{"iteration": 0, "response": "yes"}]
    assert run.sample_count == 16


def test_folder_that_is_no_run_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/first", "outputs/first/model"):
        Path(folder).mkdir(parents=True)
    Path("outputs/first/model/config.json").write_text("{}")
    explanations = {
        "outputs/frist": "there is no config.yaml; did you mean outputs/first?",
        "outputs/else": "there is no config.yaml",
        "outputs/first": "there is no config.yaml",
        "outputs/first/model": "for a model alone give model.path=outputs/first/model",
    }
    for name, explanation in explanations.items():
        with pytest.raises(ConfigError) as error:
            RecordedRun.find(name)
        assert str(error.value) == f"run: {name} is neither a run of apa-train nor its checkpoint ({explanation})"
    Path("outputs/first/metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"its run is outputs/first, and for a model alone give model.path="):
        RecordedRun.find("outputs/first/model")


def test_run_of_another_command_is_refused(write_run):
    directory = write_run(environment={"command": ["apa-sft"]})
    with pytest.raises(ConfigError, match=rf"not a run of apa-train; give model.path={directory}/model instead"):
        RecordedRun.find(str(directory))


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.yaml", "a: [1\nb: 2"), ("config.yaml", "[]"), ("environment.json", "{"), ("environment.json", "[]")],
)
def test_unreadable_configuration_is_one_line(file, content, write_run):
    directory = write_run()
    (directory / file).write_text(content)
    with pytest.raises(ConfigError, match=rf"^run: config\.yaml or environment\.json of {directory} cannot be read$"):
        RecordedRun.find(str(directory))
    with pytest.raises(UserError, match=rf"^{directory}/{file}: not ") as error:
        RecordedRun.read(directory)
    assert "\n" not in str(error.value)


def test_models_of_the_stages_are_filled_in(write_run):
    config = RecordedRun.find(str(write_run())).config
    assert (config["model"]["path"], config["reward"]["path"]) == ("cache/sft", "cache/reward")
    own_model = {**CONFIG, "model": {"path": "mine"}, "reward": {"target": "my.py:f"}}
    run = RecordedRun.find(str(write_run(own_model)))
    assert (run.config["model"]["path"], run.config["reward"]) == ("mine", {"target": "my.py:f"})


def test_config_yaml_is_left_as_it_is_written(write_run):
    run = RecordedRun.find(str(write_run()))
    assert run.config["model"]["path"] and run.config_yaml == CONFIG


def test_algorithm_is_described_by_the_environment(write_run):
    described = {"label": "APA+", "color": "#123456", "lambda_meaning": "temperature"}
    run = RecordedRun.read(write_run(environment={"algorithm": described}))
    assert (run.label, run.color, run.lambda_meaning) == ("APA+", "#123456", "temperature")
    run = RecordedRun.read(write_run(environment={}))
    assert (run.label, run.color, run.lambda_meaning) == ("APA", None, None)
    shutil.move(run.directory / "environment.json", run.directory / "gone.json")
    assert RecordedRun.read(run.directory).label == "APA"


def test_model_folder_needs_a_finished_run(write_run):
    run = RecordedRun.find(str(write_run()))
    with pytest.raises(UserError, match=r"has not finished, so it has no model/; name one of its checkpoints"):
        _ = run.model_folder
    assert run.result is None
    (run.directory / "model").mkdir()
    (run.directory / "model" / "config.json").write_text("{}")
    (run.directory / "result.json").write_text('{"iteration": 2}')
    run = RecordedRun.find(str(run.directory))
    assert run.model_folder == run.directory / "model" and run.result == {"iteration": 2}


def test_incomplete_result_counts_as_unfinished(tmp_path):
    (tmp_path / "result.json").write_text('{"iteration": 2')
    assert RecordedRun(tmp_path).result is None
    assert RunDirectory(tmp_path).final_iteration is None


# --- .jsonl files -------------------------------------------------------------------------------------------


def test_lines_end_only_at_line_feeds(tmp_path):
    file = tmp_path / "samples.jsonl"
    odd = "a\u2028b\x85c"
    RunDirectory(tmp_path).append_rows(file, [{"iteration": number, "response": odd} for number in (1, 2, 3)])
    assert [row["response"] for row in read_rows(file)] == [odd, odd, odd]
    assert [json.loads(line)["response"] for line in read_lines(file, 2)] == [odd, odd]


def test_incomplete_last_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1}\n\n{"iteration": 2}\n{"iterat')
    assert read_lines(file, 9) == ['{"iteration": 1}', '{"iteration": 2}']
    assert read_rows(file) == [{"iteration": 1}, {"iteration": 2}]


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", '{"samples": 1}', '{"iteration": null}', '{"iteration": Infinity}']
)
def test_unreadable_line_is_named_with_its_number(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"iteration": 1}}\n{line}\n{{"iteration": 2}}\n')
    for read in (read_rows, lambda path: read_lines(path, 9)):
        with pytest.raises(UserError, match=rf'^{file}, line 2: not JSON with "iteration"$'):
            read(file)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}/samples.jsonl: cannot be read \(No such file or directory\)$"):
        _ = RecordedRun(tmp_path).samples


def test_import_loads_no_heavy_library():
    code = "import sys, apa_cli.runs.records; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "wandb", "matplotlib", "numpy", "hydra", "omegaconf"}


# --- metrics ------------------------------------------------------------------------------------------------

TIMES = {"time/rollout_s": 30.0, "time/score_s": 10.0, "time/update_s": 20.0}
METRICS = [
    {"iteration": 0, "samples": 0, "eval/reward_mean": 0.2},
    {"iteration": 1, "samples": 64, "kl/sequence": 5.0, **TIMES},
    {"iteration": 2, "samples": 128, "kl/sequence": 10.0, **TIMES, "eval/reward_mean": 0.8},
]


def write_metrics(directory: Path, rows: list[dict]) -> RecordedRun:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RecordedRun.read(directory)


def test_metrics_are_summarized(write_run):
    run = write_metrics(write_run(), METRICS)
    assert (run.name, run.seed, run.lambda_) == ("first", 3, 0.1)
    assert run.sft == METRICS[0] and run.final == METRICS[2]
    assert run.sample_count == 128
    assert run.minutes == 2.0  # two iterations of 30 + 10 + 20 s
    assert run.get_series("kl/sequence") == {64: 5.0, 128: 10.0}
    assert run.get_last("kl/sequence") == 10.0 and run.get_last("apa/log_z") is None


def test_evaluation_after_training_is_not_the_sft_models(write_run):
    run = write_metrics(write_run(), METRICS[1:])
    assert run.sft is None and run.final == METRICS[2]


def test_repeated_iteration_counts_once(write_run):
    run = write_metrics(write_run(), [*METRICS, {"iteration": 1, "samples": 64, "kl/sequence": 6.0}])
    assert [row["iteration"] for row in run.metrics] == [0, 1, 2]
    assert run.get_series("kl/sequence") == {64: 6.0, 128: 10.0}


def test_last_line_without_samples_is_left_out(write_run):
    assert write_metrics(write_run(), [*METRICS, {"iteration": 3}]).sample_count == 128


def test_run_without_metrics_is_refused(write_run):
    with pytest.raises(UserError, match=r"metrics\.jsonl: nothing recorded yet"):
        write_metrics(write_run(), [])


# --- folders ------------------------------------------------------------------------------------------------


def test_runs_are_found_in_a_sweep(tmp_path):
    jobs = [tmp_path / "sweep" / name for name in ("job0", "job1")]
    for job in jobs:
        (job / "wandb").mkdir(parents=True)
        for file in ("config.yaml", "metrics.jsonl", "wandb/config.yaml"):
            (job / file).touch()
    assert find_runs(tmp_path) == jobs
    assert find_runs(jobs[0]) == [jobs[0]]


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}/missing: no such folder$"):
        find_runs(tmp_path / "missing")
    with pytest.raises(UserError, match=rf"^{tmp_path}: no run in it"):
        find_runs(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}: not a run \(it has no config.yaml\)"):
        RecordedRun.read(tmp_path)
