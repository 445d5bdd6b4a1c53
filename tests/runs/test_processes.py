"""Whole runs in several processes: their results are those of one process, and the end of one process ends all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from apa_cli.errors import ConfigError, UserError

OVERRIDES = ["iterations=2", "evaluation.every=1", "evaluation.prompts=5", "checkpoint.every=1", "optimizer.lr=1e-3"]
"""Five held-out prompts do not divide by two processes: each gets three, one prompt twice."""


@pytest.fixture(scope="module")
def single_process_run(train, tmp_path_factory):
    """single_process_run(*overrides) → the directory of this run in one process, trained once per set of overrides."""
    directories = {}

    def run(*overrides: str) -> Path:
        if overrides not in directories:
            directory = tmp_path_factory.mktemp("single_process") / "run"
            directories[overrides] = train(directory, *OVERRIDES, *overrides)
        return directories[overrides]

    return run


@pytest.fixture(scope="module")
def assert_equal_runs(comparable, records):
    """assert_equal_runs(run, other): equal texts, and metrics equal to 1e-4 relative or 1e-6 absolute.

    The metrics include the evaluation after the last update. Weights are not compared: AdamW makes full steps of
    gradients that are pure rounding, such as a key bias's. With `ties=False` win rates are not compared: a reward model
    scores equal replies with different rounding in batches of different sizes, which breaks ties.
    """

    def check(run: Path, other: Path, ties: bool = True) -> None:
        for row, expected in zip(comparable(run / "metrics.jsonl"), comparable(other / "metrics.jsonl"), strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                if not ties and name == "eval/win_rate_sft":
                    continue
                # KL per response: a sum of up to 12 differences, each rounded.
                absolute = 8e-6 if name in ("kl/sequence", "kl/refreshed", "eval/kl_exact") else 1e-6
                assert row[name] == pytest.approx(value, rel=1e-4, abs=absolute), name
        texts = [
            [(row["iteration"], row["prompt"], row["response"], row["ending"]) for row in records(r / "samples.jsonl")]
            for r in (run, other)
        ]
        assert texts[0] == texts[1] and texts[0]

    return check


# --- the same results in any number of processes ------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["launch.strategy=ddp"], marks=pytest.mark.slow),
        pytest.param(["launch.strategy=fsdp"], marks=pytest.mark.slow),
        pytest.param(["algo=ppo", "launch.strategy=fsdp", "launch.frozen_placement=offloaded"], marks=pytest.mark.slow),
        pytest.param(
            ["reference.refresh_every=1", "launch.strategy=fsdp", "launch.frozen_placement=sharded"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["lora=default", "critic=adapter", "model.gradient_checkpointing=true"], marks=pytest.mark.slow),
        pytest.param(["algo=awr", "critic=head", "microbatch_size=1", "samples_per_prompt=2"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "ppo-fsdp-offloaded", "refreshed-fsdp-sharded", "lora-ddp", "awr-head"],
)  # fmt: skip
def test_two_processes_give_the_results_of_one(overrides, single_process_run, run_train, assert_equal_runs):
    run = run_train(*OVERRIDES, *overrides, "launch.processes=2")
    expected = single_process_run(*(override for override in overrides if not override.startswith("launch.")))
    assert_equal_runs(run, expected)
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert (run / "logs" / "rank_1.log").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_resumes_in_one_and_vice_versa(
    strategy, single_process_run, run_train, assert_equal_runs
):
    two_processes = [f"launch.strategy={strategy}", "launch.processes=2"]
    for name, before, after in (("two_one", two_processes, []), ("one_two", [], two_processes)):
        run = run_train(*OVERRIDES, *before, "iterations=1", name=name)
        run_train(*OVERRIDES, *after, f"name={name}", f"resume={run}", name=name)
        assert_equal_runs(run, single_process_run())


@pytest.mark.slow
def test_a_sharded_reference_answers_other_held_out_prompts_after_a_resume(run_train, assert_equal_runs):
    sharded = ["launch.strategy=fsdp", "launch.frozen_placement=sharded", "launch.processes=2"]
    for name, overrides in (("one", []), ("two", sharded)):
        run = run_train(*OVERRIDES, *overrides, "iterations=1", name=name)
        run_train(*OVERRIDES, *overrides, "evaluation.prompts=4", f"name={name}", f"resume={run}", name=name)
    assert_equal_runs(run, run.with_name("one"))


REWARD_FUNCTIONS = """
import gc
import torch.distributed as dist


