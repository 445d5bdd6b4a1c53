"""A run's directory: its files, the run that owns it, and a resume in it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from apa_cli.errors import ConfigError, UserError
from apa_cli.pool import Pool
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.checkpoint import load_checkpoint
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.resume import find_differences

OVERRIDES = [
    "evaluation.every=1",
    "checkpoint.keep_last=9",
    "algo.kl_horizon=24",
    "algo=ppo",
    "algo.kl_controller=adaptive",
]


@pytest.fixture(scope="module")
def finished_run(train, tmp_path_factory):
    """Directory of a finished run of three iterations, evaluated and saved after each, with its curves."""
    return train(tmp_path_factory.mktemp("finished_run") / "finished_run", *OVERRIDES, curves=True)


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """Copy of that run, to damage or to resume."""
    return Path(shutil.copytree(finished_run, tmp_path / "finished_run"))


@pytest.fixture
def resume(train, run_copy):
    """resume(*overrides) → directory of the copied run, resumed with further overrides."""
    return lambda *overrides: train(run_copy, *OVERRIDES, f"resume={run_copy}", *overrides)


def test_directory_has_the_documented_files(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints",
        "model", "critic", "run.log", "result.json", ".lock",
    }  # fmt: skip
    assert (finished_run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "held-out reward" in (finished_run / "run.log").read_text()


def test_config_yaml_is_the_composed_configuration(finished_run, make_config):
    stored = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert stored == make_config("name=finished_run", *OVERRIDES).raw
    assert "${" not in (finished_run / "config.yaml").read_text()


def test_environment_json_has_versions_but_no_environment_variables(finished_run, train, tmp_path, monkeypatch):
    facts = json.loads((finished_run / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert {"python", "platform", "git_commit", "device", "threads", "command"} <= facts.keys()
    monkeypatch.setenv("SECRET_OF_THE_TEST", "a value that must not be stored")
    run = train(tmp_path / "run", "iterations=0")
    stored = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(b"SECRET_OF_THE_TEST" in text or b"must not be stored" in text for text in stored)


def test_samples_have_scores_and_endings(finished_run, records):
    rows = records(finished_run / "samples.jsonl")
    assert [row["iteration"] for row in rows] == [i for i in range(4) for _ in range(6)]
    assert {row["samples"] for row in rows} == {0, 8, 16, 24}
    for row in rows:
        assert row.keys() == {"iteration", "samples", "prompt", "response", "score", "kl", "ending"}
        assert row["ending"] in ("eos", "stop", "length")
    for iteration, metrics in enumerate(records(finished_run / "metrics.jsonl")):
        evaluated = rows[6 * iteration : 6 * iteration + 6]
        assert metrics["eval/reward_mean"] == pytest.approx(sum(row["score"] for row in evaluated) / 6, rel=1e-5)
        assert metrics["eval/kl_exact"] == pytest.approx(sum(row["kl"] for row in evaluated) / 6, rel=1e-5, abs=1e-7)
        assert metrics["eval/eos_rate"] == sum(row["ending"] == "eos" for row in evaluated) / 6


def test_model_is_the_trained_policy(finished_run, tiny, records):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "model")
    model = AutoModelForCausalLM.from_pretrained(finished_run / "model").eval()
    policy = load_checkpoint(finished_run / "checkpoints" / "iteration_000003")[0]["policy"]
    stored = model.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in policy.items())
    other = AutoModelForCausalLM.from_pretrained(tiny).eval()
    assert not torch.equal(other.get_output_embeddings().weight, model.get_output_embeddings().weight)
    other.load_state_dict(policy, strict=False)
    for row in records(finished_run / "samples.jsonl")[-6:]:
        ids = tokenizer(row["prompt"] + row["response"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.allclose(model(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1), atol=1e-6)


def test_second_run_in_a_directory_is_refused(run_copy, train):
    before = (run_copy / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="already contains a run") as error:
        train(run_copy, *OVERRIDES)
    assert "\n" not in str(error.value) and str(run_copy) in str(error.value)
    assert (run_copy / "metrics.jsonl").read_text() == before


# --- resuming -----------------------------------------------------------------------------------------------


def test_resume_with_other_settings_is_refused_with_old_and_new_values(run_copy, resume):
    before = (run_copy / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError) as error:
        resume("seed=5", "optimizer.lr=0.5")
    message = str(error.value)
    assert "seed: 0 → 5" in message and "optimizer.lr: 0.0003 → 0.5" in message
    assert "\n" not in message and error.value.status == 2
    assert (run_copy / "metrics.jsonl").read_text() == before


def test_finished_run_can_be_extended(run_copy, resume, records, comparable):
    before = comparable(run_copy / "metrics.jsonl")
    resume("iterations=4", "checkpoint.every=2")
    after = comparable(run_copy / "metrics.jsonl")
    assert after[:4] == before and [row["iteration"] for row in after] == [0, 1, 2, 3, 4]
    assert after[-1]["samples"] == 32
    assert max(row["iteration"] for row in records(run_copy / "samples.jsonl")) == 4
    assert (run_copy / "checkpoints" / "iteration_000004").is_dir()


def test_extended_run_equals_one_that_was_long_from_the_start(run_copy, resume, train, comparable, tmp_path):
    resume("iterations=4")
    uninterrupted = train(tmp_path / "uninterrupted", *OVERRIDES, "iterations=4")
    assert comparable(run_copy / "metrics.jsonl") == comparable(uninterrupted / "metrics.jsonl")


def test_resumed_finished_run_only_writes_its_results_again(run_copy, resume, comparable):
    before = comparable(run_copy / "metrics.jsonl")
    shutil.rmtree(run_copy / "model")
    resume()
    assert comparable(run_copy / "metrics.jsonl") == before
    assert (run_copy / "model" / "model.safetensors").is_file()


def test_resume_beyond_the_last_iteration_ends_at_once(train, tmp_path):
    overrides = ["iterations=3", "evaluation.every=0"]
    run = train(tmp_path / "run", *overrides)
    train(run, *overrides, f"resume={run}/checkpoints/iteration_000002", "iterations=1")
    assert (run / "model" / "model.safetensors").is_file()


def test_records_after_the_checkpoint_are_removed(run_copy, train, records):
    train(run_copy, *OVERRIDES, f"resume={run_copy}/checkpoints/iteration_000001", "iterations=2", "evaluation.every=0")
    rows = records(run_copy / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert sorted({row["iteration"] for row in records(run_copy / "samples.jsonl")}) == [0, 1, 2]


def test_damaged_checkpoint_is_reported_and_the_one_before_is_used(run_copy, resume, comparable):
    file = run_copy / "checkpoints" / "iteration_000003" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before, samples = comparable(run_copy / "metrics.jsonl"), (run_copy / "samples.jsonl").read_text()
    resume()
    messages = [line for line in (run_copy / "run.log").read_text().splitlines() if "is missing or damaged" in line]
    assert messages == [f"resume: {file} is missing or damaged; the checkpoint before it is used"]
    assert comparable(run_copy / "metrics.jsonl") == before and (run_copy / "samples.jsonl").read_text() == samples
    saved_again = run_copy / "checkpoints" / "iteration_000003"
    assert len(checkpoints.verify_checkpoint(saved_again)) == 5


def test_resume_without_an_intact_checkpoint_changes_nothing(run_copy, resume):
    for checkpoint in (run_copy / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    before = [(run_copy / name).read_text() for name in ("metrics.jsonl", "samples.jsonl", "config.yaml")]
    with pytest.raises(UserError, match=r"iteration_000001/state.json is missing or damaged"):
        resume()
    assert [(run_copy / name).read_text() for name in ("metrics.jsonl", "samples.jsonl", "config.yaml")] == before


def test_resume_from_a_damaged_checkpoint_keeps_the_records(run_copy, train):
    (run_copy / "checkpoints" / "iteration_000001" / "policy.safetensors").write_bytes(b"")
    before = (run_copy / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"policy\.safetensors"):
        train(run_copy, *OVERRIDES, f"resume={run_copy}/checkpoints/iteration_000001")
    assert (run_copy / "metrics.jsonl").read_text() == before


def test_resume_without_checkpoint_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="no checkpoint") as error:
        train(tmp_path / "run", f"resume={tmp_path}/nothing")
    assert "\n" not in str(error.value)


def test_differences_have_dotted_keys():
    old = {"seed": 0, "name": "a", "iterations": 3, "algo": {"gamma": 1.0, "inner": {"x": [1]}}, "gone": 1}
    new = {"seed": 0, "name": "b", "iterations": 9, "algo": {"gamma": 0.9, "inner": {"x": [2]}}, "new": None}
    assert find_differences(old, new) == [
        ("algo.gamma", 1.0, 0.9),
        ("algo.inner.x", [1], [2]),
        ("gone", 1, None),
    ]


@pytest.mark.parametrize("section", ["tracking", "evaluation", "checkpoint", "launch"])
def test_sections_that_do_not_affect_training_may_differ(section):
    assert not find_differences({section: {"key": 1}}, {section: {"key": 2}})


def test_nested_key_with_the_name_of_a_free_one_may_not_differ():
    assert find_differences({"algo": {"iterations": 1}}, {"algo": {"iterations": 2}}) == [("algo.iterations", 1, 2)]


def test_evaluation_seed_may_not_differ():
    old, new = ({"evaluation": {"seed": seed, "prompts": seed}} for seed in (1, 2))
    assert find_differences(old, new) == [("evaluation.seed", 1, 2)]


def test_a_start_after_a_kill_before_the_first_checkpoint_removes_the_pools(tmp_path):
    directory = RunDirectory(tmp_path)
    pool = Pool()
    pool.append([{"n": 1}])
    pool.save(directory.pools / "pool.jsonl")
    directory.clear()
    assert not any(tmp_path.iterdir())


# --- a name that is used already ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(make_config):
    """The configuration of a run named "run", as it is recorded."""
    return make_config("name=run").raw


@pytest.fixture
def write_run(tmp_path, raw):
    """write_run(rows, *overrides) → the directory of a run that recorded these iterations; None: no metrics.jsonl."""

    def write(iterations):
        path = tmp_path / "run"
        RunDirectory(path).claim(raw)
        if iterations is not None:
            rows = "".join(json.dumps({"iteration": n, "samples": 8 * n}) + "\n" for n in range(iterations + 1))
            (path / "metrics.jsonl").write_text(rows)
        return path

    return write


@pytest.mark.parametrize("iterations", [None, 0])
def test_run_that_ended_before_its_first_iteration_does_not_block_its_name(iterations, write_run, make_config, capsys):
    path = write_run(iterations)
    (path / "run.log").write_text("why it ended")
    RunDirectory(path).claim(make_config("name=run", "seed=7").raw)
    assert capsys.readouterr().out == f"{path}: a run that ended before its first iteration is replaced\n"
    assert sorted(file.name for file in path.iterdir()) == ["config.yaml", "run.log"]
    assert yaml.safe_load((path / "config.yaml").read_text())["seed"] == 7


@pytest.mark.parametrize(
    "result", [None, "result.json", "eval.json", "bench.json", "model", "checkpoints/iteration_000000"]
)
def test_run_with_iterations_or_results_blocks_its_name(result, write_run, raw):
    path = write_run(3 if result is None else 0)
    if result is not None:
        (path / result).mkdir(parents=True)
    before = (path / "metrics.jsonl").read_text()
    message = "ended after 3 iterations without a checkpoint" if result is None else "overwrite=true to remove it"
    with pytest.raises(UserError, match=message):
        RunDirectory(path).claim(raw)
    assert (path / "metrics.jsonl").read_text() == before


def test_overwrite_removes_what_a_run_wrote_and_follows_no_link(write_run, make_config, tmp_path):
    path, outside = write_run(3), tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for folder in ("checkpoints/iteration_000003", "model", "pools", "faults"):
        (path / folder).mkdir(parents=True)
    (path / "critic").symlink_to(outside)
    (path / "model" / "link").symlink_to(outside)
    for file in ("eval_iteration_000003.json", "curves.png", "notes.txt"):
        (path / file).write_text("")
    RunDirectory(path).claim(make_config("name=run", "overwrite=true").raw)
    assert sorted(file.name for file in path.iterdir()) == ["config.yaml", "notes.txt"]
    assert (outside / "kept").read_text() == "kept"


def test_overwrite_refuses_what_is_no_run_and_what_it_reads(write_run, make_config, tmp_path):
    raw = make_config("name=run", "overwrite=true").raw
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("logging: true\n")
    (tmp_path / "other" / "model").mkdir()
    with pytest.raises(ConfigError, match=r"^overwrite: .*other is not the directory of a run"):
        RunDirectory(tmp_path / "other").claim(raw)
    assert (tmp_path / "other" / "model").is_dir()
    path = write_run(3)
    (path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"^overwrite: model\.path is in .*run, which would be removed"):
        RunDirectory(path).claim({**raw, "model": {"path": f"{path}/model"}})
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match=r"^overwrite: .*link is a link, whose target is left alone"):
        RunDirectory(tmp_path / "link").claim(raw)
    assert (path / "metrics.jsonl").is_file()
    with pytest.raises(ConfigError, match=r"^overwrite: resume=auto continues the run"):
        make_config("name=run", "overwrite=true", "resume=auto")


def test_files_have_the_permissions_of_the_umask(finished_run):
    files = [path for path in finished_run.rglob("*") if path.is_file() and path.name != ".lock"]
    expected = (finished_run / "metrics.jsonl").stat().st_mode
    assert len(files) > 20 and {file.stat().st_mode for file in files} == {expected}
