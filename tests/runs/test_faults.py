"""Faults during a run: the run ends in one line that names the fault, and its state is saved."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from apa_cli.errors import UserError
from apa_cli.runs.checkpoint import load_checkpoint

REWARD = '''\
"""Share of vowels; the file `fault` names a call, counted from 1, and how it fails."""
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
def make_reward(tmp_path):
    """make_reward(call, kind) → override of a reward of which one call fails; make_reward() → of one that works."""
    (tmp_path / "reward.py").write_text(REWARD)

    def make(call: int | None = None, kind: str = "raise") -> str:
        (tmp_path / "fault").write_text(json.dumps([call, kind]))
        return f"reward.target={tmp_path}/reward.py:vowels"

    return make


def run_to_error(run_train, *overrides, **options) -> str:
    """Return the message, of one line, with which a run ends."""
    with pytest.raises(UserError) as caught:
        run_train(*overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a reward that fails ------------------------------------------------------------------------------------

# Calls: 1 evaluates the SFT model, 2 and 3 score iterations 1 and 2, 4 evaluates iteration 2, 5 and 6 score 3 and 4, …
OVERRIDES = ["iterations=4", "evaluation.every=2", "checkpoint.every=0", "optimizer.lr=1e-3"]


@pytest.fixture(scope="module")
def faultless(train, tmp_path_factory):
    """Directory of a run without a fault."""
    folder = tmp_path_factory.mktemp("faultless")
    (folder / "reward.py").write_text(REWARD)
    return train(folder / "faultless", *OVERRIDES, f"reward.target={folder}/reward.py:vowels")


@pytest.mark.parametrize(
    ("call", "saved"),
    [*(pytest.param(*each, marks=pytest.mark.slow) for each in [(2, 0), (3, 1), (4, 2), (5, 2)]), (7, 4)],
)
def test_run_resumed_after_a_failed_reward_equals_one_without_the_fault(
    call, saved, make_reward, run_train, faultless, comparable, tmp_path
):
    error = run_to_error(run_train, *OVERRIDES, make_reward(call))
    assert "raised KeyError: 'no such word' (reward.py, line " in error
    assert f"the state after iteration {saved} is saved; continue with resume={tmp_path}/run reward.target=" in error
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [f"iteration_{saved:06d}"]
    run = run_train(*OVERRIDES, make_reward(), f"resume={tmp_path}/run")
    assert comparable(run / "metrics.jsonl") == comparable(faultless / "metrics.jsonl")
    assert (run / "samples.jsonl").read_text() == (faultless / "samples.jsonl").read_text()
    expected, got = (load_checkpoint(path / "checkpoints" / "iteration_000004")[0] for path in (faultless, run))
    for file, tensors in expected.items():
        assert all(torch.equal(tensor, got[file][name]) for name, tensor in tensors.items()), file


def test_reward_that_fails_before_training_leaves_its_traceback_and_frees_the_name(make_reward, run_train, tmp_path):
    error = run_to_error(run_train, make_reward(1))
    assert "is saved" not in error
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["run.log"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"ended by UserError: {error}" in log
    assert "Traceback" in log and 'raise KeyError("no such word")' in log
    assert (run_train("iterations=0", make_reward()) / "result.json").is_file()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hang", "has not returned within 1 s; raise the limit"),
        ("nan", "expected finite scores, got nan for response 0"),
        ("few", "got 7 for 8 responses"),
    ],
)
def test_state_is_saved_for_every_kind_of_faulty_scores(kind, message, make_reward, run_train, tmp_path):
    error = run_to_error(run_train, *OVERRIDES, make_reward(3, kind), "reward.timeout=1")
    assert message in error and "the state after iteration 1 is saved" in error
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_000001")[1]["iteration"] == 1


# --- numbers that are not finite ----------------------------------------------------------------------------

HUGE = ["iterations=3", "evaluation.every=0", "checkpoint.every=1", "algo.score_scaling=none"]
HUGE += ["optimizer.lr=1e-3", "checkpoint.keep_last=9"]
# Calls: 1 evaluates, 2 to 4 score iterations 1 to 3. 4e18 over λ = 0.1, squared, is more than float32 holds.


def test_nonfinite_gradient_stops_the_run_and_dumps_the_batch(make_reward, run_train, tmp_path):
    error = run_to_error(run_train, *HUGE, make_reward(3, "huge"))
    run = tmp_path / "run"
    (file,) = (run / "faults").glob("*.json")
    assert error.startswith(f"iteration 2, update {file.stem[-1]}: loss/policy is inf, ")
    assert "optimizer/grad_norm is " in error and "; nothing was changed by this update; " in error
    assert error.endswith(f"; the responses are in {file}")
    dump = json.loads(file.read_text())
    assert dump["what"] in error and len(dump["responses"]) == 4  # one minibatch
    (worst,) = [response for response in dump["responses"] if response["row"] == 0]
    assert worst["score"] == pytest.approx(4e18) and worst["prompt"] and worst.keys() >= {"response", "ending"}
    tensors = load_file(file.with_suffix(".safetensors"))
    place = [response["row"] for response in dump["responses"]].index(0)
    assert float(tensors["rollout.scores"][place]) == pytest.approx(4e18)
    assert tensors["batch.advantages"].shape == tensors["rollout.mask"].shape == tensors["batch.values.value"].shape
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["iteration_000001"]


def test_nonfinite_updates_can_be_skipped_and_are_counted(make_reward, run_train, records):
    run = run_train(*HUGE, make_reward(3, "huge"), "guard.nonfinite=skip", "update_epochs=2")
    _, *rows = records(run / "metrics.jsonl")
    # Response 0 is in one of the two minibatches of each of the two passes.
    assert [row["guard/skipped_updates"] for row in rows] == [0, 2, 0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["loss/policy"] < 1e6  # the mean over the two updates that were made
    error = [line for line in (run / "run.log").read_text().splitlines() if "guard.nonfinite=skip" in line]
    assert len(error) == 2 and all("iteration 2, update " in line for line in error)
    assert len(list((run / "faults").glob("*.safetensors"))) == 2
    tensors, _ = load_checkpoint(run / "checkpoints" / "iteration_000003")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors["policy"].values())


def test_all_updates_of_an_iteration_may_be_skipped(make_reward, run_train, records):
    run = run_train(
        *HUGE,
        make_reward(3, "huge"),
        "guard.nonfinite=skip",
        "minibatch_size=8",
        "microbatch_size=8",
        "update_epochs=1",
    )
    rows = records(run / "metrics.jsonl")
    assert rows[2]["guard/skipped_updates"] == 1 and "loss/policy" not in rows[2]
    before, after = (load_checkpoint(run / "checkpoints" / f"iteration_00000{n}")[0]["policy"] for n in (1, 2))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_skipped_updates_are_not_logged_by_default(run_train, records):
    assert "guard/skipped_updates" not in records(run_train("iterations=1") / "metrics.jsonl")[-1]


def test_advantages_beyond_float32_are_named(make_reward, run_train, tmp_path):
    overrides = ["algo.advantage_estimator=group_mean", "samples_per_prompt=2", "algo.score_scaling=none"]
    error = run_to_error(run_train, *overrides, make_reward(2, "opposite"), "guard.nonfinite=skip")
    # 3e38 minus the other sample's −3e38
    assert error.startswith("iteration 1: advantages is inf at token 0 of response 0; nothing was changed")
    assert len(json.loads((tmp_path / "run" / "faults" / "iteration_000001.json").read_text())["responses"]) == 8


@pytest.mark.parametrize(("part", "name"), [("policy", "logprobs.sampler"), ("critics", "values.value")])
def test_nonfinite_weights_are_detected_in_their_output(part, name, make_trainer, tmp_path):
    trainer = make_trainer(folder=tmp_path)
    with torch.no_grad():
        list(getattr(trainer.models, part).parameters())[-1].fill_(math.nan)
    with pytest.raises(UserError, match=rf"^iteration 1: {name} is nan at token 0 of response 0; nothing was changed"):
        trainer.run_iteration(1)
    assert (tmp_path / "faults" / "iteration_000001.safetensors").is_file()


def test_nonfinite_initial_model_is_detected_before_training(run_train, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "broken")
    tensors = load_file(tiny / "model.safetensors")
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"][3, 3] = math.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    error = run_to_error(run_train, f"model.path={tmp_path}/broken")
    assert error == "model.path: the logits of this gpt_neox model are not finite; its weights may be damaged"
    assert not (tmp_path / "run").exists()


def test_a_nonfinite_metric_of_an_evaluation_ends_the_run(make_trainer, tmp_path):
    trainer = make_trainer(folder=tmp_path)
    with torch.no_grad():
        list(trainer.models.policy.parameters())[-1].fill_(math.nan)
    with pytest.raises(UserError, match=r"^evaluation after iteration 0: eval/kl_exact is nan"):
        trainer.evaluate()


def test_number_of_dumped_batches_is_limited(tmp_path, make_trainer, monkeypatch):
    from apa_cli.training import fault_dump

    monkeypatch.setattr(fault_dump, "MAX_DUMPS", 2)
    trainer = make_trainer()
    rollout = trainer.rollout_builder.sample(1, {})[0].rollout
    files = [
        fault_dump.write_dump(tmp_path / "faults", f"n{n}", "what", rollout, None, torch.arange(2)) for n in range(4)
    ]
    assert [file and file.name for file in files] == ["n0.json", "n1.json", None, None]
    assert len(list((tmp_path / "faults").iterdir())) == 4
