"""apa-eval: figures by hand, and whole evaluations of tiny runs that repeat what training saw."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from apa_cli.cli.app import check_subject
from apa_cli.config.build import build
from apa_cli.config.compose import compose, directory_name
from apa_cli.config.from_run import compose_run
from apa_cli.errors import ConfigError, UserError
from apa_cli.inference import eval_report as assessment
from apa_cli.inference.eval_report import FIGURES, best_of_figures, compare, figures, start_evaluation
from apa_cli.kl import best_of_n_bound
from apa_cli.runs.tracking import Tracker
from apa_cli.training.evaluator import Replies

NO_BEST = "evaluation.best_of=[]"


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A run of three iterations, evaluated after each, that learnt enough to differ from its SFT model."""
    words = ["evaluation.every=1", "optimizer.lr=1e-2", "checkpoint.keep_last=9", "algo=ppo", "lambda=0"]
    return train(tmp_path_factory.mktemp("evaluated") / "finished", *words)


@pytest.fixture(scope="module")
def report(finished):
    return evaluate(finished, "evaluation.best_of=[1,2,4]", "evaluation.best_of_prompts=4")


def evaluate(run, *words, file="eval.json"):
    """What apa-eval run=… writes."""
    directory = run.parent.parent if run.parent.name == "checkpoints" else run
    target = yaml.safe_load((directory / "config.yaml").read_text())["reward"]["target"]
    start_evaluation(build(compose_run([f"run={run}", f"reward.target={target}", *words])), None)
    return json.loads((directory / file).read_text())


def evaluations(run) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key.startswith("eval/")} for row in rows]


# --- by hand ------------------------------------------------------------------------------------------------


def test_gain_and_win_rate_are_of_pairs():
    found = compare([1.0, 2.0, 3.0, 5.0], [1.0, 1.0, 4.0, 1.0])
    # Differences 0, 1, −1, 4: mean 1, squares about it 1 + 0 + 4 + 9 = 14, deviation √(14/3), over √4.
    assert found["gain"] == 1
    assert found["gain_ci"] == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    # A tie, two won, one lost: ½ + 1 + 0 + 1 of 4; squares about 0.625: 0.015625 + 2 · 0.140625 + 0.390625 = 0.6875.
    assert found["win_rate_sft"] == 0.625
    assert found["win_rate_sft_ci"] == pytest.approx(1.96 * math.sqrt(0.6875 / 3) / 2)
    # 1, 1, 4, 1: mean 1.75, squares about it 3 · 0.5625 + 5.0625 = 6.75.
    assert found["reward_mean_sft"] == 1.75
    assert found["reward_ci_sft"] == pytest.approx(1.96 * math.sqrt(6.75 / 3) / 2)


def test_best_of_n_is_the_best_of_the_first_n():
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 9.0]])
    found = best_of_figures(scores, [1, 2, 3], [6.0, 8.0, 100.0])  # the third prompt had no n replies
    means = [found[f"eval/best_of_{n}/reward_mean"] for n in (1, 2, 3)]
    assert means == [2.5, 4.5, 7.0]  # 1 and 4; 5 and 4; 5 and 9
    # 5 and 9: deviation √8, over √2 is 2.
    assert found["eval/best_of_3/reward_ci"] == pytest.approx(1.96 * 2)
    # 6 − 5 and 8 − 9: mean 0, deviation √2, over √2 is 1. And 6 − 5, 8 − 4: mean 2.5.
    assert found["eval/best_of_3/gain"] == 0 and found["eval/best_of_3/gain_ci"] == pytest.approx(1.96)
    assert found["eval/best_of_2/gain"] == 2.5
    assert found["eval/best_of_3/kl_bound"] == pytest.approx(1.0986123 - 2 / 3)


def test_best_of_n_stays_within_its_bound():
    assert best_of_n_bound(1) == 0
    # Two equally likely replies: the better one of two draws is the better reply with probability ¾.
    coin = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    # Of m equally likely replies the best of n is number k with probability (k/m)^n − ((k−1)/m)^n.
    m, n = 1000, 4
    shares = [(k / m) ** n - ((k - 1) / m) ** n for k in range(1, m + 1)]
    many = sum(p * math.log(p * m) for p in shares)
    assert coin < best_of_n_bound(2)
    assert many < best_of_n_bound(4) < many + 0.01  # the bound is what many replies come near to


