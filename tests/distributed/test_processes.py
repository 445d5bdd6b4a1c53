"""A run in two processes is the run in one; a process that dies, hangs or is asked to stop ends them all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from apa_cli.distributed import spawn as processes
from apa_cli.distributed.spawn import given
from apa_cli.distributed.world import World
from apa_cli.errors import ConfigError, UserError
from apa_cli.hardware.oom import Halving
from apa_cli.rollout.collect import concatenated
from apa_cli.types import Rollout

WORDS = ["iterations=2", "evaluation.every=1", "evaluation.prompts=5", "checkpoint.every=1", "optimizer.lr=1e-3"]
"""Five held-out prompts: two processes get three each, one of them twice."""


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """alone(*words) → the directory of the same run in one process, made once for these words."""
    made = {}

    def run(*words: str) -> Path:
        if words not in made:
            made[words] = train(tmp_path_factory.mktemp("alone") / "run", *WORDS, *words)
        return made[words]

    return run


@pytest.fixture(scope="module")
def assert_equal_runs(comparable, records):
    """assert_equal_runs(run, other): equal texts, and metrics to 1e-4 relative or 1e-6 absolute.

    The evaluation after the last update is among them; weights are not compared, for where a gradient is rounding
    alone, as a key bias's is, AdamW makes whole steps of it. Without `ties` equal replies may differ by rounding in
    their scores, as those of a model do that reads them in batches of another size, so win rates are left out.
    """

    def check(run: Path, other: Path, ties: bool = True) -> None:
        for row, expected in zip(comparable(run / "metrics.jsonl"), comparable(other / "metrics.jsonl"), strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                if not ties and name == "eval/win_rate_sft":
                    continue
                # A KL per response is a sum over up to 12 tokens of differences that are rounded one by one.
                absolute = 8e-6 if name in ("kl/sequence", "kl/refreshed", "eval/kl_exact") else 1e-6
                assert row[name] == pytest.approx(value, rel=1e-4, abs=absolute), name
        texts = [
            [(row["iteration"], row["prompt"], row["response"], row["ending"]) for row in records(r / "samples.jsonl")]
            for r in (run, other)
        ]
        assert texts[0] == texts[1] and texts[0]

    return check


# --- the same run in any number of processes ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["launch.strategy=ddp"],
        pytest.param(["launch.strategy=fsdp"], marks=pytest.mark.slow),
        pytest.param(["algo=ppo", "launch.strategy=fsdp", "launch.frozen_placement=offloaded"], marks=pytest.mark.slow),
        pytest.param(
            ["reference.refresh_every=1", "launch.strategy=fsdp", "launch.frozen_placement=sharded"], marks=pytest.mark.slow
        ),
        pytest.param(["lora=default", "critic=adapter", "model.gradient_checkpointing=true"], marks=pytest.mark.slow),
        pytest.param(["algo=awr", "critic=head", "microbatch_size=1", "samples_per_prompt=2"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "ppo-fsdp-offloaded", "refreshed-fsdp-sharded", "lora-ddp", "awr-head"],
)  # fmt: skip
def test_two_processes_are_one(words, alone, run_train, assert_equal_runs):
    run = run_train(*WORDS, *words, "launch.processes=2")
    assert_equal_runs(run, alone(*(word for word in words if not word.startswith("launch."))))
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert (run / "logs" / "rank_1.log").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_the_other_way_round(
    strategy, alone, run_train, assert_equal_runs
):
    two = [f"launch.strategy={strategy}", "launch.processes=2"]
    for name, before, after in (("two_one", two, []), ("one_two", [], two)):
        run = run_train(*WORDS, *before, "iterations=1", name=name)
        run_train(*WORDS, *after, f"name={name}", f"resume={run}", name=name)
        assert_equal_runs(run, alone())


@pytest.mark.slow
def test_held_out_prompts_that_changed_are_answered_by_a_sharded_reference_too(run_train, assert_equal_runs):
    shards = ["launch.strategy=fsdp", "launch.frozen_placement=sharded", "launch.processes=2"]
    for name, words in (("one", []), ("two", shards)):
        run = run_train(*WORDS, *words, "iterations=1", name=name)
        run_train(*WORDS, *words, "evaluation.prompts=4", f"name={name}", f"resume={run}", name=name)
    assert_equal_runs(run, run.with_name("one"))


SPREAD = """
import gc
import torch.distributed as dist


