"""apa-bench on a tiny architecture: whose work is by hand, and whose table follows from it."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from apa_cli.bench.benchmark import Stopwatch, padding_shares, phase_row, start_bench
from apa_cli.bench.synthetic import check_memory, memory_estimate, number_tokenizer, prompt_lengths
from apa_cli.config.build import build
from apa_cli.config.compose import compose
from apa_cli.errors import ConfigError, UserError
from apa_cli.hardware import machine
from apa_cli.hardware.machine import copy_rate, fastest, free_memory, matrix_rate, peak_bytes, reset_peak
from apa_cli.hardware.roofline import Cost, Work
from apa_cli.models.loading import load_config
from apa_cli.training.mfu import UpdateMeter
from apa_cli.training.updater import minibatch_rows
from apa_cli.types import Batch

CPU = torch.device("cpu")
GROWTH = Path(__file__).parents[1] / "benchmarks" / "growth.py"
TOKENS = 12
PROMPTS = [16, 28, 40, 52, 64, 76, 88, 100]
INPUTS = [length + TOKENS - 1 for length in PROMPTS]
POSITIONS = sum(INPUTS)
DRAWN = TOKENS * len(PROMPTS)

# Two blocks of 32 · 96 + 32 · 32 + 2 · 32 · 64 weights, and a head of 32 · 600.
TRUNK, HEAD = 2 * 8192, 19200
PAIRS = sum(length * (length + 1) // 2 for length in INPUTS)
TRUNK_FLOPS = POSITIONS * 2 * TRUNK + PAIRS * 4 * 2 * 32
POLICY_FLOPS = TRUNK_FLOPS + DRAWN * 2 * HEAD
CRITIC_FLOPS = TRUNK_FLOPS + DRAWN * 2 * 32


@pytest.fixture(scope="module")
def benched(configured, tmp_path_factory):
    """benched(*words) → the directory and bench.json of a small benchmark."""

    def run(*words: str):
        directory = tmp_path_factory.mktemp("bench") / "run"
        start_bench(configured("bench.iterations=1", "bench.warmup=0", "launch.matmul=torch", *words), directory)
        return directory, json.loads((directory / "bench.json").read_text())

    return run


@pytest.fixture(scope="module")
def ppo(benched):
    """PPO, two measured iterations; with this seed the padding token, which no text shows, is not drawn."""
    return benched("algo=ppo", "bench.iterations=2", "microbatch_size=2", "seed=3")


@pytest.fixture(scope="module")
def phases(ppo):
    return {row["name"]: row for row in ppo[1]["phases"]}


def test_the_phases_are_the_passes_of_the_algorithm(ppo, benched):
    names = [row["name"] for row in ppo[1]["phases"]]
    assert names == ["sampling", "reward", "reference", "old log-probs", "critic value", "update"]
    _, without = benched("algo.advantage_estimator=group_mean", "samples_per_prompt=2", "bench.reward=false")
    assert [row["name"] for row in without["phases"]] == ["sampling", "reference", "update"]


def test_tokens_and_operations_are_those_of_the_prompts_and_responses(phases):
    found = {name: (row["tokens"], row["flops"]) for name, row in phases.items()}
    texts = [length + TOKENS for length in PROMPTS]
    reward = sum(texts) * 2 * (TRUNK + 32) + sum(n * (n + 1) // 2 for n in texts) * 4 * 2 * 32
    assert found == {
        "sampling": (DRAWN, POLICY_FLOPS),
        "reward": (sum(texts), reward),
        "reference": (POSITIONS, POLICY_FLOPS),
        "old log-probs": (POSITIONS, POLICY_FLOPS),
        "critic value": (POSITIONS, CRITIC_FLOPS),
        "update": (2 * POSITIONS, 2 * 3 * (POLICY_FLOPS + CRITIC_FLOPS)),
    }


def test_bytes_are_those_of_weights_cache_gradients_and_optimizer(phases):
    # Eight rows side by side, 12 steps; to draw token t + 1 of 12 the prompt and t tokens are read, all are written.
    read = sum(length + t for length in PROMPTS for t in range(1, TOKENS))
    cache = (read + POSITIONS) * 2 * 2 * 32
    assert phases["sampling"]["bytes"] == 4 * (TOKENS * (TRUNK + HEAD) + cache)
    assert phases["reference"]["bytes"] == 4 * 4 * (TRUNK + HEAD)  # microbatches of two
    assert phases["critic value"]["bytes"] == 4 * 4 * (TRUNK + 32)
    # Of the policy, biases and norms are trained too, and the embedding; of the critic also its head.
    norms_and_biases = 2 * (4 * 32 + 96 + 32 + 64 + 32) + 2 * 32
    trained = 2 * (TRUNK + norms_and_biases + 600 * 32) + HEAD + 32 + 1
    # Two epochs of two steps of two microbatches.
    weights = 2 * 8 * (2 * TRUNK + HEAD + 32)
    assert phases["update"]["bytes"] == 4 * (weights + (8 + 8 - 4 + 4 * 7) * trained)


def test_padding_is_what_is_computed_beyond_the_tokens(ppo, phases, benched):
    def share(widths: list[int], needed: int, rows: int) -> float:
        return pytest.approx(1 - needed / (rows * sum(widths)), rel=1e-12)

    pairs = INPUTS[1::2]  # the longer of each two of similar length
    assert phases["sampling"]["padding_share"] == share(INPUTS[-1:], POSITIONS, 8)
    eager = {
        row["name"]: row
        for row in benched("microbatch_size=2", "seed=3", "model.attn_implementation=eager")[1]["phases"]
    }
    for name in ("reference", "critic value"):
        assert phases[name]["padding_share"] == 0
        assert eager[name]["padding_share"] == share(pairs, POSITIONS, 2)
    assert phases["reward"]["padding_share"] == share([n + 1 for n in pairs], POSITIONS + 8, 2)


def test_the_updates_padding_is_that_of_its_minibatches(benched, configured):
    """Every prompt is in the minibatch that its key says; the order of prompts in the rollout is that of its pass."""
    _, result = benched("microbatch_size=1")
    assert result["phases"][-1]["padding_share"] == 0
    _, result = benched("minibatch_size=8", "microbatch_size=8")
    assert result["phases"][-1]["padding_share"] == 0
    _, result = benched("minibatch_size=8", "microbatch_size=8", "model.attn_implementation=eager")
    assert result["phases"][-1]["padding_share"] == pytest.approx(1 - POSITIONS / (8 * INPUTS[-1]), rel=1e-12)
    assert len(list(minibatch_rows(configured("minibatch_size=8", "microbatch_size=8").run, 1))) == 2


def test_the_table_follows_from_seconds_work_and_the_machines_rates(ppo):
    _, result = ppo
    matrix, copy = result["machine"]["matrix_flops_per_s"], result["machine"]["copy_bytes_per_s"]
    assert result["machine"]["matmul"] == "torch"  # as it was told
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
        "response_tokens": DRAWN,
    }


def test_the_directory_holds_what_was_asked_and_what_was_found(ppo):
    directory, _ = ppo
    assert sorted(file.name for file in directory.iterdir()) == ["bench.json", "config.yaml", "run.log"]
    said = (directory / "run.log").read_text()
    for word in ("memory", "sampling", "old log-probs", "update", "samples/s", "TFLOP/s"):
        assert word in said


def test_responses_end_where_the_settings_say(benched):
    _, result = benched("bench.end_probability=1.0")
    assert result["work"]["response_tokens"] == 8
    _, result = benched("bench.end_probability=0.2", "seed=1")
    assert 8 < result["work"]["response_tokens"] < DRAWN
    sampling = result["phases"][0]
    assert sampling["padding_share"] > 1 - POSITIONS / (8 * INPUTS[-1])  # and rows that ended go on


@pytest.mark.parametrize(
    "words",
    [
        ["lora=default", "critic=adapter", "model.dtype=bfloat16"],
        ["model.trainable_layers=1", "critic=head", "model.gradient_checkpointing=true"],
        ["reference.refresh_every=1", "bench.reward_architecture={model_type:gpt2,n_embd:8,n_layer:1,n_head:1}"],
    ],
    ids=["lora", "head", "other-reward"],
)
def test_what_is_trained_and_scored_in_other_ways(words, benched):
    _, result = benched(*words)
    rows = {row["name"]: row for row in result["phases"]}
    assert all(row["flops"] > 0 and row["padding_share"] is not None for row in rows.values())
    if "reference.refresh_every=1" in words:
        assert rows["reward"]["flops"] < rows["reference"]["flops"] == rows["moving reference"]["flops"]
    else:
        full = 2 * 3 * (POLICY_FLOPS + CRITIC_FLOPS)
        assert rows["update"]["flops"] < full


def test_a_phase_is_shown_as_it_was_in_the_iteration_of_median_time():
    runs = [
        (Stopwatch(CPU, {"update": seconds}), {"update": Work(tokens, 10 * tokens, tokens)})
        for seconds, tokens in [(4.0, 40), (2.0, 20), (3.0, 30)]
    ]
    row = phase_row("update", runs, 0.25, matrix=200.0, copy=100.0)
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


def test_padding_is_unknown_where_fewer_positions_were_seen_than_are_needed():
    assert padding_shares({"sampling": 40, "update": 100}, {"sampling": 50, "update": 75}) == {
        "sampling": None,
        "update": 0.25,
    }


def test_growth_reads_what_was_written(ppo):
    directory, result = ppo
    row = runpy.run_path(str(GROWTH))["read"](directory)
    assert (row["rollout_batch_size"], row["microbatch_size"], row["max_new_tokens"]) == (8, 2, TOKENS)
    assert row["times_floor"] == result["seconds"] / result["floor_s"]
    assert row["peak_gib"] == result["peak_bytes"] / 2**30
    sampling = result["phases"][0]
    assert row["phases_times_floor"]["sampling"] == sampling["seconds"] / sampling["floor_s"]


# Memory


def test_memory_by_hand(configured, tiny):
    config = configured("sampling.microbatch_size=4")
    embedding, norms_and_biases = 600 * 32, 2 * (4 * 32 + 96 + 32 + 64 + 32) + 2 * 32
    trunk = TRUNK + embedding + norms_and_biases
    assert memory_estimate(config, load_config(config.model, str(tiny))) == {
        "policy": 16 * (trunk + HEAD),
        "critic value": 16 * trunk,
        "reference": 4 * (trunk + HEAD),
        "reward": 4 * (trunk + 32),
        "key-value cache": 4 * (100 + 12) * 2 * 2 * 32 * 4,
    }


def test_memory_of_a_hub_model_without_the_hub():
    config = build(compose(["model=pythia_160m", "lora=default", "critic=adapter", "model.dtype=bfloat16"]))
    found = memory_estimate(config, load_config(config.model, config.model.path))
    adapter = 12 * 16 * (768 + 3 * 768)  # rank 16 on query_key_value
    assert found["policy"] == 2 * 162_322_944 + 16 * adapter
    assert found["critic value"] == 16 * adapter
    assert "reference" not in found


def test_what_cannot_fit_is_one_line_and_nothing_is_left(configured, tmp_path, monkeypatch):
    monkeypatch.setattr("apa_cli.bench.benchmark.free_memory", lambda device: 2**20)
    with pytest.raises(UserError) as caught:
        start_bench(configured(), tmp_path / "run")
    assert str(caught.value).startswith("memory: ") and "1 MiB are free on cpu" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_just_fits():
    check_memory({"policy": 6.0, "reward": 4.0}, 10.0, CPU)
    with pytest.raises(UserError, match="most of it by the policy"):
        check_memory({"policy": 6.0, "reward": 4.0}, 9.0, CPU)


def test_the_estimate_alone(configured, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    start_bench(configured("dry_run=true"), tmp_path / "run")
    assert capsys.readouterr().out.startswith("memory, activations not counted: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora=default", "critic=adapter", "model.quantization=int4"], "model.quantization: "),
        (["bench.reward_architecture={model_type:gpt2,vocab_size:7}"], "bench.reward_architecture: vocab_size 7 "),
        (["sampling.max_new_tokens=100"], "sampling: max_prompt_tokens 100 + max_new_tokens 100 "),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_nothing_is_left(words, said, configured, tmp_path):
    with pytest.raises(ConfigError) as caught:
        start_bench(configured(*words), tmp_path / "run")
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "run").exists()


# The parts


def test_lengths_are_spread_evenly():
    assert prompt_lengths(8, 16, 100) == PROMPTS
    assert prompt_lengths(1, 5, 9) == [5]


def test_the_tokenizers_words_are_its_numbers():
    tokenizer = number_tokenizer(50)
    assert tokenizer("7 40 3")["input_ids"] == [7, 40, 3]
    assert tokenizer.decode([7, 49, 3], skip_special_tokens=True) == "7 49 3"
    assert len(tokenizer) == 50 and tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_utilization_by_hand(configured):
    cost = Cost(10, 20, 4, 8, 100, 200, 55, 6)
    meter = UpdateMeter(
        cost, 11, configured("rollout_batch_size=2", "minibatch_size=2", "microbatch_size=1").run, 4, False, 1000.0
    )
    mask = torch.tensor([[True, True, True], [True, False, False]])
    prompt_mask = torch.tensor([[False, True, True], [True, True, True]])
    batch = Batch(None, prompt_mask, None, mask, {}, None, None, {}, {})
    # See tests/test_floor.py: 534 forward, twice that backward, two epochs; 3204 FLOPs in 4 s at 1000 FLOP/s.
    assert meter.utilization(batch, 4.0) == pytest.approx(0.801, rel=1e-12)


def test_rates_are_of_the_fastest_run(monkeypatch):
    # The first run, of 1 s, is not counted; then runs of 3, 2 and 4 s, until the time is over.
    monkeypatch.setattr("apa_cli.hardware.machine.MEASURED_SECONDS", 8.5)
    times = iter([0.0, 1.0, 1.0, 4.0, 5.0, 7.0, 8.0, 12.0])
    monkeypatch.setattr("apa_cli.hardware.machine.time.perf_counter", lambda: next(times))
    assert fastest(lambda: None, CPU) == 2.0


def test_the_machines_rates_have_their_units(monkeypatch):
    monkeypatch.setattr("apa_cli.hardware.machine.fastest", lambda work, device: (work(), 0.5)[1])
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 8)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 64)
    assert matrix_rate(CPU, torch.float32) == 2 * 8**3 / 0.5
    assert copy_rate(CPU) == 2 * 64 / 0.5


def test_peak_memory_is_measured_anew_after_a_reset():
    large = torch.ones(2**27, dtype=torch.uint8)
    del large
    reset_peak(CPU)
    before = peak_bytes(CPU)
    large = torch.ones(2**26, dtype=torch.uint8)
    assert 2**25 < peak_bytes(CPU) - before < 2**27
    del large
    assert free_memory(CPU) > 2**20