def test_what_describes_one_models_replies():
    rollout = SimpleNamespace(
        response_ids=torch.tensor([[1, 2, 1, 2], [1, 2, 3, 9], [4, 9, 9, 9]]),
        mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool(),
        responses=["a", "b", "c"],
        endings=["length", "stop", "stop"],
    )
    entropy = torch.tensor([[1.0, 1, 1, 1], [1, 1, 3, 0], [2, 0, 0, 0]])
    evaluator = SimpleNamespace(describe=lambda sources, responses: {"own": len(responses)}, sources=["p"] * 3)
    found = figures(evaluator, Replies(rollout, {"": [0.0] * 3}, torch.zeros(3, 4), entropy))
    assert found == {
        "entropy": pytest.approx(11 / 8),
        "distinct_1": 4 / 8,  # 1, 2, 3, 4 of eight tokens
        "distinct_2": 3 / 5,  # 12, 21, 23 of 12, 21, 12, 12, 23
        "distinct_3": 1.0,  # 121, 212, 123
        "length": pytest.approx(8 / 3),
        "eos_rate": 0,
        "stop_rate": 2 / 3,
        "truncated_rate": 1 / 3,
        "own": 3,
    }
    assert set(found) == {*FIGURES, "own"}


# --- whole evaluations --------------------------------------------------------------------------------------


def test_it_repeats_the_runs_own_last_evaluation(finished, report):
    first, *_, last = evaluations(finished)
    assert {key: report["metrics"][key] for key in last} == last
    assert report["iteration"] == 3 and report["prompts"] == 6 and report["eval_seed"] == 1234
    assert last["eval/kl_exact"] > 0.1  # there is something to measure
    assert report["metrics"]["eval/reward_ci_sft"] == first["eval/reward_ci"]
    for name in ("entropy", "distinct_2", "length", "eos_rate"):
        assert report["metrics"][f"eval/{name}_sft"] == first[f"eval/{name}"]
    gain = last["eval/reward_mean"] - last["eval/reward_mean_sft"]
    assert report["metrics"]["eval/gain"] == pytest.approx(gain, abs=1e-6)


def test_every_reply_is_kept_with_its_scores(finished, report, records):
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
    found = evaluate(checkpoint, NO_BEST, file="eval_iteration_000002.json")
    expected = evaluations(finished)[2]
    assert {key: found["metrics"][key] for key in expected} == expected
    assert found["iteration"] == 2


def test_a_lora_checkpoint_repeats_its_evaluation_and_the_merged_model_nearly(run_train):
    run = run_train(
        "lora=default", "lora.rank=4", "critic=adapter", "optimizer.lr=2e-2", "iterations=2", "evaluation.every=1"
    )
    expected = evaluations(run)[2]
    assert expected["eval/kl_exact"] > 0.01
    found = evaluate(run / "checkpoints" / "iteration_000002", NO_BEST, file="eval_iteration_000002.json")
    assert {key: found["metrics"][key] for key in expected} == expected
    # What is merged is rounded otherwise: 12 tokens of a reply, 1e-5 nats each.
    merged = evaluate(run, NO_BEST)
    assert merged["metrics"]["eval/kl_exact"] == pytest.approx(expected["eval/kl_exact"], abs=1.2e-4)


def test_words_go_on_top_of_the_runs_settings(finished, tmp_path, capsys):
    (tmp_path / "length.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    further = f"evaluation.rewards=[{{use: function, target: '{tmp_path}/length.py:length', name: size}}]"
    found = evaluate(finished, "evaluation.prompts=3", further, "evaluation.print_samples=1", NO_BEST)
    own = json.loads((finished / "samples.jsonl").read_text().splitlines()[-6])
    assert found["prompts"] == len(found["replies"]) == 3
    assert found["replies"][0]["policy"]["response"] == own["response"]
    sizes = [len(row["policy"]["response"]) for row in found["replies"]]
    theirs = [len(row["sft"]["response"]) for row in found["replies"]]
    assert found["metrics"]["eval/reward_mean/size"] == pytest.approx(sum(sizes) / 3)
    assert found["metrics"]["eval/gain/size"] == pytest.approx((sum(sizes) - sum(theirs)) / 3)
    assert [row["policy"]["score/size"] for row in found["replies"]] == sizes
    shown = capsys.readouterr().out
    assert "score (size)" in shown and shown.count("SFT model   |") == 1 and "Best of n" not in shown


def test_a_model_by_itself_and_beside_another(finished, tiny, configured, tmp_path, run_train):
    run = run_train("iterations=0")
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="has no model/"):
        evaluate(run, NO_BEST)
    words = [f"model.path={finished}/model", NO_BEST, "name=plain"]
    start_evaluation(configured(*words), tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "eval.json").read_text())
    last = evaluations(finished)[-1]
    assert alone["metrics"]["eval/reward_mean"] == last["eval/reward_mean"]
    assert alone["metrics"]["eval/kl_exact"] == 0 and alone["iteration"] is None
    assert not [key for key in alone["metrics"] if "sft" in key] and "sft" not in alone["replies"][0]
    start_evaluation(configured(*words, f"evaluation.reference={tiny}"), tmp_path / "beside")
    beside = json.loads((tmp_path / "beside" / "eval.json").read_text())
    assert {key: beside["metrics"][key] for key in last} == last
    assert yaml.safe_load((tmp_path / "beside" / "config.yaml").read_text())["evaluate"]["reference"] == str(tiny)
    with pytest.raises(UserError, match="holds a run already"):
        start_evaluation(configured(*words), tmp_path / "alone")


