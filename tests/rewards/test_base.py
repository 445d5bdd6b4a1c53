"""Whatever a reward returns, the run gets one finite number per response, or one line on what is wrong."""

import numpy as np
import pytest
import torch

from apa_cli.errors import UserError
from apa_cli.rewards.base import checked
from apa_cli.rewards.function import FunctionReward

RESPONSES = ["one", "two", "a third\nreply"]


def scored(result):
    return checked(lambda prompts, responses, columns: result)(["p"] * 3, RESPONSES, [{}] * 3)


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, True],
        (1, 2.5, 1),
        np.array([1, 2.5, 1]),
        torch.tensor([1, 2.5, 1]),
        map(float, ["1", "2.5", "1"]),
    ],
    ids=["list", "tuple", "array", "tensor", "iterator"],
)
def test_any_sequence_of_numbers_becomes_floats(result):
    scores = scored(result).values
    assert scores == [1.0, 2.5, 1.0] and all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "3 responses were given, 2 scores came back"),
        ([1.0] * 4, "3 responses were given, 4 scores came back"),
        ([], "3 responses were given, 0 scores came back"),
        ([0.0, float("nan"), 0.0], "score of response 1 is nan: 'two'"),
        ([0.0, 0.0, float("-inf")], r"score of response 2 is -inf: 'a third\\nreply'"),
        (None, "one number per response, got NoneType"),
        (0.5, "one number per response, got float"),
        (["good", "bad", "ugly"], "one number per response, got list"),
        ([None, 1.0, 2.0], "one number per response, got list"),
        ([[1.0], [2.0, 3.0], [4.0]], "one number per response, got list"),
        (torch.zeros(3, 2), "one number per response, got Tensor"),
    ],
)
def test_anything_else_is_one_line_that_names_it(result, message):
    with pytest.raises(UserError, match=message) as error:
        scored(result)
    assert "\n" not in str(error.value)


def test_a_reward_needs_no_model_unless_it_says_so():
    reward = FunctionReward("file.py:name", None)
    assert not reward.lacks_model
    with pytest.raises(TypeError, match="FunctionReward takes no model"):
        reward.with_model("folder")
