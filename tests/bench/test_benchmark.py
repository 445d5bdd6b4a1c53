"""apa-bench on a tiny architecture: its work by hand, and the table that follows from it."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from apa_cli.bench.benchmark import compute_padding_shares, describe_phase, start_bench
from apa_cli.errors import ConfigError, UserError
from apa_cli.hardware.roofline import Work
from apa_cli.training.mfu import Stopwatch
from apa_cli.training.updater import split_into_minibatches

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GROWTH = Path(__file__).parents[1] / "benchmarks" / "growth.py"
TOKENS = 12
PROMPTS = [16, 28, 40, 52, 64, 76, 88, 100]
INPUTS = [length + TOKENS - 1 for length in PROMPTS]
POSITIONS = sum(INPUTS)
SAMPLED = TOKENS * len(PROMPTS)

# Two blocks of 32 · 96 + 32 · 32 + 2 · 32 · 64 weights, and a head of 32 · 600.
TRUNK, HEAD = 2 * 8192, 19200
PAIRS = sum(length * (length + 1) // 2 for length in INPUTS)
TRUNK_FLOPS = POSITIONS * 2 * TRUNK + PAIRS * 4 * 2 * 32
POLICY_FLOPS = TRUNK_FLOPS + SAMPLED * 2 * HEAD
CRITIC_FLOPS = TRUNK_FLOPS + SAMPLED * 2 * 32


@pytest.fixture(scope="module")
def run_bench(make_config, tmp_path_factory):
    """run_bench(*overrides) → the directory and bench.json of a small benchmark."""

    def run(*overrides: str):
        directory = tmp_path_factory.mktemp("bench") / "run"
        start_bench(make_config("bench.iterations=1", "bench.warmup=0", "launch.matmul=torch", *overrides), directory)
        return directory, json.loads((directory / "bench.json").read_text())

    return run


@pytest.fixture(scope="module")
def ppo(run_bench):
    """PPO, two measured iterations; with this seed the padding token, which texts do not show, is never sampled."""
    return run_bench("algo=ppo", "bench.iterations=2", "microbatch_size=2", "seed=3")


@pytest.fixture(scope="module")
def phases(ppo):
    return {row["name"]: row for row in ppo[1]["phases"]}


def test_the_phases_are_the_passes_of_the_algorithm(ppo, run_bench):
    names = [row["name"] for row in ppo[1]["phases"]]
    assert names == ["sampling", "reward", "reference", "old log-probs", "critic value", "update"]
    _, without = run_bench("algo.advantage_estimator=group_mean", "samples_per_prompt=2", "bench.reward=false")
    assert [row["name"] for row in without["phases"]] == ["sampling", "reference", "update"]


def test_tokens_and_flops_by_hand(phases):
    work = {name: (row["tokens"], row["flops"]) for name, row in phases.items()}
    texts = [length + TOKENS for length in PROMPTS]
    reward = sum(texts) * 2 * (TRUNK + 32) + sum(n * (n + 1) // 2 for n in texts) * 4 * 2 * 32
    assert work == {
        "sampling": (SAMPLED, POLICY_FLOPS),
        "reward": (sum(texts), reward),
        "reference": (POSITIONS, POLICY_FLOPS),
        "old log-probs": (POSITIONS, POLICY_FLOPS),
        "critic value": (POSITIONS, CRITIC_FLOPS),
        "update": (2 * POSITIONS, 2 * 3 * (POLICY_FLOPS + CRITIC_FLOPS)),
    }


def test_bytes_of_weights_cache_gradients_and_optimizer_by_hand(phases):
    # Eight rows side by side, 12 steps; token t + 1 of 12 reads the cache of the prompt and t tokens; all are written.
    read = sum(length + t for length in PROMPTS for t in range(1, TOKENS))
    cache = (read + POSITIONS) * 2 * 2 * 32
    assert phases["sampling"]["bytes"] == 4 * (TOKENS * (TRUNK + HEAD) + cache)
    assert phases["reference"]["bytes"] == 4 * 4 * (TRUNK + HEAD)  # microbatches of two
    assert phases["critic value"]["bytes"] == 4 * 4 * (TRUNK + 32)
    # The policy also trains biases, norms and the embedding; the critic these and its head.
    norms_and_biases = 2 * (4 * 32 + 96 + 32 + 64 + 32) + 2 * 32
    trained = 2 * (TRUNK + norms_and_biases + 600 * 32) + HEAD + 32 + 1
    # Two epochs of two steps of two microbatches.
    weights = 2 * 8 * (2 * TRUNK + HEAD + 32)
    assert phases["update"]["bytes"] == 4 * (weights + (8 + 8 - 4 + 4 * 7) * trained)


def test_padding_shares_by_hand(ppo, phases, run_bench):
    def share(widths: list[int], needed: int, rows: int) -> float:
        return pytest.approx(1 - needed / (rows * sum(widths)), rel=1e-12)

    pairs = INPUTS[1::2]  # the longer of each two of similar length
    assert phases["sampling"]["padding_share"] == share(INPUTS[-1:], POSITIONS, 8)
    eager = {
        row["name"]: row
        for row in run_bench("microbatch_size=2", "seed=3", "model.attn_implementation=eager")[1]["phases"]
    }
    for name in ("reference", "critic value"):
        assert phases[name]["padding_share"] == 0
        assert eager[name]["padding_share"] == share(pairs, POSITIONS, 2)
    assert phases["reward"]["padding_share"] == share([n + 1 for n in pairs], POSITIONS + 8, 2)


def test_all_responses_are_sampled_and_scored_of_which_two_are_one_row(run_bench, ppo):
    """DPO's four pairs are the eight responses; the bench's responses are 12 tokens long whatever is sampled."""
    _, result = run_bench("algo=dpo", "minibatch_size=8", "microbatch_size=2")
    phases = {row["name"]: row for row in result["phases"]}
    assert phases.keys() == {"sampling", "reward", "reference", "update"}
    assert (result["work"]["response_tokens"], result["work"]["rollout_batch_size"]) == (SAMPLED, 8)
    prompts = result["work"]["prompt_tokens"]  # of four prompts, each twice
    assert phases["sampling"]["tokens"] == SAMPLED and phases["reward"]["tokens"] == prompts + SAMPLED
    positions = prompts + (TOKENS - 1) * 8
    assert (phases["reference"]["tokens"], phases["update"]["tokens"]) == (positions, 2 * positions)
    assert phases["reference"]["padding_share"] == 0


def test_the_padding_of_the_update_is_that_of_its_minibatches(run_bench, make_config):
    """With one minibatch of all rows its padding does not depend on their order."""
    _, result = run_bench("microbatch_size=1")
    assert result["phases"][-1]["padding_share"] == 0
    _, result = run_bench("minibatch_size=8", "microbatch_size=8")
    assert result["phases"][-1]["padding_share"] == 0
    _, result = run_bench("minibatch_size=8", "microbatch_size=8", "model.attn_implementation=eager")
    assert result["phases"][-1]["padding_share"] == pytest.approx(1 - POSITIONS / (8 * INPUTS[-1]), rel=1e-12)
    assert len(split_into_minibatches(make_config("minibatch_size=8", "microbatch_size=8").run, 1, rows=8)) == 2


def test_the_table_follows_from_seconds_work_and_rates(ppo):
    _, result = ppo
    matrix, copy = result["machine"]["matrix_flops_per_s"], result["machine"]["copy_bytes_per_s"]
    assert result["machine"]["matmul"] == "torch"  # as launch.matmul says
    for row in result["phases"]:
        assert row["seconds"] > 0 and row["peak_bytes"] > 2**20
        for name in ("tokens", "flops", "bytes"):
            assert row[f"{name}_per_s"] == row[name] / row["seconds"]
        assert row["floor_s"] == max(row["flops"] / matrix, row["bytes"] / copy)
        assert row["floor_share"] == row["floor_s"] / row["seconds"]
    assert result["seconds"] >= max(row["seconds"] for row in result["phases"])
    assert result["samples_per_s"] == 8 / result["seconds"]
    assert result["floor_s"] == pytest.approx(sum(row["floor_s"] for row in result["phases"]), rel=1e-12)
    assert result["peak_bytes"] == max(row["peak_bytes"] for row in result["phases"])
    assert result["work"] == {
        "iterations": 2,
        "rollout_batch_size": 8,
        "prompt_tokens": sum(PROMPTS),
        "response_tokens": SAMPLED,
    }


def test_the_directory_has_the_configuration_the_report_and_the_log(ppo):
    directory, _ = ppo
    assert sorted(file.name for file in directory.iterdir()) == [".lock", "bench.json", "config.yaml", "run.log"]
    log = (directory / "run.log").read_text()
    for text in ("memory", "sampling", "old log-probs", "update", "samples/s", "TFLOP/s"):
        assert text in log


def test_end_probability_sets_the_length_of_responses(run_bench):
    _, result = run_bench("bench.end_probability=1.0")
    assert result["work"]["response_tokens"] == 8
    _, result = run_bench("bench.end_probability=0.2", "seed=1")
    assert 8 < result["work"]["response_tokens"] < SAMPLED
    sampling = result["phases"][0]
    assert sampling["padding_share"] > 1 - POSITIONS / (8 * INPUTS[-1])  # rows that ended are still computed


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora=default", "critic=adapter", "model.dtype=bfloat16"],
        ["model.trainable_layers=1", "critic=head", "model.gradient_checkpointing=true"],
        ["reference.refresh_every=1", "bench.reward_architecture={model_type:gpt2,n_embd:8,n_layer:1,n_head:1}"],
    ],
    ids=["lora", "head", "other-reward"],
)
def test_other_models_and_trained_parts(overrides, run_bench):
    _, result = run_bench(*overrides)
    rows = {row["name"]: row for row in result["phases"]}
    assert all(row["flops"] > 0 and row["padding_share"] is not None for row in rows.values())
    if "reference.refresh_every=1" in overrides:
        assert rows["reward"]["flops"] < rows["reference"]["flops"] == rows["moving reference"]["flops"]
    else:
        full = 2 * 3 * (POLICY_FLOPS + CRITIC_FLOPS)
        assert rows["update"]["flops"] < full


def test_a_phase_is_of_the_iteration_with_its_median_time():
    runs = [
        (Stopwatch(CPU, {"update": seconds}), {"update": Work(tokens, 10 * tokens, tokens)})
        for seconds, tokens in [(4.0, 40), (2.0, 20), (3.0, 30)]
    ]
    row = describe_phase("update", runs, 0.25, matrix=200.0, copy=100.0)
    assert row == {
        "name": "update",
        "seconds": 3.0,
        "tokens": 30,
        "flops": 300,
        "bytes": 30,
        "tokens_per_s": 10.0,
        "flops_per_s": 100.0,
        "bytes_per_s": 10.0,
        "floor_s": 1.5,
        "floor_share": 0.5,
        "padding_share": 0.25,
    }


def test_padding_is_unknown_if_fewer_positions_were_counted_than_needed():
    assert compute_padding_shares({"sampling": 40, "update": 100}, {"sampling": 50, "update": 75}) == {
        "sampling": None,
        "update": 0.25,
    }


def test_the_growth_benchmark_reads_the_report(ppo):
    directory, result = ppo
    row = runpy.run_path(str(GROWTH))["read"](directory)
    assert (row["rollout_batch_size"], row["microbatch_size"], row["max_new_tokens"]) == (8, 2, TOKENS)
    assert row["times_floor"] == result["seconds"] / result["floor_s"]
    assert row["peak_gib"] == result["peak_bytes"] / 2**30
    sampling = result["phases"][0]
    assert row["phases_times_floor"]["sampling"] == sampling["seconds"] / sampling["floor_s"]


# Memory


def test_too_little_memory_is_a_one_line_error_and_leaves_no_directory(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("apa_cli.bench.benchmark.read_free_memory", lambda device: 2**20)
    with pytest.raises(UserError) as error:
        start_bench(make_config(), tmp_path / "run")
    assert str(error.value).startswith("memory: ") and "1 MiB are free on cpu" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_memory_estimate_and_leaves_no_directory(make_config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    start_bench(make_config("dry_run=true"), tmp_path / "run")
    assert capsys.readouterr().out.startswith("memory, activations not counted: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=default", "critic=adapter", "model.quantization=int4"], "model.quantization: "),
        (["bench.reward_architecture={model_type:gpt2,vocab_size:7}"], "bench.reward_architecture: vocab_size 7 "),
        (["sampling.max_new_tokens=100"], "sampling: max_prompt_tokens 100 + max_new_tokens 100 "),
    ],
)
def test_an_unusable_configuration_is_a_one_line_error_and_leaves_no_directory(
    overrides, message, make_config, tmp_path
):
    with pytest.raises(ConfigError) as error:
        start_bench(make_config(*overrides), tmp_path / "run")
    assert str(error.value).startswith(message)
    assert not (tmp_path / "run").exists()