def test_another_model_in_the_runs_place_is_noticed(finished, tmp_path):
    """The policy is read from model/, not taken from a checkpoint or the SFT model."""
    copied = shutil.copytree(finished, tmp_path / "copied")
    file = copied / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["gpt_neox.final_layer_norm.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    metrics = evaluate(copied, NO_BEST)["metrics"]
    assert metrics["eval/kl_exact"] != evaluations(finished)[-1]["eval/kl_exact"]
    assert metrics["eval/reward_ci_sft"] == evaluations(finished)[0]["eval/reward_ci"]


class Recorder(Tracker):
    """A tracker that remembers how it was made and what it was told."""

    def __init__(self, *made):
        self.made, self.told, self.ended = made, {}, False

    def summarize(self, figures):
        self.told = figures

    def finish(self, failed=False):
        self.ended = not failed


def test_the_runs_wandb_run_gets_the_figures(finished, tmp_path, monkeypatch):
    run, made = shutil.copytree(finished, tmp_path / "run"), []

    def make(*arguments):
        made.append(Recorder(*arguments))
        return made[-1]

    monkeypatch.setattr(assessment, "make_tracker", make)
    evaluate(run, NO_BEST, "tracking=wandb")  # the run was not recorded there: its checkpoints hold no id
    state = run / "checkpoints" / "iteration_000003" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "wandb_id": "abc"}))
    evaluate(run, NO_BEST)  # its configuration says none
    assert not made
    metrics = evaluate(run, NO_BEST, "tracking=wandb", "tracking.project=mine")["metrics"]
    (tracker,) = made
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert tracker.made[:7] == ("wandb", "mine", "auto", run, "run", None, config) and tracker.made[7] == "abc"
    assert tracker.told["evaluate/gain"] == metrics["eval/gain"] and len(tracker.told) == len(metrics)
    assert tracker.ended


# --- the words ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """recorded(*words) → the directory of a run that has just begun, of the configuration that these words give."""

    def make(*words: str, name: str = "run", **environment):
        directory = tmp_path_factory.mktemp("recorded") / name
        directory.mkdir()
        (directory / "config.yaml").write_text(yaml.safe_dump(build(compose(list(words))).raw))
        (directory / "environment.json").write_text(json.dumps(environment))
        (directory / "metrics.jsonl").touch()
        return directory

    return make


def test_the_settings_are_the_runs_and_what_its_stages_made(recorded):
    run = recorded("algo=ppo", "lambda=0.3", "seed=5", policy="made/sft", reward="made/reward")
    config = build(compose_run([f"run={run}", "evaluation.seed=6", "evaluation.prompts=7"]))
    assert (config.run.seed, config.evaluation.seed, config.evaluation.prompts) == (5, 6, 7)
    assert type(config.algo).__name__ == "PPO" and config.algo.kl_coef == 0.3
    assert (config.model.path, config.reward.path, config.run.run) == ("made/sft", "made/reward", str(run))
    given = recorded("model=local", "model.path=mine", "reward.path=my_reward", name="given", policy="x", reward="y")
    config = build(compose_run([f"run={given}"]))
    assert (config.model.path, config.reward.path) == ("mine", "my_reward")


