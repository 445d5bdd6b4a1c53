"""The throw-away algorithms in two processes: the numbers of one, and equal weights and states on both ranks."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from apa_cli.distributed.spawn import spawn_processes
from apa_cli.distributed.world import SINGLE_PROCESS
from tests.contract.ranks import train_and_compare

pytestmark = pytest.mark.slow

RUNS = {
    "two_critics": ["algo=two_critics"],
    "two_critics_on_trunk": ["algo=two_critics", "critic=head", "microbatch_size=2"],
    "rows": ["algo=resized", "optimizer.lr_scheduler=linear"],
    "pair": ["algo=contrastive"],
    "four_related": ["algo=contrastive", "algo.contrast_count=4"],
    "pool": ["algo=hindsight"],
    "resets": ["algo=resets_ppo"],
    "offline_apa": ["algo=offline_apa"],
    "offline_dpo": ["algo=offline_dpo"],
    "ilql": ["algo=ilql", "optimizer.critic_lr=1e-2"],
    "a2po": ["algo=a2po", "plan.init_samples=3"],
    "reference_text": ["algo=reference_text"],
    "some_scores": ["algo=offline_apa", "rollout_batch_size=2", "minibatch_size=2", "microbatch_size=2"],
}
"""Run → its overrides. Under "some_scores" one rank may have a response with a logged score, the other one without."""
COMMON = ["iterations=4", "evaluation.every=2", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def list_overrides(logged_data, half_scored_data, small_overrides):
    """list_overrides(name) → all overrides of a run."""
    function = next(text for text in small_overrides if text.startswith("reward.target=")).partition("=")[2]
    summed = ["reward=sum", "~reward.target", f"reward.parts=[{{use: function, target: {function}}}]"]

    def make(name: str) -> list[str]:
        data = {
            "some_scores": [*half_scored_data, *summed],
            "a2po": ["dataset.train_prompts=13"],  # 8 · 3 new responses of π_init in iteration 1, 5 · 3 in iteration 2
        }
        return [*RUNS[name], *COMMON, *data.get(name, logged_data)]

    return make


@pytest.fixture(scope="module")
def two_processes(list_overrides, make_contract_config, tmp_path_factory) -> Path:
    """The folder with the directory of each run in two processes, all of which run in the same two."""
    folder = tmp_path_factory.mktemp("two")
    runs = [(make_contract_config("launch.timeout=60", *list_overrides(name)), folder / name) for name in RUNS]
    with suppress(SystemExit):  # the tests of the runs that were not finished fail
        spawn_processes(runs[0][0].launch, 2, train_and_compare, runs)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_results_of_one(
    name, two_processes, list_overrides, make_contract_config, tmp_path, comparable, records
):
    two, one = two_processes / name, tmp_path / name
    assert (two / "ranks.json").is_file(), "the run failed, or one before it"
    train_and_compare(SINGLE_PROCESS, [(make_contract_config(*list_overrides(name)), one)])
    for row, expected in zip(comparable(two / "metrics.jsonl"), comparable(one / "metrics.jsonl"), strict=True):
        assert row.keys() == expected.keys()
        for metric, value in expected.items():
            # KL per response: a sum of up to 12 differences, each rounded.
            absolute = 8e-6 if metric in ("kl/sequence", "eval/kl_exact") else 1e-6
            assert row[metric] == pytest.approx(value, rel=1e-4, abs=absolute), metric
    texts = [
        [(row["iteration"], row["prompt"], row["response"], row["ending"]) for row in records(run / "samples.jsonl")]
        for run in (one, two)
    ]
    assert texts[0] == texts[1] and texts[0]


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_end_with_the_same_weights_and_states(name, two_processes):
    first, second = json.loads((two_processes / name / "ranks.json").read_text())
    assert [key for key in first if first[key] != second[key]] == []
