"""Pairs: two responses of a prompt become one row, whatever the order of the rows."""

import math

import pytest
import torch

from apa_cli.algorithms.pairs import PAIR_MASK, SECOND_SCORE, fold_pairs, log_ratio_difference
from apa_cli.types import PolicyOutput, Rollout, Sequences
from tests.builders import make_batch, make_mask, make_rollout, make_sequences


def make_samples(groups: list[int], scores: list[float], **fields) -> Rollout:
    """Return a rollout whose row i has i + 1 tokens, all of them i, and log-probs −i under the sampler."""
    n = len(groups)
    lengths = list(range(1, n + 1))
    number = torch.arange(n).unsqueeze(1)
    mask = make_mask(lengths)
    defaults = {
        "prompt_ids": torch.tensor(groups).unsqueeze(1),
        "response_ids": number.expand(n, n) * mask,
        "groups": torch.tensor(groups),
        "scores": torch.tensor(scores),
        "logprobs": {"sampler": -1.0 * number * mask},
        "responses": [f"response {i}" for i in range(n)],
        "extra": {"number": torch.arange(n)},
    }
    return make_rollout(mask, **{**defaults, **fields})


def list_pairs(rollout: Rollout, name: str = "second") -> list[tuple[int, int]]:
    """Return the numbers in `make_samples` of each row's two responses, from their lengths less 1."""
    lengths = (rollout.mask.sum(-1) - 1, rollout.related[name].mask.sum(-1) - 1)
    return list(zip(*(length.tolist() for length in lengths), strict=True))


def test_samples_2k_and_2k_plus_1_of_a_prompt_make_a_pair():
    rollout = make_samples([0, 0, 0, 0, 1, 1], [5.0, 1.0, 2.0, 3.0, 4.0, 4.0])
    pairs = fold_pairs(rollout, "second")
    assert list_pairs(pairs) == [(0, 1), (2, 3), (4, 5)]
    assert pairs.responses == ["response 0", "response 2", "response 4"]
    assert pairs.scores.tolist() == [5.0, 2.0, 4.0]
    assert pairs.extra[SECOND_SCORE].tolist() == [1.0, 3.0, 4.0]
    assert pairs.extra["number"].tolist() == [0, 2, 4]
    assert pairs.masks[PAIR_MASK].tolist() == [True, True, True]  # equal scores count unless pairs are ranked


def test_the_second_response_keeps_tokens_masks_and_log_probs():
    on_policy = make_mask([0, 1, 0, 2], width=4)
    rollout = make_samples([0, 0, 1, 1], [0.0] * 4, on_policy=on_policy)
    second = fold_pairs(rollout, "other").related["other"]
    assert type(second) is Sequences
    assert second.prompt_ids.tolist() == [[0], [1]]
    assert second.prompt_mask.tolist() == [[True], [True]]
    assert second.response_ids.tolist() == [[1, 1, 0, 0], [3, 3, 3, 3]]
    assert second.mask.tolist() == make_mask([2, 4]).tolist()
    assert second.on_policy.tolist() == make_mask([1, 2], width=4).tolist()
    assert second.logprobs["sampler"].tolist() == [[-1.0, -1.0, 0.0, 0.0], [-3.0] * 4]


def test_the_better_response_comes_first_and_ties_do_not_count():
    rollout = make_samples([0, 0, 1, 1, 2, 2], [1.0, 2.0, 7.0, 7.0, 4.0, 3.0])
    pairs = fold_pairs(rollout, "rejected", better_first=True)
    assert list_pairs(pairs, "rejected") == [(1, 0), (2, 3), (4, 5)]
    assert pairs.responses == ["response 1", "response 2", "response 4"]
    assert pairs.scores.tolist() == [2.0, 7.0, 4.0]
    assert pairs.extra[SECOND_SCORE].tolist() == [1.0, 7.0, 3.0]
    assert pairs.masks[PAIR_MASK].tolist() == [True, False, True]


def test_scattered_rows_of_a_prompt_pair_in_their_order():
    # prompt 0 has rows 1, 4, 6, 7, prompt 3 rows 0, 2, prompt 2 rows 3, 5; pairs come by prompt
    rollout = make_samples([3, 0, 3, 2, 0, 2, 0, 0], [0.0] * 8)
    pairs = fold_pairs(rollout, "second")
    assert list_pairs(pairs) == [(1, 4), (6, 7), (3, 5), (0, 2)]
    assert pairs.groups.tolist() == [0, 0, 2, 3]


def test_an_odd_number_of_responses_is_an_error():
    # six rows in all, yet three of either prompt
    with pytest.raises(ValueError, match="samples_per_prompt: pairs need an even number"):
        fold_pairs(make_samples([0, 0, 0, 1, 1, 1], [0.0] * 6), "second")


def test_a_rollout_without_rows_has_no_pairs():
    empty = make_samples([0, 0], [0.0, 0.0]).select_rows(torch.tensor([], dtype=torch.int64))
    for better_first in (False, True):
        pairs = fold_pairs(empty, "second", better_first)
        assert len(pairs) == len(pairs.related["second"]) == len(pairs.masks[PAIR_MASK]) == 0


def test_an_earlier_related_sequence_goes_with_its_row():
    chosen = make_sequences([[1]] * 4, [[5], [6], [7], [8]])
    pairs = fold_pairs(make_samples([0, 0, 1, 1], [0.0, 1.0, 1.0, 0.0], related={"chosen": chosen}), "second", True)
    assert pairs.related["chosen"].response_ids.tolist() == [[6], [7]]


def make_pair(junk: float = 0.0):
    """Return a batch of a response of 2 tokens and one of 3, with an output, and `junk` in the padding."""
    tokens, other = make_sequences([[1]], [[2, 3]], right=2), make_sequences([[1]], [[4, 5, 6]], right=1)
    reference = torch.tensor([[-1.0, -2.0, junk, junk]])
    other = other.replace(logprobs={"reference": torch.tensor([[-1.0, -1.0, -3.0, junk]])})
    batch = make_batch(tokens, logprobs={"reference": reference}, related={"second": other})
    logprobs = torch.tensor([[-0.5, -1.75, junk, junk]], requires_grad=True)
    second = PolicyOutput(torch.tensor([[-2.0, -0.5, -3.0, junk]], requires_grad=True), {})
    return batch, PolicyOutput(logprobs, {}, related={"second": second})


@pytest.mark.parametrize("junk", [0.0, 50.0, math.inf, math.nan])
def test_difference_of_log_ratios_by_hand(junk):
    # (0.5 + 0.25) − (−1 + 0.5 + 0) = 1.25, and its gradient is 1 on the first's tokens and −1 on the second's
    batch, output = make_pair(junk)
    difference = log_ratio_difference(batch, output, "second", "reference")
    assert difference.tolist() == [1.25]
    leaves = (output.logprobs, output.related["second"].logprobs)
    first, second = torch.autograd.grad(difference.sum(), leaves)
    assert first.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert second.tolist() == [[-1.0, -1.0, -1.0, 0.0]]


def test_log_probs_that_were_not_computed_are_named():
    batch, output = make_pair()
    with pytest.raises(ValueError, match="logprobs 'old': not computed"):
        log_ratio_difference(batch, output, "second", "old")