def test_groups_replace_sections_and_keys_change_them(recorded):
    run = recorded("reward=function", "reward.target=a.py:f", "sampling.max_new_tokens=9", policy="x", reward=None)
    words = ["reward.target=b.py:g", "sampling.temperature=0.5"]
    config = build(compose_run([f"run={run}", *words]))
    assert (config.reward.target, config.sampling.temperature, config.sampling.max_new_tokens) == ("b.py:g", 0.5, 9)
    config = build(compose_run([f"run={run}", "dataset.data_seed=3", "dataset=story_openings", "reward=vader"]))
    assert config.dataset.data_seed == 3 and type(config.dataset).__name__ == "StoryOpenings"
    assert config.sampling.stop_strings == [] and config.reward.target.endswith("vader:compound")
    own = recorded("sampling.stop_strings=[x]", name="own", policy="x", reward="y")
    assert build(compose_run([f"run={own}", "dataset=story_openings"])).sampling.stop_strings == ["x"]


def test_a_run_of_an_earlier_version_lacks_keys(recorded):
    run = recorded(policy="x", reward="y")
    raw = yaml.safe_load((run / "config.yaml").read_text())
    del raw["evaluate"], raw["run"], raw["evaluation"]["rewards"]
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    config = build(compose_run([f"run={run}"]))
    assert config.evaluation.best_of and config.evaluation.rewards == []


@pytest.fixture(scope="module")
def begun(recorded):
    return recorded(policy="x", reward="y")


def command(name, *words, cwd):
    code = f"import sys; from apa_cli.{name} import main; sys.argv[0] = 'apa-eval'; main()"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_folder_of_a_job_of_a_sweep_and_no_heavy_package(recorded, tmp_path):
    name = directory_name("algo=apa,lambda=0.1")
    run = recorded("seed=8", name=name, policy="x", reward="y")
    heavy = "{'torch', 'transformers', 'wandb', 'matplotlib', 'datasets', 'accelerate'}"
    code = (
        "import sys; from apa_cli.cli.evaluate import main; import apa_cli.cli.export, apa_cli.cli.chat\n"
        f"sys.argv = ['apa-eval', 'run={run}', '--cfg', 'job']; main()\n"
        f"print('loaded:', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    shown, _, loaded = done.stdout.partition("loaded:")
    assert loaded.strip() == "[]"
    assert yaml.safe_load(shown)["run"] == str(run) and yaml.safe_load(shown)["seed"] == 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["run=nowhere"], ["nowhere", "no run of apa-train"]),
        (["run={run}", "lr=1"], ["'lr'", "optimizer.lr'"]),
        (["run={run}", "evaluate.best_off=[2]"], ["evaluate.best_off", "evaluation.best_of'"]),
        (["run={run}", "+evaluate.bestof=[2]"], ["evaluate.bestof", "evaluation.best_of'"]),
        (["run={run}", "evaluation.best_of=[0]"], ["evaluation.best_of", "at least 1"]),
        (["run={run}", "evaluation.prompts=0"], ["evaluation.prompts", "at least 1"]),
        (["run={run}", "evaluation.prompts=1,2"], ["evaluation.prompts", "-m"]),
        (["run={run}", "reward=vadr"], ["reward", "'vader'"]),
        (["run={run}", "seed=[1"], ["seed=[1"]),
        (["run={run}", "~seed"], ["seed"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_words_are_one_line(words, parts, begun):
    with pytest.raises(ConfigError) as caught:
        build(compose_run([word.format(run=begun) for word in words], scores=lambda cfg: False))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts)


def test_what_is_no_run_of_apa_train(recorded):
    stage = recorded(name="stage")  # apa-sft's environment.json names no policy
    with pytest.raises(ConfigError, match=r"give model.path=.*stage/model"):
        compose_run([f"run={stage}"])
    (stage / "config.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        compose_run([f"run={stage}"])


def test_each_command_says_what_it_takes(tmp_path):
    bare, of_model, of_run = (build(compose(words)) for words in ([], ["model.path=x"], ["run=y"]))
    check_subject(bare, ())
    check_subject(of_model, ("run", "model.path"))
    check_subject(of_run, ("run",))
    for config, takes, words in [
        (of_run, (), "resume="),
        (bare, ("run", "model.path"), "run=… or model.path=…"),
        (of_model, ("run",), "give run=…"),
    ]:
        with pytest.raises(ConfigError, match=words):
            check_subject(config, takes)
    done = command("train", "run=nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
