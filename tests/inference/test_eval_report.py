"""apa-eval: whole evaluations of tiny runs repeat the metrics of training."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from apa_cli.config.build import build_config
from apa_cli.config.from_run import compose_from_run
from apa_cli.errors import UserError
from apa_cli.inference import eval_report
from apa_cli.inference.eval_report import evaluate_model, evaluate_run
from apa_cli.runs.old_names import CURRENT_NAMES
from apa_cli.runs.records import RecordedRun
from apa_cli.runs.tracking import Tracker

pytestmark = pytest.mark.slow

NO_BEST_OF_N = "evaluation.best_of=[]"


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A run of three iterations, evaluated after each, that moved away from its SFT model."""
    overrides = ["evaluation.every=1", "optimizer.lr=1e-2", "checkpoint.keep_last=9", "algo=ppo", "lambda=0"]
    return train(tmp_path_factory.mktemp("evaluated") / "finished", *overrides)


@pytest.fixture(scope="module")
def report(finished):
    return evaluate(finished, "evaluation.best_of=[1,2,4]", "evaluation.best_of_prompts=4")


def evaluate(path, *overrides, file="eval.json"):
    """Run apa-eval run=…; return the content of `file`."""
    run = RecordedRun.find(str(path))
    target = run.config["reward"]["target"]
    evaluate_run(build_config(compose_from_run([f"run={path}", f"reward.target={target}", *overrides])), run)
    return json.loads((run.directory / file).read_text())


def read_evaluations(directory) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key.startswith("eval/")} for row in rows]


def test_a_report_repeats_the_runs_last_evaluation(finished, report):
    first, *_, last = read_evaluations(finished)
    assert {key: report["metrics"][key] for key in last} == last
    assert report["iteration"] == 3 and report["prompts"] == 6 and report["eval_seed"] == 1234
    assert last["eval/kl_exact"] > 0.1  # else there would be nothing to measure
    assert report["metrics"]["eval/reward_ci_sft"] == first["eval/reward_ci"]
    for name in ("entropy", "distinct_2", "length", "eos_rate"):
        assert report["metrics"][f"eval/{name}_sft"] == first[f"eval/{name}"]
    gain = last["eval/reward_mean"] - last["eval/reward_mean_sft"]
    assert report["metrics"]["eval/gain"] == pytest.approx(gain, abs=1e-6)


def test_every_reply_is_written_with_its_scores(finished, report, records):
    rows = records(finished / "samples.jsonl")
    before, after = ([row for row in rows if row["iteration"] == iteration] for iteration in (0, 3))
    keys = ("response", "score", "kl", "ending")
    for row, sft, policy in zip(report["replies"], before, after, strict=True):
        assert row["prompt"] == sft["prompt"]
        assert row["sft"] == {key: sft[key] for key in keys} | {"kl": pytest.approx(0, abs=1e-6)}
        assert row["policy"] == {key: policy[key] for key in keys}


def test_best_of_n_has_random_numbers_of_its_own(report):
    best = [report["metrics"][f"eval/best_of_{n}/reward_mean"] for n in (1, 2, 4)]
    assert best == sorted(set(best))
    scores = [row["sft"]["score"] for row in report["replies"][:4]]
    assert abs(best[0] - sum(scores) / 4) > 1e-6


def test_a_checkpoint_repeats_the_evaluation_of_its_iteration(finished):
    checkpoint = finished / "checkpoints" / "iteration_000002"
    report = evaluate(checkpoint, NO_BEST_OF_N, file="eval_iteration_000002.json")
    expected = read_evaluations(finished)[2]
    assert {key: report["metrics"][key] for key in expected} == expected
    assert report["iteration"] == 2


def test_a_lora_checkpoint_repeats_its_evaluation_and_the_merged_model_nearly(run_train):
    run = run_train(
        "lora=default", "lora.rank=4", "critic=adapter", "optimizer.lr=2e-2", "iterations=2", "evaluation.every=1"
    )
    expected = read_evaluations(run)[2]
    assert expected["eval/kl_exact"] > 0.01
    checkpoint = run / "checkpoints" / "iteration_000002"
    report = evaluate(checkpoint, NO_BEST_OF_N, file="eval_iteration_000002.json")
    assert {key: report["metrics"][key] for key in expected} == expected
    # Merged weights are rounded differently: 12 tokens of a reply, 1e-5 nats each.
    merged = evaluate(run, NO_BEST_OF_N)
    assert merged["metrics"]["eval/kl_exact"] == pytest.approx(expected["eval/kl_exact"], abs=1.2e-4)


