"""Faults that are really caused: each ends in one line that says what and where, and nothing is lost."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from apa_cli.errors import UserError
from apa_cli.runs.checkpoint import load
from apa_cli.runs.console import Console
from apa_cli.training.build import build_trainer

REWARD = '''\
"""The share of vowels; call number N, counted from 1, is spoilt as the file `fault` says, one of N, kind."""
import json
import time
from pathlib import Path

calls = 0


def vowels(prompts, responses):
    global calls
    calls += 1
    scores = [sum(map(text.lower().count, "aeiou")) / (len(text) + 1) for text in responses]
    file = Path(__file__).with_name("fault")
    number, kind = json.loads(file.read_text()) if file.exists() else (0, "")
    if calls != number:
        return scores
    if kind == "raise":
        raise KeyError("no such word")
    if kind == "hang":
        time.sleep(5)
    if kind == "nan":
        return [float("nan")] * len(responses)
    if kind == "huge":
        return [4e18, *scores[1:]]
    if kind == "opposite":
        return [3e38 * (-1) ** place for place, _ in enumerate(responses)]
    return scores[1:]
'''


@pytest.fixture
def faulty(tmp_path):
    """faulty(call, kind) → the word of a reward of which one call is spoilt; faulty() takes the fault away."""
    (tmp_path / "reward.py").write_text(REWARD)

    def make(call: int | None = None, kind: str = "raise") -> str:
        (tmp_path / "fault").write_text(json.dumps([call, kind]))
        return f"reward.target={tmp_path}/reward.py:vowels"

    return make


def ended(run_train, *words, **options) -> str:
    """What the user is told when the run ends in an error."""
    with pytest.raises(UserError) as caught:
        run_train(*words, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a reward that fails --------------------------------------------------------------------------------------

# Calls: 1 evaluates the SFT model, 2 and 3 score iterations 1 and 2, 4 evaluates iteration 2, 5 and 6 score 3 and 4, …
WORDS = ["iterations=4", "evaluation.every=2", "checkpoint.every=0", "optimizer.lr=1e-3"]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "reward.py").write_text(REWARD)
    return train(folder / "whole", *WORDS, f"reward.target={folder}/reward.py:vowels")


@pytest.mark.parametrize(
    ("call", "saved"),
    [(2, 0), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(3, 1), (4, 2), (5, 2)]), (7, 4)],
)
def test_a_run_whose_reward_failed_goes_on_as_if_it_had_not(
    call, saved, faulty, run_train, whole, comparable, tmp_path
):
    said = ended(run_train, *WORDS, faulty(call))
    assert "raised KeyError: 'no such word' (reward.py, line " in said
    assert f"the state after iteration {saved} is saved; go on with resume={tmp_path}/run reward.target=" in said
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [f"iteration_{saved:06d}"]
    run = run_train(*WORDS, faulty(), f"resume={tmp_path}/run")
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    expected, got = (load(path / "checkpoints" / "iteration_000004")[0] for path in (whole, run))
    for file, tensors in expected.items():
        assert all(torch.equal(tensor, got[file][name]) for name, tensor in tensors.items()), file


def test_a_reward_that_fails_before_anything_was_done_leaves_nothing(faulty, run_train, tmp_path):
    assert "is saved" not in ended(run_train, faulty(1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hang", "has not returned within 1 s (reward.timeout)"),
        ("nan", "the score of response 0 is nan"),
        ("few", "8 responses were given, 7 scores came back"),
    ],
)
def test_the_state_is_saved_whatever_is_wrong_with_the_scores(kind, message, faulty, run_train, tmp_path):
    said = ended(run_train, *WORDS, faulty(3, kind), "reward.timeout=1")
    assert message in said and "the state after iteration 1 is saved" in said
    assert load(tmp_path / "run" / "checkpoints" / "iteration_000001")[1]["iteration"] == 1


# --- numbers that are not finite ------------------------------------------------------------------------------

HUGE = ["iterations=3", "evaluation.every=0", "checkpoint.every=1", "algo.score_scaling=none"]
HUGE += ["optimizer.lr=1e-3", "checkpoint.keep_last=9"]
# Calls: 1 evaluates, 2 to 4 score iterations 1 to 3. 4e18 over λ = 0.1, squared, is more than float32 holds.


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_batch(faulty, run_train, tmp_path):
    said = ended(run_train, *HUGE, faulty(3, "huge"))
    run = tmp_path / "run"
    (file,) = (run / "faults").glob("*.json")
    assert said.startswith(f"iteration 2, update {file.stem[-1]}: loss/policy is inf, ")
    assert "optimizer/grad_norm is " in said and "; nothing was changed by this update; " in said
    assert said.endswith(f"; the responses are in {file}")
    kept = json.loads(file.read_text())
    assert kept["what"] in said and len(kept["responses"]) == 4  # one minibatch
    (worst,) = [response for response in kept["responses"] if response["row"] == 0]
    assert worst["score"] == pytest.approx(4e18) and worst["prompt"] and worst.keys() >= {"response", "ending"}
    tensors = load_file(file.with_suffix(".safetensors"))
    place = [response["row"] for response in kept["responses"]].index(0)
    assert float(tensors["rollout.scores"][place]) == pytest.approx(4e18)
    assert tensors["batch.advantages"].shape == tensors["rollout.mask"].shape == tensors["batch.values.value"].shape
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["iteration_000001"]


def test_such_updates_can_be_left_out_and_are_counted(faulty, run_train, records):
    run = run_train(*HUGE, faulty(3, "huge"), "guard.nonfinite=skip", "update_epochs=2")
    _, *rows = records(run / "metrics.jsonl")
    # Response 0 is in one of the two minibatches of each of the two passes.
    assert [row["guard/skipped_updates"] for row in rows] == [0, 2, 0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["loss/policy"] < 1e6  # a mean over the two that were made
    said = [line for line in (run / "run.log").read_text().splitlines() if "guard.nonfinite=skip" in line]
    assert len(said) == 2 and all("iteration 2, update " in line for line in said)
    assert len(list((run / "faults").glob("*.safetensors"))) == 2
    tensors, _ = load(run / "checkpoints" / "iteration_000003")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors["policy"].values())


def test_an_iteration_may_lose_all_its_updates(faulty, run_train, records):
    run = run_train(
        *HUGE, faulty(3, "huge"), "guard.nonfinite=skip", "minibatch_size=8", "microbatch_size=8", "update_epochs=1"
    )
    rows = records(run / "metrics.jsonl")
    assert rows[2]["guard/skipped_updates"] == 1 and "loss/policy" not in rows[2]
    before, after = (load(run / "checkpoints" / f"iteration_00000{n}")[0]["policy"] for n in (1, 2))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_without_the_option_nothing_is_counted(run_train, records):
    assert "guard/skipped_updates" not in records(run_train("iterations=1") / "metrics.jsonl")[-1]


def test_advantages_beyond_float32_are_named(faulty, run_train, tmp_path):
    words = ["algo.advantage_estimator=group_mean", "samples_per_prompt=2", "algo.score_scaling=none"]
    said = ended(run_train, *words, faulty(2, "opposite"), "guard.nonfinite=skip")
    # 3e38 less the other sample's −3e38
    assert said.startswith("iteration 1: advantages is inf at token 0 of response 0; nothing was changed")
    assert len(json.loads((tmp_path / "run" / "faults" / "iteration_000001.json").read_text())["responses"]) == 8


@pytest.mark.parametrize(("part", "name"), [("policy", "sampler_logprobs"), ("critics", "values.value")])
def test_weights_that_are_not_finite_are_found_in_what_they_compute(part, name, configured, tmp_path):
    with Console(None, 1, quiet=True) as console:
        trainer = build_trainer(configured(), tmp_path, None, None, console)
    trainer.progress.algorithm = trainer.config.algo.initial_state()
    with torch.no_grad():
        list(getattr(trainer.model, part).parameters())[-1].fill_(math.nan)
    with pytest.raises(UserError, match=rf"^iteration 1: {name} is nan at token 0 of response 0; nothing was changed"):
        trainer.iterate(1)
    assert (tmp_path / "faults" / "iteration_000001.safetensors").is_file()


def test_a_model_that_is_not_finite_to_begin_with_is_found_before_training(run_train, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "broken")
    tensors = load_file(tiny / "model.safetensors")
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"][3, 3] = math.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    said = ended(run_train, f"model.path={tmp_path}/broken")
    assert said.startswith("evaluation after iteration 0: eval/kl_exact is nan")
    assert not (tmp_path / "run").exists()


def test_no_more_than_a_few_batches_are_kept(tmp_path, configured, monkeypatch):
    from apa_cli.training import fault_dump as faults

    monkeypatch.setattr(faults, "MOST_KEPT", 2)
    with Console(None, 1, quiet=True) as console:
        trainer = build_trainer(configured(), tmp_path, None, None, console)
    rollout, _ = trainer.sample(1)
    files = [faults.keep(tmp_path / "faults", f"n{n}", "what", rollout, None, torch.arange(2)) for n in range(4)]
    assert [file and file.name for file in files] == ["n0.json", "n1.json", None, None]
    assert len(list((tmp_path / "faults").iterdir())) == 4