def check_sharding(prompts, responses):
    models = [item for item in gc.get_objects() if type(item).__name__.endswith("GPTNeoXForSequenceClassification")]
    assert [type(model).__name__[:4] for model in models] == ["FSDP" if dist.is_initialized() else "GPTN"]
    local = sum(getattr(weight, "_local_tensor", weight).numel() for weight in models[0].parameters())
    assert dist.is_initialized() == (local < 0.6 * sum(weight.numel() for weight in models[0].parameters()))
    return [0.0 for _ in responses]


def fail_on_rank_1(prompts, responses):
    fail_on_rank_1.calls = getattr(fail_on_rank_1, "calls", 0) + 1
    if dist.get_rank() == 1 and fail_on_rank_1.calls == 2:
        raise ValueError("no score today")
    return [0.0 for _ in responses]
"""
"""First parts of a sum whose second part is a reward model: one checks that the model is sharded, one fails on rank 1
before the model is called."""


@pytest.fixture
def sum_reward(make_classifier, tmp_path):
    """sum_reward(function) → the overrides of the sum of a function of `REWARD_FUNCTIONS` and a reward model."""
    (tmp_path / "functions.py").write_text(REWARD_FUNCTIONS)
    folder = make_classifier(num_labels=1)

    def overrides(function: str) -> list[str]:
        model = f"{{use: model, path: {folder}, microbatch_size: 3}}"
        return [
            "reward=sum",
            "~reward.target",
            f"reward.parts=[{{use: function, target: {tmp_path}/functions.py:{function}}}, {model}]",
        ]

    return overrides


@pytest.mark.slow
@pytest.mark.parametrize("frozen_placement", ["sharded", "offloaded"])
def test_a_sharded_reward_model_gives_the_same_scores(frozen_placement, sum_reward, run_train, assert_equal_runs):
    reward = sum_reward("check_sharding")
    sharded = ["launch.strategy=fsdp", f"launch.frozen_placement={frozen_placement}", "launch.processes=2"]
    two = run_train(*OVERRIDES, *reward, *sharded, name="two")
    one = run_train(*OVERRIDES, *reward, name="one")
    assert_equal_runs(two, one, ties=False)


@pytest.mark.slow
def test_a_failure_on_one_rank_reaches_ranks_that_wait_in_a_sharded_reward_model(sum_reward, run_train, capfd):
    sharded = ["launch.strategy=fsdp", "launch.frozen_placement=sharded", "launch.processes=2", "launch.timeout=60"]
    start = time.monotonic()
    with pytest.raises(SystemExit):
        run_train(*OVERRIDES, *sum_reward("fail_on_rank_1"), *sharded)
    assert re.search(r"rank 1: .*ValueError: no score today", capfd.readouterr().err)
    assert time.monotonic() - start < 50  # less than launch.timeout


@pytest.mark.slow
def test_torchrun_with_two_nodes(single_process_run, small_overrides, assert_equal_runs, tmp_path):
    """Two agents on this machine stand for two nodes of one process each."""
    overrides = [*small_overrides, *OVERRIDES, "name=nodes"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    rendezvous = ["--master-addr=127.0.0.1", f"--master-port={find_free_port()}", "--no-python"]
    agents = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", *rendezvous, *command(*overrides)], cwd=tmp_path, env=environment()
        )
        for rank in (0, 1)
    ]
    assert [agent.wait(timeout=180) for agent in agents] == [0, 0]
    assert sorted(entry.name for entry in (tmp_path / "outputs").iterdir()) == ["nodes"]
    assert_equal_runs(tmp_path / "outputs" / "nodes", single_process_run())


def test_a_minibatch_that_the_processes_do_not_divide_is_refused_before_loading(run_train, tmp_path):
    with pytest.raises(ConfigError, match=r"minibatch_size: 4 is not a multiple of the number of processes, 3"):
        run_train("launch.processes=3", "model.path=/nowhere")
    assert not (tmp_path / "run").exists()


# --- out of memory ------------------------------------------------------------------------------------------


LIMIT_MEMORY = """
import torch
import torch.distributed as dist
from apa_cli.models.forward import TrainingModel

forward = TrainingModel.forward


def limited(self, batch, *arguments, **options):
    if torch.is_grad_enabled() and dist.get_rank() == 1 and len(batch.mask) > 1:
        raise torch.OutOfMemoryError("out of memory")
    return forward(self, batch, *arguments, **options)


TrainingModel.forward = limited
"""
"""Prepended to a reward's file: rank 1 runs out of memory when it trains on two sequences at once."""


