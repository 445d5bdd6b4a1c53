"""The check of a reward's result: one finite number per response, or a one-line error."""

import itertools
from decimal import Decimal

import numpy as np
import pytest
import torch

from apa_cli.errors import UserError
from apa_cli.rewards.base import Scores, add_score_check
from apa_cli.rewards.function import FunctionReward

RESPONSES = ["one", "two", "a third\nreply"]


def check_result(result):
    return add_score_check(lambda prompts, responses, columns: result)(["p"] * 3, RESPONSES, [{}] * 3)


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, True],
        (1, 2.5, 1),
        np.array([1, 2.5, 1]),
        torch.tensor([1, 2.5, 1]),
        map(float, ["1", "2.5", "1"]),
        [np.float32(1), torch.tensor(2.5), np.bool_(True)],
        torch.tensor([[1], [2.5], [1]], dtype=torch.bfloat16),
        [Decimal(1), Decimal("2.5"), np.array([1.0])],
    ],
    ids=["list", "tuple", "array", "tensor", "iterator", "scalars", "column", "others"],
)
def test_any_sequence_of_numbers_becomes_floats(result):
    scores = check_result(result).values
    assert scores == [1.0, 2.5, 1.0] and all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "got 2 for 3 responses"),
        ([1.0] * 4, "got 4 for 3 responses"),
        ([], "got 0 for 3 responses"),
        ([0.0, float("nan"), 0.0], "got nan for response 1: 'two'"),
        ([0.0, 0.0, float("-inf")], r"got -inf for response 2: 'a third\\nreply'"),
        (None, "one number per response, got NoneType"),
        (0.5, "one number per response, got float"),
        (["good", "bad", "ugly"], "one number per response, got 'good' for response 0: 'one'"),
        ([1.0, "2", 3.0], "one number per response, got '2' for response 1: 'two'"),
        ([1.0, None, 2.0], "one number per response, got None for response 1: 'two'"),
        ([[1.0], [2.0, 3.0], [4.0]], "one number per response, got list with list for response 0"),
        ([1.0, 2 + 0j, 4.0], "one number per response, got list with complex for response 1"),
        ([1.0, 10**400, 4.0], "one number per response, got list with int for response 1"),
        ("123", "one number per response, got str"),
        (b"123", "one number per response, got bytes"),
        ({1: 0.5, 2: 0.5, 3: 0.5}, "one number per response, got dict; return the list of its values"),
        ({1.0, 2.0, 3.0}, "one number per response, got set"),
        (itertools.count(), "got 4 for 3 responses"),
        (map(float, ["1", "x", "3"]), r"one number per response, got map \(ValueError"),
        (torch.zeros(3, 2), "one number per response, got Tensor"),
    ],
)
def test_other_results_are_refused_in_one_line(result, message):
    with pytest.raises(UserError, match=message) as error:
        check_result(result)
    assert "\n" not in str(error.value)


def test_token_scores_pass_the_check_as_floats():
    scores = check_result(Scores([1, 2, 3], {}, [[1, True], np.array([0.5]), torch.tensor([2, 0.25])]))
    assert scores == Scores([1.0, 2.0, 3.0], {}, [[1.0, 1.0], [0.5], [2.0, 0.25]])
    assert all(type(value) is float for row in scores.token_scores for value in row)
    assert check_result([1, 2, 3]).token_scores is None


@pytest.mark.parametrize(
    ("token_scores", "message"),
    [
        ([[1.0], [2.0]], "one list of token scores per response, got 2 for 3 responses"),
        ([], "one list of token scores per response, got 0 for 3 responses"),
        ([[1.0], [2.0, float("inf")], [3.0]], r"finite token scores, got \[2.0, inf\] for response 1"),
        ([[1.0], 2.0, [3.0]], r"a list of token scores for response 1 \('float' object is not iterable\)"),
        ([[1.0], [2.0], ["x"]], "a list of token scores for response 2"),
    ],
)
def test_other_token_scores_are_refused_in_one_line(token_scores, message):
    with pytest.raises(UserError, match=message) as error:
        check_result(Scores([1.0, 2.0, 3.0], {}, token_scores))
    assert "\n" not in str(error.value)


def test_a_reward_needs_no_trained_model_by_default():
    reward = FunctionReward("file.py:name", None)
    assert not reward.needs_trained_model
    with pytest.raises(TypeError, match="FunctionReward takes no model"):
        reward.use_trained_model("folder")
