"""HIR on a growing pool: what goes in, what is drawn and relabelled, and what a fork takes over."""

import json
import shutil

import numpy as np
import pytest

from apa_cli.pool import Pool
from apa_cli.randomness import Stream, make_generator
from tests.contract.algorithms import RIGHT, WRONG
from tests.contract.plain import list_rows

OVERRIDES = [
    "algo=hindsight",
    "iterations=6",
    "evaluation.every=3",
    "checkpoint.every=2",
    "checkpoint.keep_last=3",
    "checkpoint.keep_best=false",
]
POOL = "pools/hindsight/pool.jsonl"


def get_pool(trainer) -> Pool:
    return trainer.progress.algorithm["hindsight"]["pool"]


def test_rows_are_drawn_from_all_iterations_and_relabelled_by_what_they_achieved(make_contract_trainer):
    trainer = make_contract_trainer("algo=hindsight", "algo.rows=24", "update_epochs=1", "seed=3")
    tokenizer, results = trainer.rollout_builder.prompt_format.tokenizer, []
    for iteration in (1, 2, 3):
        results.append(trainer.run_phases(iteration))
        assert len(get_pool(trainer)) == 8 * iteration and len(results[-1].rollout) == 24
    pool = get_pool(trainer).rows(range(24))
    sampled = [row for result in results for row in zip(list_rows(result.sampled), result.sampled.scores, strict=True)]
    for row, ((prompt, response), score) in zip(pool, sampled, strict=True):
        assert row["tokens"] == response and row["score"] == float(score)
        assert tokenizer.decode(prompt) == RIGHT + row["example"]["prompt"]
    # the rows of the last iteration are drawn from the 24 in the pool by the seed and the iteration
    numbers = make_generator(3, Stream.process_rollout, 3).integers(0, 24, 24).tolist()
    mean, rollout, batch = float(np.mean([row["score"] for row in pool])), results[-1].rollout, results[-1].batch
    for i, ((prompt, response), (other, same)) in enumerate(
        zip(list_rows(rollout), list_rows(rollout.related["other_instruction/0"]), strict=True)
    ):
        number = numbers[i]
        text = pool[number]["example"]["prompt"]
        assert response == pool[number]["tokens"]
        is_good = pool[number]["score"] >= mean
        assert tokenizer.decode(prompt) == (RIGHT if is_good else WRONG) + text
        assert tokenizer.decode(other) == (WRONG if is_good else RIGHT) + text and same == response
        trained = batch.masks["policy"][i]
        first = int(trained.nonzero().min())
        assert trained[first : len(response)].all() and not trained[:first].any()
    assert {number // 8 for number in numbers} == {0, 1, 2}  # rows of all iterations
    assert {int(mask.nonzero().min()) for mask in batch.masks["policy"]} > {0, 1}
    assert not rollout.on_policy.any()
    assert not [name for name in results[-1].metrics if name.startswith(("kl/", "policy/ratio", "policy/sampler_gap"))]
    assert {"policy/entropy", "reward/mean"} <= results[-1].metrics.keys()  # of the responses as they were sampled


@pytest.mark.slow
def test_a_fork_copies_the_prefix_of_the_pool_and_leaves_the_source_alone(train_contract, tmp_path, comparable):
    source = train_contract(tmp_path / "source", *OVERRIDES)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    fork = train_contract(tmp_path / "fork", *OVERRIDES, f"fork={source}/checkpoints/iteration_000002", "seed=0")
    other = train_contract(tmp_path / "other", *OVERRIDES, f"fork={source}/checkpoints/iteration_000002", "seed=1")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    lines = [(run / POOL).read_text().splitlines() for run in (source, fork, other)]
    assert [len(rows) for rows in lines] == [48, 48, 48]
    assert lines[0] == lines[1] and lines[0][:16] == lines[2][:16]
    assert len(set(lines[0][16:]) & set(lines[2][16:])) < 8  # its own responses; a few are empty, hence equal
    assert comparable(fork / "metrics.jsonl") == comparable(source / "metrics.jsonl")
    state = json.loads((fork / "checkpoints" / "iteration_000006" / "state.json").read_text())
    assert state["algorithm"]["hindsight"]["pool"] == {"__pool__": "hindsight/pool", "length": 48}
    # a fork of the fork, whose files are its own
    shutil.rmtree(source)
    again = train_contract(tmp_path / "again", *OVERRIDES, f"fork={fork}/checkpoints/iteration_000004")
    assert (again / POOL).read_text() == (fork / POOL).read_text()
