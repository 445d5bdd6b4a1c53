"""Whole runs on a tiny model: repeatable, resumable, the same for any microbatch; the score rises."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from apa_cli.errors import UserError
from apa_cli.models.forward import response_logits, sequences
from apa_cli.randomness import Stream, uniforms
from apa_cli.rollout.collect import collect
from apa_cli.runs.checkpoint import load
from apa_cli.runs.console import Console
from apa_cli.training.build import build_trainer

TRAINING = {
    "reward/mean",
    "reward/std",
    "kl/sequence",
    "kl/token_k3",
    "policy/entropy",
    "policy/ratio_max",
    "policy/sampler_gap",
    "value/explained_variance",
    "loss/policy",
    "loss/value",
    "response/length",
    "response/eos_rate",
    "response/truncated_rate",
    "response/distinct_2",
    "optimizer/lr",
    "optimizer/grad_norm",
    "optimizer/critic_grad_norm",
    "throughput/samples_per_s",
    "throughput/tokens_per_s",
    "throughput/mfu",
    "time/rollout_s",
    "time/score_s",
    "time/update_s",
    "memory/peak_gib",
}
"""What every run with a critic records in every iteration."""

EVALUATION = {
    "eval/reward_mean",
    "eval/reward_ci",
    "eval/kl_exact",
    "eval/kl_exact_token",
    "eval/entropy",
    "eval/distinct_2",
    "eval/length",
    "eval/win_rate_sft",
}

OWN = {
    "apa": {"apa/log_z", "apa/log_z_lower", "apa/log_z_ess"},
    "ppo": {"policy/clip_fraction", "ppo/kl_coef"},
    "awr": set(),
}
"""The metrics that only one algorithm has."""


@pytest.fixture(scope="module")
def baseline(train, tmp_path_factory):
    """One small run of APA, seed 0."""
    return train(tmp_path_factory.mktemp("baseline") / "baseline")


def finite(rows: list[dict]) -> bool:
    return all(math.isfinite(value) for row in rows for value in row.values())


def final_tensors(directory, iteration):
    tensors, _ = load(directory / "checkpoints" / f"iteration_{iteration:06d}")
    return {f"{file}.{name}": tensor for file, group in tensors.items() for name, tensor in group.items()}


def assert_same_bits(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and first
    differing = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not differing


# --- the same numbers ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_and_replies(baseline, run_train, comparable):
    again = run_train()
    assert comparable(again / "metrics.jsonl") == comparable(baseline / "metrics.jsonl")
    assert (again / "samples.jsonl").read_text() == (baseline / "samples.jsonl").read_text()
    assert_same_bits(final_tensors(again, 3), final_tensors(baseline, 3))


def test_another_seed_gives_others_and_is_evaluated_on_the_same_random_numbers(
    baseline, run_train, comparable, records
):
    other = run_train("seed=1")
    first, second = comparable(baseline / "metrics.jsonl"), comparable(other / "metrics.jsonl")
    assert all(a["reward/mean"] != b["reward/mean"] for a, b in zip(first[1:], second[1:], strict=True))
    assert first[0] == second[0]  # the SFT model's evaluation depends on eval_seed alone
    shifted = run_train("evaluation.seed=7", "iterations=0", name="shifted")
    replies = [row["response"] for row in records(shifted / "samples.jsonl")]
    assert replies != [row["response"] for row in records(baseline / "samples.jsonl")][: len(replies)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words.split(), id=name, marks=[] if quick else pytest.mark.slow)
        for name, quick, words in [
            ("apa", True, "algo=apa optimizer.lr_scheduler=linear optimizer.warmup_ratio=3"),
            ("ppo-adaptive", True, "algo=ppo algo.kl_controller=adaptive algo.kl_horizon=16"),
            ("awr-head", False, "algo=awr critic=head critic.head=mlp"),
            ("refreshed", False, "algo=apa reference.refresh_every=1"),
            ("lora", True, "algo=apa lora=default critic=adapter model.gradient_checkpointing=true optimizer.lr=3e-3"),
            (
                "lora-separate",
                False,
                "algo=awr lora=default critic=separate reference.refresh_every=2 optimizer.lr=3e-3",
            ),
            ("top-layer", False, "algo=awr model.trainable_layers=1"),
        ]
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_one(words, run_train, comparable, tmp_path):
    words = [*words, "iterations=4", "evaluation.every=2", "checkpoint.keep_last=4"]
    whole = run_train(*words, name="whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    run_train(*words, "name=whole", f"resume={resumed}/checkpoints/iteration_000002", name="resumed")
    expected, got = comparable(whole / "metrics.jsonl"), comparable(resumed / "metrics.jsonl")
    assert got == expected
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert_same_bits(final_tensors(resumed, 4), final_tensors(whole, 4))
    if "algo=ppo" in words:
        assert len({row["ppo/kl_coef"] for row in expected[1:]}) == 4  # there was something to remember
    if "reference.refresh_every=1" in words:
        refreshed = [row["kl/refreshed"] for row in expected[1:]]
        assert max(map(abs, refreshed)) < 1e-5 < max(abs(row["kl/sequence"]) for row in expected[1:])


def nearest_edge(configured, folder, *words) -> float:
    """The distance of the nearest draw of evaluation and first iteration to an edge between two tokens."""
    config = configured(*words)
    with Console(None, 1, quiet=True) as console:
        trainer = build_trainer(config, folder, None, None, console)
    settings, nearest = config.sampling, 1.0
    rollout, _ = trainer.sample(1)
    prompts = trainer.evaluator.prompts
    evaluated = collect(
        {"policy": trainer.model.policy}, trainer.tokenizer, prompts, settings, trainer.end_tokens,
        config.evaluation.seed, Stream.evaluation, iteration=0,
    )  # fmt: skip
    for part, key in (
        (rollout, (config.run.seed, Stream.rollout, 1)),
        (evaluated, (config.evaluation.seed, Stream.evaluation, 0)),
    ):
        places = [(place, 0) for place in range(len(part.prompts))]
        draws = torch.from_numpy(uniforms(*key, places, settings.max_new_tokens))
        rows = sequences(part.prompt_ids, part.prompt_mask, part.response_ids, part.mask)
        with torch.no_grad():
            probabilities = response_logits(trainer.model.policy, rows, settings.temperature).softmax(-1)
        cumulative = probabilities.double().cumsum(-1)
        length = cumulative.shape[1]
        distance = (cumulative - draws[:, :length, None] * cumulative[:, :, -1:]).abs().amin(-1)
        nearest = min(nearest, float(distance[part.mask[:, :length]].min()))
    return nearest


def test_microbatches_change_nothing(run_train, configured, comparable, records, tmp_path):
    words = ["iterations=1", "minibatch_size=8", "optimizer.lr=1e-3", "sampling.max_new_tokens=8"]
    # A draw within rounding of an edge may fall either way: the seed taken has none within ten times that.
    (tmp_path / "seed").mkdir()
    seeds = ([f"seed={seed}", f"evaluation.seed={seed}"] for seed in range(50))
    seed = next(pair for pair in seeds if nearest_edge(configured, tmp_path / "seed", *words, *pair) > 2e-6)
    runs = [
        run_train(*words, *seed, f"microbatch_size={size}", f"sampling.microbatch_size={size}", name=f"size_{size}")
        for size in (8, 4, 1)
    ]
    whole, *split = [comparable(run / "metrics.jsonl") for run in runs]
    for rows in split:
        for expected, row in zip(whole, rows, strict=True):
            for name in expected.keys() | row.keys():
                # A KL per response is the sum over 8 tokens of differences that are rounded one by one.
                absolute = 8e-6 if name in ("kl/sequence", "eval/kl_exact") else 1e-6
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=absolute), name
    texts = [
        [(row["response"], row["ending"]) for row in records(run / "samples.jsonl") if row["iteration"] == 0]
        for run in runs
    ]
    assert texts[0] == texts[1] == texts[2]


# --- what is recorded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apa", "ppo", "awr"])
def test_every_documented_metric_is_there_and_finite(name, baseline, run_train, records):
    run = baseline if name == "apa" else run_train(f"algo={name}")
    start, *rows = records(run / "metrics.jsonl")
    assert finite([start, *rows])
    assert start.keys() >= EVALUATION and rows[-1].keys() >= EVALUATION
    foreign = set().union(*OWN.values()) - OWN[name]
    for row in rows:
        assert TRAINING | OWN[name] <= row.keys()
        assert not foreign & row.keys()
    assert [row["iteration"] for row in [start, *rows]] == [0, 1, 2, 3]
    assert [row["samples"] for row in [start, *rows]] == [0, 8, 16, 24]


def test_the_policy_starts_at_its_reference(baseline, records):
    start, first, *_, last = records(baseline / "metrics.jsonl")
    assert abs(start["eval/kl_exact"]) < 1e-6 and abs(start["eval/kl_exact_token"]) < 1e-6
    assert start["eval/win_rate_sft"] == 0.5
    assert abs(first["kl/sequence"]) < 1e-4 and first["policy/sampler_gap"] < 1e-5
    assert last["eval/kl_exact"] > 1e-3  # and moves away


def test_samples_count_responses_not_prompts(run_train, records):
    run = run_train("samples_per_prompt=2", "iterations=2")
    assert [row["samples"] for row in records(run / "metrics.jsonl")] == [0, 8, 16]


def test_no_iterations_evaluate_the_sft_model_and_write_it_out(run_train, records, tiny):
    run = run_train("iterations=0")
    (row,) = records(run / "metrics.jsonl")
    assert row["iteration"] == 0 and row["eval/win_rate_sft"] == 0.5
    assert_same_bits(load_file(run / "model" / "model.safetensors"), load_file(tiny / "model.safetensors"))


@pytest.mark.parametrize(("every", "evaluated"), [(0, [0, 3]), (2, [0, 2, 3])])
def test_evaluations_come_at_the_start_the_end_and_every_so_often(every, evaluated, run_train, records):
    run = run_train(f"evaluation.every={every}")
    rows = records(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "eval/reward_mean" in row] == evaluated
    assert sorted({row["iteration"] for row in records(run / "samples.jsonl")}) == evaluated


# --- variants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "dataset=embedded critic=head",
        "critic.head=mlp",
        "algo=ppo critic=head critic.head=mlp update_order=consecutive",
        "algo.normalizer=batch",
        "algo.whitening=minibatch algo.normalizer=batch",
        "sampling.temperature=0.7",
        "sampling.top_k=5 sampling.top_p=0.9",
        "algo.advantage_estimator=monte_carlo algo.score_scaling=batch algo.score_clip=2",
        "model.dtype=bfloat16",
        "model.dtype=bfloat16 algo=ppo critic=head",
        "rollout_batch_size=8 minibatch_size=8 microbatch_size=1 samples_per_prompt=8",
    ],
)
def test_variants_train(words, run_train, records):
    run = run_train(*words.split(), "iterations=1", "checkpoint.every=0")
    rows = records(run / "metrics.jsonl")
    assert finite(rows)
    assert rows[1]["loss/policy"] != 0 and rows[1]["optimizer/grad_norm"] > 0


def test_at_a_temperature_the_reference_is_scored_at_it_too(run_train, records):
    start, first = records(run_train("sampling.temperature=0.7", "iterations=1") / "metrics.jsonl")
    assert abs(start["eval/kl_exact"]) < 1e-6
    assert abs(first["kl/sequence"]) < 1e-4 and first["policy/sampler_gap"] < 1e-5


@pytest.mark.parametrize("word", ["sampling.top_k=5", "sampling.top_p=0.9"])
def test_a_truncated_distribution_is_warned_of_once(word, run_train):
    run = run_train(word, "iterations=2")
    warnings = [line for line in (run / "run.log").read_text().splitlines() if "warning" in line]
    key = word.split("=")[0].split(".")[1]
    assert len([line for line in warnings if key in line]) == 1


def test_without_truncation_nothing_is_warned_of(baseline):
    assert "warning" not in (baseline / "run.log").read_text()


def test_in_its_warm_up_only_the_critic_learns(run_train):
    words = ["iterations=2", "optimizer.critic_warmup_iterations=1", "optimizer.lr=1e-3"]
    run = run_train(*words)
    first, second = final_tensors(run, 1), final_tensors(run, 2)
    start = final_tensors(run_train("iterations=1", "optimizer.lr=1e-30", name="start"), 1)
    policy = [name for name in first if name.startswith("policy.")]
    critic = [name for name in first if name.startswith("critics.") and "head" in name]
    assert policy and critic
    assert all(torch.allclose(first[name], start[name], atol=1e-20) for name in policy)
    assert all(bool(first[name].any()) for name in critic)  # the head starts at zero
    assert any(not torch.equal(first[name], second[name]) for name in policy)


def test_group_means_need_no_critic(run_train, records):
    run = run_train("algo.advantage_estimator=group_mean", "samples_per_prompt=4", "iterations=2")
    rows = records(run / "metrics.jsonl")
    assert finite(rows)
    assert not {"loss/value", "value/explained_variance", "optimizer/critic_grad_norm"} & rows[-1].keys()
    assert not (run / "critic").exists()
    assert not load(run / "checkpoints" / "iteration_000002")[0]["critics"]


def test_a_critic_is_written_where_there_is_one(baseline):
    assert (baseline / "critic" / "model.safetensors").is_file()


def test_prompts_too_long_are_cut_and_counted(run_train, records):
    run = run_train("dataset=embedded", "sampling.max_prompt_tokens=20", "iterations=1")
    start, first = records(run / "metrics.jsonl")
    assert first["prompt/truncated_rate"] > 0.5 and finite([start, first])


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "algo=apa lambda=0.02 optimizer.lr=5e-3",
        "algo=ppo lambda=0 optimizer.lr=1e-2",
        "algo=awr lambda=0.5 optimizer.lr=1e-2",
    ],
    ids=["apa", "ppo", "awr"],
)
def test_the_score_rises(words, run_train, records, tmp_path):
    (tmp_path / "letter.py").write_text(
        "def letter(prompts, responses):\n"
        "    return [text.lower().count('e') / (len(text) + 1) for text in responses]\n"
    )
    run = run_train(
        *words.split(), f"reward.target={tmp_path}/letter.py:letter", "optimizer.critic_lr=1e-2",
        "iterations=15", "rollout_batch_size=32", "minibatch_size=16", "microbatch_size=16", "sampling.microbatch_size=32",
        "evaluation.prompts=10", "evaluation.every=0", "checkpoint.every=0",
    )  # fmt: skip
    _, *rows = records(run / "metrics.jsonl")
    scores = [row["reward/mean"] for row in rows]
    # 0.07 at the start; 0.13 and more in the last third.
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.04
    assert rows[-1]["eval/kl_exact"] > 0.5


# --- what cannot go on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words", "message"),
    [
        ("[float('nan')] * len(responses)", [], r"score of response 0 is nan"),
        ("[0.0] * (len(responses) - 1) + [float('inf')]", [], r"score of response \d+ is inf"),
        (
            "[1e38 * (-1) ** i for i, _ in enumerate(responses)]",
            ["algo.score_scaling=none"],
            r"(iteration 1.*grad_norm is (inf|nan)|reward/)",
        ),
    ],
    ids=["nan", "inf", "huge"],
)
def test_numbers_that_are_not_finite_stop_the_run_and_are_named(body, words, message, run_train, tmp_path):
    (tmp_path / "broken.py").write_text(f"def broken(prompts, responses):\n    return {body}\n")
    with pytest.raises(UserError, match=message) as error:
        run_train(f"reward.target={tmp_path}/broken.py:broken", *words)
    assert "\n" not in str(error.value)