@pytest.mark.slow
def test_out_of_memory_on_one_rank_halves_the_microbatch_on_all(
    single_process_run, small_overrides, run_train, assert_equal_runs, tmp_path
):
    target = next(word for word in small_overrides if word.startswith("reward.target=")).partition("=")[2]
    (tmp_path / "limited.py").write_text(LIMIT_MEMORY + Path(target.partition(":")[0]).read_text())
    run = run_train(*OVERRIDES, f"reward.target={tmp_path}/limited.py:vowels", "launch.processes=2")
    assert_equal_runs(run, single_process_run())
    assert (run / "run.log").read_text().count("microbatch_size: out of memory; reduced to 1") == 1


def limit_memory(monkeypatch, rows: int) -> None:
    """Let the training model's forward pass run out of memory above this number of sequences."""
    from apa_cli.models.forward import TrainingModel

    forward = TrainingModel.forward

    def limited(self, batch, *arguments, **options):
        if len(batch.mask) > rows:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, batch, *arguments, **options)

    monkeypatch.setattr(TrainingModel, "forward", limited)


def test_out_of_memory_halves_the_microbatch_and_changes_no_result(
    single_process_run, run_train, assert_equal_runs, monkeypatch
):
    expected = single_process_run()
    limit_memory(monkeypatch, 1)
    run = run_train(*OVERRIDES)
    assert_equal_runs(run, expected)
    log = (run / "run.log").read_text()
    assert (
        log.count("microbatch_size: out of memory; reduced to 2")
        == log.count("microbatch_size: out of memory; reduced to 1")
        == 1
    )
    limit_memory(monkeypatch, 0)
    with pytest.raises(UserError, match="microbatch_size: out of memory with 1"):
        run_train(*OVERRIDES, name="none")


# --- failures and signals -----------------------------------------------------------------------------------


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-c", "from apa_cli.cli.train import main; main()", *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start_command(overrides: list[str], folder: Path) -> subprocess.Popen:
    """Start apa-train in the folder, with stderr as a pipe of text."""
    return subprocess.Popen(
        command(*overrides),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_children(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    return [
        int(number)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for number in (task / "children").read_text().split()
    ]


FAILURES = {
    "raises": ("raise ValueError('no score today')", ["rank 1", "no score today"], 1),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", ["rank 1 was killed by SIGKILL"], 128 + 9),
    "hangs": ("time.sleep(600)", ["launch.timeout: rank 1 did not respond within 8 s"], 1),
}
"""Failure of rank 1 → the statement that causes it, texts in the error, and the exit status."""


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_ends_the_run_and_is_named(failure, small_overrides, tmp_path):
    statement, messages, status = FAILURES[failure]
    (tmp_path / "failing.py").write_text(
        "import os, signal, time\nimport torch.distributed as dist\n\n\n"
        "def score(prompts, responses):\n"
        "    score.calls = getattr(score, 'calls', 0) + 1\n"
        f"    if dist.get_rank() == 1 and score.calls == 2:\n        {statement}\n"
        "    return [float(len(text)) for text in responses]\n"
    )
    overrides = [
        *small_overrides,
        f"reward.target={tmp_path}/failing.py:score",
        "launch.processes=2",
        "launch.timeout=8",
        "name=run",
    ]
    start = time.monotonic()
    process = start_command(overrides, tmp_path)
    children: set[int] = set()
    while process.poll() is None and time.monotonic() - start < 120:
        children |= set(find_children(process.pid))
        time.sleep(0.2)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == status, errors
    assert all(message in errors for message in messages), errors
    assert len(children) >= 2
    while alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() - start < 150, alive
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_stops_all_processes_and_the_resumed_run_equals_an_uninterrupted_one(
    small_overrides, train, tmp_path, comparable
):
    overrides = [*small_overrides, "iterations=40", "checkpoint.every=0", "launch.processes=2", "name=run"]
    process = start_command(overrides, tmp_path)
    metrics, start = tmp_path / "outputs" / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() - start < 120:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143, errors
    last = json.loads(metrics.read_text().splitlines()[-1])["iteration"]
    assert 2 <= last < 40 and f"after iteration {last} of 40, saved" in errors and "resume=" in errors
    more = [f"iterations={last + 1}", f"resume={metrics.parent}"]
    subprocess.run(command(*overrides, *more), cwd=tmp_path, env=environment(), check=True)
    uninterrupted = train(
        tmp_path / "uninterrupted", "checkpoint.every=0", "launch.processes=2", f"iterations={last + 1}"
    )
    assert [row["reward/mean"] for row in comparable(metrics)[1:]] == [
        row["reward/mean"] for row in comparable(uninterrupted / "metrics.jsonl")[1:]
    ]