def spread(prompts, responses):
    models = [thing for thing in gc.get_objects() if type(thing).__name__.endswith("GPTNeoXForSequenceClassification")]
    assert [type(model).__name__[:4] for model in models] == ["FSDP" if dist.is_initialized() else "GPTN"]
    shards = sum(getattr(weight, "_local_tensor", weight).numel() for weight in models[0].parameters())
    assert dist.is_initialized() == (shards < 0.6 * sum(weight.numel() for weight in models[0].parameters()))
    return [0.0 for _ in responses]


def fails_in_one(prompts, responses):
    fails_in_one.calls = getattr(fails_in_one, "calls", 0) + 1
    if dist.get_rank() == 1 and fails_in_one.calls == 2:
        raise ValueError("no score today")
    return [0.0 for _ in responses]
"""
"""Parts of a sum, beside a model: what sees whether that is spread, and what fails before it is called."""


@pytest.fixture
def beside_a_model(make_classifier, tmp_path):
    """beside_a_model(function) → the words of a reward that is a model and a function of `SPREAD`."""
    (tmp_path / "spread.py").write_text(SPREAD)
    folder = make_classifier(num_labels=1)

    def words(function: str) -> list[str]:
        model = f"{{use: model, path: {folder}, microbatch: 3}}"
        return [
            "reward=sum",
            "~reward.target",
            f"reward.parts=[{{use: function, target: {tmp_path}/spread.py:{function}}}, {model}]",
        ]

    return words


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["sharded", "offloaded"])
def test_a_reward_model_spread_over_the_processes(frozen, beside_a_model, run_train, assert_equal_runs):
    words = beside_a_model("spread")
    shards = ["launch.strategy=fsdp", f"launch.frozen_placement={frozen}", "launch.processes=2"]
    two, one = run_train(*WORDS, *words, *shards, name="two"), run_train(*WORDS, *words, name="one")
    assert_equal_runs(two, one, ties=False)


@pytest.mark.slow
def test_a_failure_in_one_process_is_told_to_those_that_wait_for_it_in_a_reward_model(beside_a_model, run_train, capfd):
    shards = ["launch.strategy=fsdp", "launch.frozen_placement=sharded", "launch.processes=2", "launch.timeout=60"]
    begun = time.monotonic()
    with pytest.raises(SystemExit):
        run_train(*WORDS, *beside_a_model("fails_in_one"), *shards)
    assert re.search(r"process 1: function: reward: .* raised ValueError: no score today", capfd.readouterr().err)
    assert time.monotonic() - begun < 50


FULL = """
import torch
import torch.distributed as dist
from apa_cli.models.forward import TrainingModel

forward = TrainingModel.forward


def limited(self, batch, *arguments, **options):
    if torch.is_grad_enabled() and dist.get_rank() == 1 and len(batch.mask) > 1:
        raise torch.OutOfMemoryError("tried to allocate more than there is")
    return forward(self, batch, *arguments, **options)


