"""Kept responses by hand: what is added comes back for each prompt, also after a resume."""

from dataclasses import replace

import pytest
import torch

from apa_cli.pool import Pool
from apa_cli.training.responses_per_prompt import ResponsesPerPrompt
from apa_cli.types import Prompt, Rollout, RolloutPlan
from tests.builders import EOS, build_word_tokenizer, make_rollout, make_sampling_settings, make_sequences

INIT = RolloutPlan("init", samples=2, once_per_prompt=True)
GUIDE = RolloutPlan("guide", samples=1, once_per_prompt=True)
SETTINGS = make_sampling_settings(max_new_tokens=4)


def make_scored(rows: list[int], responses: list[list[int]], scores: list[float]) -> Rollout:
    """Return scored responses to the prompts of these rows; the log-prob of token n is −n / 8."""
    tokens = make_sequences([[1]] * len(rows), responses)
    return make_rollout(
        **{**vars(tokens), "logprobs": {"sampler": -tokens.response_ids / 8.0}},
        endings=["eos" if response[-1] == EOS else "length" for response in responses],
        example_index=torch.tensor(rows), scores=torch.tensor(scores),
    )  # fmt: skip


@pytest.fixture
def kept() -> ResponsesPerPrompt:
    """Two responses of π_init to row 7 and row 4 each, and one of the guide to row 7."""
    kept = ResponsesPerPrompt()
    kept.add(INIT, make_scored([7, 7, 4, 4], [[2, 3, EOS], [5], [6, 7, 8, 9], [EOS]], [0.5, -1.0, 2.0, 0.1]))
    kept.add(GUIDE, make_scored([7], [[9, 9, EOS]], [3.0]))
    return kept


def make_prompt(row: int, place: int) -> Prompt:
    return Prompt(f"prompt {row}", [1] * (1 + row % 3), place, 0, {"row": row}, example_index=row)


def assert_rows(kept: ResponsesPerPrompt) -> None:
    prompts = [make_prompt(4, 0), make_prompt(7, 1), make_prompt(4, 2)]
    rollout = kept.build_rollout(INIT, prompts, build_word_tokenizer(), SETTINGS)
    responses = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]
    assert responses == [[6, 7, 8, 9], [EOS], [2, 3, EOS], [5], [6, 7, 8, 9], [EOS]]
    assert rollout.scores.tolist() == torch.tensor([2.0, 0.1, 0.5, -1.0, 2.0, 0.1]).tolist()  # float32 to the bit
    assert torch.equal(rollout.logprobs["sampler"], -(rollout.response_ids / 8.0) * rollout.mask)
    assert rollout.endings == ["length", "eos", "eos", "length", "length", "eos"]
    assert rollout.groups.tolist() == [0, 0, 1, 1, 2, 2] and rollout.example_index.tolist() == [4, 4, 7, 7, 4, 4]
    assert [column["row"] for column in rollout.columns] == [4, 4, 7, 7, 4, 4]
    assert [text.split() for text in rollout.responses[:3]] == [["g", "h", "i", "j"], [], ["c", "d"]]
    assert rollout.prompt_mask.sum(-1).tolist() == [2] * 6 and not rollout.on_policy.any()
    assert rollout.plans == (INIT,)
    (guide,) = kept.build_rollout(GUIDE, [make_prompt(7, 0)], build_word_tokenizer(), SETTINGS).response_ids.tolist()
    assert guide == [9, 9, EOS]


def test_kept_responses_come_back_for_each_prompt(kept):
    assert_rows(kept)


def test_responses_are_known_by_sampler_and_row(kept):
    assert [kept.has(INIT, row) for row in (7, 4, 5)] == [True, True, False]
    assert [kept.has(GUIDE, row) for row in (7, 4, 5)] == [True, False, False]


def test_a_resumed_run_has_the_rows_of_its_pool(kept, tmp_path):
    kept.pool.save(tmp_path / "kept.jsonl")
    resumed = ResponsesPerPrompt(Pool.read(tmp_path / "kept.jsonl", 5))
    assert_rows(resumed)
    earlier = ResponsesPerPrompt(Pool.read(tmp_path / "kept.jsonl", 4))
    assert earlier.has(INIT, 4) and not earlier.has(GUIDE, 7)
    earlier.add(GUIDE, make_scored([4], [[3]], [1.0]))
    assert earlier.has(GUIDE, 4) and earlier.pool.length == 5


def test_responses_are_cut_at_the_limit_of_the_present_run(kept):
    """A fork may have a lower limit: EOS is cut off, and the response ends by its length."""
    short = replace(SETTINGS, max_new_tokens=2)
    rollout = kept.build_rollout(INIT, [make_prompt(7, 0)], build_word_tokenizer(), short)
    assert rollout.response_ids.tolist() == [[2, 3], [5, 0]] and rollout.endings == ["length", "length"]


def test_responses_of_other_settings_stay_in_the_pool_and_are_not_used(kept):
    forked = ResponsesPerPrompt(kept.pool, "another reward")
    assert not forked.has(INIT, 7)
    forked.add(INIT, make_scored([7], [[8, EOS]], [100.0]))
    rollout = forked.build_rollout(INIT, [make_prompt(7, 0)], build_word_tokenizer(), SETTINGS)
    assert rollout.scores.tolist() == [100.0] and len(kept.pool) == 6
    assert ResponsesPerPrompt(kept.pool).has(INIT, 7) and ResponsesPerPrompt(kept.pool, "another reward").has(INIT, 7)