def test_overrides_change_the_runs_settings(finished, tmp_path, capsys):
    (tmp_path / "length.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    further = f"evaluation.rewards=[{{use: function, target: '{tmp_path}/length.py:length', name: size}}]"
    report = evaluate(finished, "evaluation.prompts=3", further, "evaluation.print_samples=1", NO_BEST_OF_N)
    sample = json.loads((finished / "samples.jsonl").read_text().splitlines()[-6])
    assert report["prompts"] == len(report["replies"]) == 3
    assert report["replies"][0]["policy"]["response"] == sample["response"]
    policy_sizes, sft_sizes = (
        [len(row[model]["response"]) for row in report["replies"]] for model in ("policy", "sft")
    )
    assert report["metrics"]["eval/reward_mean/size"] == pytest.approx(sum(policy_sizes) / 3)
    assert report["metrics"]["eval/gain/size"] == pytest.approx((sum(policy_sizes) - sum(sft_sizes)) / 3)
    assert [row["policy"]["score/size"] for row in report["replies"]] == policy_sizes
    printed = capsys.readouterr().out
    assert "score (size)" in printed and printed.count("SFT model   |") == 1 and "Best of n" not in printed


def test_a_model_is_evaluated_by_itself_and_beside_another(finished, tiny, make_config, tmp_path):
    overrides = [f"model.path={finished}/model", NO_BEST_OF_N, "name=plain"]
    evaluate_model(make_config(*overrides), tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "eval.json").read_text())
    last = read_evaluations(finished)[-1]
    assert alone["metrics"]["eval/reward_mean"] == last["eval/reward_mean"]
    assert alone["metrics"]["eval/kl_exact"] == 0 and alone["iteration"] is None
    assert not [key for key in alone["metrics"] if "sft" in key] and "sft" not in alone["replies"][0]
    evaluate_model(make_config(*overrides, f"evaluation.reference={tiny}"), tmp_path / "beside")
    beside = json.loads((tmp_path / "beside" / "eval.json").read_text())
    assert {key: beside["metrics"][key] for key in last} == last
    config = yaml.safe_load((tmp_path / "beside" / "config.yaml").read_text())
    assert config["evaluation"]["reference"] == str(tiny)
    with pytest.raises(UserError, match="already contains a run"):
        evaluate_model(make_config(*overrides), tmp_path / "alone")


def test_a_run_without_a_model_is_refused(run_train):
    run = run_train("iterations=0")
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="has no model/"):
        evaluate(run, NO_BEST_OF_N)


def test_the_policy_is_read_from_the_model_folder(finished, tmp_path):
    """Neither a checkpoint nor the SFT model stands in for it: a changed weight changes the metrics."""
    run = shutil.copytree(finished, tmp_path / "run")
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["gpt_neox.final_layer_norm.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    metrics = evaluate(run, NO_BEST_OF_N)["metrics"]
    assert metrics["eval/kl_exact"] != read_evaluations(finished)[-1]["eval/kl_exact"]
    assert metrics["eval/reward_ci_sft"] == read_evaluations(finished)[0]["eval/reward_ci"]


def test_a_run_with_former_key_names_is_evaluated(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for old, new in CURRENT_NAMES.items():
        section, _, key = new.rpartition(".")
        holder = config[section] if section else config
        if key in holder:
            old_section, _, old_key = old.rpartition(".")
            (config.setdefault(old_section, {}) if old_section else config)[old_key] = holder.pop(key)
    del config["optimizer"]["warmup_ratio"]
    config["optimizer"]["warmup_steps"] = 0
    assert {"rollout_batch", "eval_every", "evaluate", "plan"} <= set(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    last = read_evaluations(finished)[-1]
    metrics = evaluate(run, NO_BEST_OF_N)["metrics"]
    assert {key: metrics[key] for key in last} == last


class RecordingTracker(Tracker):
    """A tracker that stores its arguments and the summary."""

    def __init__(self, *arguments):
        self.arguments, self.summary, self.finished = arguments, {}, False

    def summarize(self, figures):
        self.summary = figures

    def finish(self, failed=False):
        self.finished = not failed


def test_the_runs_wandb_run_gets_the_metrics(finished, tmp_path, monkeypatch):
    run, trackers = shutil.copytree(finished, tmp_path / "run"), []

    def make(*arguments):
        trackers.append(RecordingTracker(*arguments))
        return trackers[-1]

    monkeypatch.setattr(eval_report, "make_tracker", make)
    evaluate(run, NO_BEST_OF_N, "tracking=wandb")  # no wandb id in the checkpoints, for it was not tracked there
    state = run / "checkpoints" / "iteration_000003" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "wandb_id": "abc"}))
    evaluate(run, NO_BEST_OF_N)  # tracking=none, as the run has it
    assert not trackers
    metrics = evaluate(run, NO_BEST_OF_N, "tracking=wandb", "tracking.project=mine")["metrics"]
    (tracker,) = trackers
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert tracker.arguments[:8] == ("wandb", "mine", "auto", run, "run", None, config, "abc")
    assert tracker.summary["evaluate/gain"] == metrics["eval/gain"] and len(tracker.summary) == len(metrics)
    assert tracker.finished