TrainingModel.forward = limited
"""
"""In front of a reward: process 1 cannot train on two sequences at once."""


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_halves_the_microbatch_in_all(
    alone, small_words, run_train, assert_equal_runs, tmp_path
):
    target = next(word for word in small_words if word.startswith("reward.target=")).partition("=")[2]
    (tmp_path / "full.py").write_text(FULL + Path(target.partition(":")[0]).read_text())
    run = run_train(*WORDS, f"reward.target={tmp_path}/full.py:vowels", "launch.processes=2")
    assert_equal_runs(run, alone())
    assert (run / "run.log").read_text().count("out of memory: microbatch_size is 1 from here on") == 1


@pytest.mark.slow
def test_two_agents_of_torchrun_on_one_machine(alone, small_words, assert_equal_runs, tmp_path):
    """Two nodes of one process each, over the loopback."""
    words = [*small_words, *WORDS, "name=nodes"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "--no-python"]
    started = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", *meeting, *command(*words)], cwd=tmp_path, env=environment()
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=180) for process in started] == [0, 0]
    assert sorted(entry.name for entry in (tmp_path / "outputs").iterdir()) == ["nodes"]
    assert_equal_runs(tmp_path / "outputs" / "nodes", alone())


def test_a_minibatch_that_does_not_divide_is_refused_before_anything_is_loaded(run_train, tmp_path):
    with pytest.raises(ConfigError, match=r"minibatch_size: 4 is not a multiple of the 3 processes"):
        run_train("launch.processes=3", "model.path=/nowhere")
    assert not (tmp_path / "run").exists()


# --- processes that end -------------------------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from apa_cli.cli.train import main; main()", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [
        int(number)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for number in (task / "children").read_text().split()
    ]


FATES = {
    "raises": ("raise ValueError('no score today')", ["process 1", "no score today"], 1),
    "dies": ("os.kill(os.getpid(), signal.SIGKILL)", ["process 1 was killed by SIGKILL"], 128 + 9),
    "hangs": ("time.sleep(600)", ["process 1 did not answer within 8 s"], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("fate", FATES)
def test_a_process_that_fails_ends_the_run_and_is_named(fate, small_words, tmp_path):
    action, messages, status = FATES[fate]
    (tmp_path / "fate.py").write_text(
        "import os, signal, time\nimport torch.distributed as dist\n\n\n"
        "def fate(prompts, responses):\n"
        "    fate.calls = getattr(fate, 'calls', 0) + 1\n"
        f"    if dist.get_rank() == 1 and fate.calls == 2:\n        {action}\n"
        "    return [float(len(text)) for text in responses]\n"
    )
    words = [
        *small_words,
        f"reward.target={tmp_path}/fate.py:fate",
        "launch.processes=2",
        "launch.timeout=8",
        "name=run",
    ]
    begun = time.monotonic()
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    started: set[int] = set()
    while process.poll() is None and time.monotonic() - begun < 120:
        started |= set(children(process.pid))
        time.sleep(0.2)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == status, errors
    assert all(message in errors for message in messages), errors
    assert len(started) >= 2
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() - begun < 150, left
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_reaches_every_process_and_the_run_goes_on_as_if_uninterrupted(
    small_words, train, tmp_path, comparable
):
    words = [*small_words, "iterations=40", "checkpoint.every=0", "launch.processes=2", "name=run"]
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics, begun = tmp_path / "outputs" / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() - begun < 120:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143, errors
    done = json.loads(metrics.read_text().splitlines()[-1])["iteration"]
    assert 2 <= done < 40 and f"after iteration {done} of 40, saved" in errors and "resume=" in errors
    subprocess.run(
        command(*words, f"iterations={done + 1}", f"resume={metrics.parent}"),
        cwd=tmp_path,
        env=environment(),
        check=True,
    )
    whole = train(
        tmp_path / "whole", "iterations=40", "checkpoint.every=0", "launch.processes=2", f"iterations={done + 1}"
    )
    assert [row["reward/mean"] for row in comparable(metrics)[1:]] == [
        row["reward/mean"] for row in comparable(whole / "metrics.jsonl")[1:]
    ]


# --- the pieces ---------------------------------------------------------------------------------------------


def test_shares_are_equal_in_size_and_in_order():
    worlds = [World(rank, 3, rank, None, 0.0) for rank in range(3)]
    assert [world.share(6) for world in worlds] == [[0, 1], [2, 3], [4, 5]]
    assert [world.share(5) for world in worlds] == [[0, 1], [2, 3], [4, 4]]
    assert [world.share(1) for world in worlds] == [[0], [0], [0]]


def rollout(prompts: list[list[int]], responses: list[list[int]], first: int) -> Rollout:
    """Rows padded to their own widths with the token 0; numbers that tell the rows apart."""

    def table(rows: list[list], left: bool = False) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows])

    chosen = table([[1] * len(row) for row in responses]).bool()
    numbers = table([[-float(token) for token in row] for row in responses])
    names = [str(first + i) for i in range(len(prompts))]
    return Rollout(
        prompt_ids=table(prompts, left=True), prompt_mask=table([[1] * len(p) for p in prompts], left=True).bool(),
        response_ids=table(responses), mask=chosen, prefix_mask=~chosen & False, sampler_logprobs=numbers,
        prompts=names, responses=names, endings=names, groups=torch.arange(first, first + len(prompts)),
        columns=[{"name": name} for name in names], scores=torch.arange(first, first + len(prompts)).float(),
        ref_logprobs=numbers, init_logprobs=numbers, values={"value": 2 * numbers},
    )  # fmt: skip


def test_rollouts_of_several_processes_are_one():
    parts = [rollout([[5], [6, 7]], [[1, 2, 3], [4]], 0), rollout([[8, 9, 9], [1]], [[5, 6], [5, 6]], 2)]
    whole = concatenated(parts, pad=99, count=3)
    # Filled up with the pad token: on the left of prompts, on the right of replies; the fourth row is left out.
    assert whole.prompt_ids.tolist() == [[99, 0, 5], [99, 6, 7], [8, 9, 9]]
    assert whole.prompt_mask.tolist() == [[False, False, True], [False, True, True], [True, True, True]]
    assert whole.response_ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 99]]
    assert whole.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert whole.sampler_logprobs.tolist() == [[-1, -2, -3], [-4, 0, 0], [-5, -6, 0]]
    assert whole.values["value"].tolist() == [[-2, -4, -6], [-8, 0, 0], [-10, -12, 0]]
    assert whole.scores.tolist() == [0, 1, 2] and whole.groups.tolist() == [0, 1, 2]
    assert whole.responses == ["0", "1", "2"] and whole.columns == [{"name": str(i)} for i in range(3)]
    assert whole.ref_logprobs is whole.init_logprobs and whole.old_logprobs is None


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "MASTER_ADDR": "a"},
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        ),
    ],
)
def test_the_place_in_a_world_is_read_from_the_environment(variables, place, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert given() == place
    if "SLURM_JOB_ID" in variables:
        assert os.environ["MASTER_PORT"] == "20007"


def test_runs_in_one_process_each_take_gpus_of_their_own(configured, monkeypatch, tmp_path):
    monkeypatch.setattr(processes.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings, alone = configured("launch.processes=1").launch, World(0, 1, 0, None, 0.0)
    taken = []
    for _ in range(3):  # each as a process of its own would find it
        monkeypatch.setattr(processes, "HELD", held := {})
        taken.append((processes.gpu(settings, alone), held))
    assert [number for number, _ in taken] == [0, 1, 0] and [len(held) for _, held in taken] == [1, 1, 0]
    monkeypatch.setattr(processes, "HELD", taken[1][1])
    assert processes.gpu(settings, alone) == 1  # the next job of a sweep in the same process
    assert processes.gpu(settings, World(3, 8, 3, None, 0.0)) == 3


def test_what_the_main_process_cannot_make_is_its_error(monkeypatch):
    def fail():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        World(0, 1, 0, None, 0.0).from_main(fail)
    told = []
    monkeypatch.setattr(World, "gather", lambda self, value: told.append(value) or [(None, True), value])
    with pytest.raises(UserError, match="the disk is full"):
        World(0, 2, 0, None, 0.0).from_main(fail)
    with pytest.raises(processes.ContactLost):
        World(1, 2, 1, None, 0.0).from_main(fail)
    assert told == [(None, True), (None, False)]


# --- memory -------------------------------------------------------------------------------------------------


def test_a_size_is_halved_until_memory_suffices():
    said, tried = [], []

    def work(size: int) -> int:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("out of memory")
        return size

    halving = Halving("microbatch_size", 12, 1, said.append)
    assert halving.run(work) == 3 and tried == [12, 6, 3]
    assert halving.run(work) == 3 and tried == [12, 6, 3, 3]  # it is not tried again with more
    assert len(said) == 2 and "microbatch_size is 3 from here on" in said[1]
    with pytest.raises(RuntimeError, match="another"):
        halving.run(lambda size: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(UserError, match="microbatch_size: out of memory with 6"):
        Halving("microbatch_size", 12, 6, said.append).run(work)


def full_above(monkeypatch, rows: int) -> None:
    """The forward pass of the training model runs out of memory with more sequences, as a device does."""
    from apa_cli.models.forward import TrainingModel

    forward = TrainingModel.forward

    def limited(self, batch, *arguments, **options):
        if len(batch.mask) > rows:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return forward(self, batch, *arguments, **options)

    monkeypatch.setattr(TrainingModel, "forward", limited)


def test_out_of_memory_halves_the_microbatch_and_changes_no_result(alone, run_train, assert_equal_runs, monkeypatch):
    expected = alone()
    full_above(monkeypatch, 1)
    run = run_train(*WORDS)
    assert_equal_runs(run, expected)
    log = (run / "run.log").read_text()
    assert log.count("out of memory: microbatch_size is 2") == log.count("out of memory: microbatch_size is 1") == 1
    full_above(monkeypatch, 0)
    with pytest.raises(UserError, match="microbatch_size: out of memory with 1"):
        run_train(*WORDS, name="none")
