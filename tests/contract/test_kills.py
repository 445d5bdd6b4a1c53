"""kill -9 in the middle of an iteration and of a save, then resume=auto: the run is as if it had never been killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.checkpoint import load_checkpoint
from tests.forks import fork_silently, kill_at_call

pytestmark = pytest.mark.slow

RUNS = {
    "hindsight": ["algo=hindsight"],
    "ilql": ["algo=ilql", "algo.polyak_every=3", "optimizer.critic_lr=1e-2"],
    "a2po": ["algo=a2po", "plan.init_samples=3"],
    "two_critics": ["algo=two_critics"],
}
COMMON = [
    "iterations=6",
    "evaluation.every=3",
    "checkpoint.every=2",
    "checkpoint.keep_last=3",
    "checkpoint.keep_best=false",
]


@pytest.fixture
def fork_run(train_contract):
    """fork_run(directory, *overrides, before=) → exit status of a run in a fork of this process, silent.

    `before()` is called in the fork. A negative status is the signal that ended it.
    """

    def run(directory: Path, *overrides: str, before=lambda: None) -> int:
        child = fork_silently(lambda: (before(), train_contract(directory, *overrides, "resume=auto")))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run


def list_files(run: Path, folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in (run / folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_bits(
    name, train_contract, fork_run, make_contract_config, logged_data, tmp_path, comparable, records
):
    data = ["dataset.train_prompts=29"] if name == "a2po" else logged_data  # 5 of iteration 4's 8 prompts are new
    overrides = [*RUNS[name], *COMMON, *data]
    whole = train_contract(tmp_path / "whole", *overrides)
    run, algorithm = tmp_path / "run", type(make_contract_config(*overrides).algo)
    # in iteration 4, after process_rollout: the last checkpoint is that of iteration 2
    assert fork_run(run, *overrides, before=lambda: kill_at_call(algorithm, "prepare", 4)) == -signal.SIGKILL
    assert [path.name for path in checkpoints.list_checkpoints(run / "checkpoints")] == ["iteration_000002"]
    # in the save after iteration 4: the pools' files have its rows, the checkpoint is incomplete
    assert fork_run(run, *overrides, before=lambda: kill_at_call(checkpoints, "save_file", 2)) == -signal.SIGKILL
    assert [path.name for path in checkpoints.list_checkpoints(run / "checkpoints")] == ["iteration_000002"]
    state = json.loads((run / "checkpoints" / "iteration_000002" / "state.json").read_text())
    pools = {"hindsight": state["algorithm"].get("hindsight", {}).get("pool"), "a2po": state["kept"]}
    for content in list_files(run, "pools").values():
        assert content.count(b"\n") > pools[name]["length"] > 0
    assert fork_run(run, *overrides) == 0
    assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    assert records(run / "samples.jsonl") == records(whole / "samples.jsonl")
    assert list_files(run, "pools") == list_files(whole, "pools")
    assert bool(list_files(run, "pools")) == (name in ("hindsight", "a2po"))
    tensors, state = load_checkpoint(run / "checkpoints" / "iteration_000006")
    expected_tensors, expected_state = load_checkpoint(whole / "checkpoints" / "iteration_000006")
    assert state == expected_state and tensors.keys() == expected_tensors.keys()
    assert ("targets" in tensors) == (name == "ilql")
    for group, expected in expected_tensors.items():
        assert tensors[group].keys() == expected.keys()
        assert not [key for key, tensor in expected.items() if not torch.equal(tensors[group][key], tensor)]


REWARD = """
import os
import signal
from pathlib import Path

import torch.distributed as dist


def score(prompts, responses):
    score.calls = getattr(score, "calls", 0) + 1
    marker = Path(__file__).with_name("kill")
    if marker.exists() and score.calls == 6 and dist.get_rank() == 1:  # evaluations at 0 and 3, iterations 1 to 4
        marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(map(text.lower().count, "aeiou")) / (len(text) + 1) for text in responses]
"""


@pytest.mark.parametrize("name", ["hindsight", "a2po"])
def test_two_processes_of_which_one_is_killed_resume_to_the_results_of_one(
    name, train_contract, tmp_path, comparable, records
):
    (tmp_path / "reward.py").write_text(REWARD)
    overrides = [*RUNS[name], *COMMON, f"reward.target={tmp_path}/reward.py:score", "iterations=5"]
    one = train_contract(tmp_path / "one", *overrides)
    (tmp_path / "kill").touch()
    two, start = [*overrides, "launch.processes=2", "launch.timeout=60", "resume=auto"], time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train_contract(tmp_path / "two", *two)
    assert stopped.value.code == 128 + signal.SIGKILL and time.monotonic() - start < 120
    assert [row["iteration"] for row in records(tmp_path / "two" / "metrics.jsonl")] == [0, 1, 2, 3]
    train_contract(tmp_path / "two", *two)
    for row, expected in zip(
        comparable(tmp_path / "two" / "metrics.jsonl"), comparable(one / "metrics.jsonl"), strict=True
    ):
        assert row.keys() == expected.keys()
        for metric, value in expected.items():
            absolute = 8e-6 if metric in ("kl/sequence", "eval/kl_exact") else 1e-6
            assert row[metric] == pytest.approx(value, rel=1e-4, abs=absolute), metric
    pools = [list_files(run, "pools") for run in (tmp_path / "two", one)]
    assert pools[0].keys() == pools[1].keys() and pools[0]
    for file, content in pools[0].items():
        rows, expected = ([json.loads(line) for line in text.splitlines()] for text in (content, pools[1][file]))
        for row, like in zip(rows, expected, strict=True):
            assert row.pop("logprobs", []) == pytest.approx(like.pop("logprobs", []), abs=1e-5) and row == like
