"""A run's directory: what is in it, who may write to it, what a resume does to it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from apa_cli.errors import ConfigError, UserError
from apa_cli.runs.checkpoint import load
from apa_cli.runs.records import located_run
from apa_cli.runs.resume import differences
from apa_cli.training.launch import checkpoint as checkpoints

WORDS = [
    "evaluation.every=1",
    "checkpoint.keep_last=9",
    "algo.kl_horizon=24",
    "algo=ppo",
    "algo.kl_controller=adaptive",
]


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A finished run of three iterations, evaluated and saved after each, with its curves."""
    return train(tmp_path_factory.mktemp("finished") / "finished", *WORDS, curves=True)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run to damage or go on with."""
    return Path(shutil.copytree(finished, tmp_path / "finished"))


@pytest.fixture
def resume(train, copied):
    """resume(*words) → the copied run, continued with further words."""
    return lambda *words: train(copied, *WORDS, f"resume={copied}", *words)


def test_it_holds_what_the_readme_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints",
        "model", "critic", "run.log", "result.json", ".lock",
    }  # fmt: skip
    assert (finished / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "held-out reward" in (finished / "run.log").read_text()


def test_config_yaml_is_the_composed_configuration(finished, configured):
    stored = yaml.safe_load((finished / "config.yaml").read_text())
    assert stored == configured("name=finished", *WORDS).raw
    assert "${" not in (finished / "config.yaml").read_text()


def test_environment_json_has_versions_and_no_environment(finished, train, tmp_path, monkeypatch):
    facts = json.loads((finished / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert {"python", "platform", "git_commit", "device", "threads", "command"} <= facts.keys()
    monkeypatch.setenv("SECRET_OF_THE_TEST", "a value nobody should store")
    run = train(tmp_path / "run", "iterations=0")
    stored = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(b"SECRET_OF_THE_TEST" in text or b"nobody should store" in text for text in stored)


def test_samples_tell_how_each_reply_ended(finished, records):
    rows = records(finished / "samples.jsonl")
    assert [row["iteration"] for row in rows] == [i for i in range(4) for _ in range(6)]
    assert {row["samples"] for row in rows} == {0, 8, 16, 24}
    for row in rows:
        assert row.keys() == {"iteration", "samples", "prompt", "response", "score", "kl", "ending"}
        assert row["ending"] in ("eos", "stop", "length")
    for iteration, metrics in enumerate(records(finished / "metrics.jsonl")):
        own = rows[6 * iteration : 6 * iteration + 6]
        assert metrics["eval/reward_mean"] == pytest.approx(sum(row["score"] for row in own) / 6, rel=1e-5)
        assert metrics["eval/kl_exact"] == pytest.approx(sum(row["kl"] for row in own) / 6, rel=1e-5, abs=1e-7)
        assert metrics["eval/eos_rate"] == sum(row["ending"] == "eos" for row in own) / 6


def test_model_is_the_trained_policy_and_loads_anywhere(finished, tiny, records):
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    policy = load(finished / "checkpoints" / "iteration_000003")[0]["policy"]
    stored = model.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in policy.items())
    other = AutoModelForCausalLM.from_pretrained(tiny).eval()
    assert not torch.equal(other.get_output_embeddings().weight, model.get_output_embeddings().weight)
    other.load_state_dict(policy, strict=False)
    for row in records(finished / "samples.jsonl")[-6:]:
        ids = tokenizer(row["prompt"] + row["response"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.allclose(model(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1), atol=1e-6)


def test_a_second_run_in_the_same_directory_is_refused(copied, train):
    before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run already") as error:
        train(copied, *WORDS)
    assert "\n" not in str(error.value) and str(copied) in str(error.value)
    assert (copied / "metrics.jsonl").read_text() == before


# --- resuming -----------------------------------------------------------------------------------------------


def test_other_words_are_refused_with_their_old_and_new_values(copied, resume):
    before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError) as error:
        resume("seed=5", "optimizer.lr=0.5")
    message = str(error.value)
    assert "seed: 0 → 5" in message and "optimizer.lr: 0.0003 → 0.5" in message
    assert "\n" not in message and error.value.status == 2
    assert (copied / "metrics.jsonl").read_text() == before


def test_a_run_can_be_made_longer(copied, resume, records, comparable):
    before = comparable(copied / "metrics.jsonl")
    resume("iterations=4", "checkpoint.every=2")
    after = comparable(copied / "metrics.jsonl")
    assert after[:4] == before and [row["iteration"] for row in after] == [0, 1, 2, 3, 4]
    assert after[-1]["samples"] == 32
    assert max(row["iteration"] for row in records(copied / "samples.jsonl")) == 4
    assert (copied / "checkpoints" / "iteration_000004").is_dir()


def test_a_longer_run_equals_one_that_was_long_from_the_start(copied, resume, train, comparable, tmp_path):
    resume("iterations=4")
    whole = train(tmp_path / "whole", *WORDS, "iterations=4")
    assert comparable(copied / "metrics.jsonl") == comparable(whole / "metrics.jsonl")


def test_a_finished_run_that_is_resumed_only_writes_its_results_again(copied, resume, comparable):
    before = comparable(copied / "metrics.jsonl")
    shutil.rmtree(copied / "model")
    resume()
    assert comparable(copied / "metrics.jsonl") == before
    assert (copied / "model" / "model.safetensors").is_file()


def test_fewer_iterations_than_were_done_end_the_run_at_once(train, tmp_path):
    words = ["iterations=3", "evaluation.every=0"]
    run = train(tmp_path / "run", *words)
    train(run, *words, f"resume={run}/checkpoints/iteration_000002", "iterations=1")
    assert (run / "model" / "model.safetensors").is_file()


def test_records_behind_the_checkpoint_are_cut(copied, train, records):
    train(copied, *WORDS, f"resume={copied}/checkpoints/iteration_000001", "iterations=2", "evaluation.every=0")
    rows = records(copied / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert sorted({row["iteration"] for row in records(copied / "samples.jsonl")}) == [0, 1, 2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copied, resume, comparable):
    file = copied / "checkpoints" / "iteration_000003" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before, samples = comparable(copied / "metrics.jsonl"), (copied / "samples.jsonl").read_text()
    resume()
    said = [line for line in (copied / "run.log").read_text().splitlines() if "is missing or damaged" in line]
    assert said == [f"resume: {file} is missing or damaged; the checkpoint before it is used"]
    assert comparable(copied / "metrics.jsonl") == before and (copied / "samples.jsonl").read_text() == samples
    assert len(checkpoints.verified(copied / "checkpoints" / "iteration_000003")) == 5  # it was saved anew


def test_where_every_checkpoint_is_damaged_nothing_is_changed(copied, resume):
    for checkpoint in (copied / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    before = [(copied / name).read_text() for name in ("metrics.jsonl", "samples.jsonl", "config.yaml")]
    with pytest.raises(UserError, match=r"iteration_000001/state.json is missing or damaged"):
        resume()
    assert [(copied / name).read_text() for name in ("metrics.jsonl", "samples.jsonl", "config.yaml")] == before


def test_a_damaged_checkpoint_that_is_not_the_last_costs_no_records(copied, train):
    (copied / "checkpoints" / "iteration_000001" / "policy.safetensors").write_bytes(b"")
    before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"policy\.safetensors"):
        train(copied, *WORDS, f"resume={copied}/checkpoints/iteration_000001")
    assert (copied / "metrics.jsonl").read_text() == before


def test_there_must_be_something_to_resume(train, tmp_path):
    with pytest.raises(UserError, match="no checkpoint") as error:
        train(tmp_path / "run", f"resume={tmp_path}/nothing")
    assert "\n" not in str(error.value)


def test_differences_are_named_by_their_dotted_keys():
    old = {"seed": 0, "name": "a", "iterations": 3, "algo": {"gamma": 1.0, "inner": {"x": [1]}}, "gone": 1}
    new = {"seed": 0, "name": "b", "iterations": 9, "algo": {"gamma": 0.9, "inner": {"x": [2]}}, "new": None}
    assert differences(old, new) == [
        ("algo.gamma", 1.0, 0.9),
        ("algo.inner.x", [1], [2]),
        ("gone", 1, None),
    ]


@pytest.mark.parametrize("section", ["tracking", "evaluation", "checkpoint", "launch"])
def test_what_does_not_change_the_training_may_differ(section):
    assert not differences({section: {"key": 1}}, {section: {"key": 2}})


def test_a_key_that_only_has_the_name_of_a_free_one_may_not_differ():
    assert differences({"algo": {"iterations": 1}}, {"algo": {"iterations": 2}}) == [("algo.iterations", 1, 2)]


def test_what_is_no_run_is_said_with_what_it_could_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/first", "outputs/first/model"):
        Path(folder).mkdir(parents=True)
    Path("outputs/first/model/config.json").write_text("{}")
    why = {
        "outputs/frist": "there is no config.yaml; did you mean outputs/first?",
        "outputs/else": "there is no config.yaml",
        "outputs/first": "there is no config.yaml",
        "outputs/first/model": "a model alone is given by model.path=outputs/first/model",
    }
    for name, words in why.items():
        with pytest.raises(ConfigError) as error:
            located_run(name)
        assert str(error.value) == f"run: {name} is no run of apa-train and no checkpoint of one ({words})"
    Path("outputs/first/metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"its run is outputs/first, and a model alone is given by model.path="):
        located_run("outputs/first/model")
