"""reward=sum: weights count in the sum and not in the parts."""

import pytest

from apa_cli.errors import ConfigError, UserError
from apa_cli.rewards.base import Part, Placement, checked
from apa_cli.rewards.function import FunctionReward
from apa_cli.rewards.model import ModelReward
from apa_cli.rewards.sum import SumReward

SOURCE = """\
def length(prompts, responses):
    return [len(response) for response in responses]

def topic(prompts, responses, topic):
    return [len(word) for word in topic]

def broken(prompts, responses):
    return [float("nan")] * len(responses)
"""
TEXTS = (["a", "b"], ["xyz", "x"], [{"topic": "tea"}, {"topic": "bread"}])


@pytest.fixture
def part(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return lambda name, weight: Part(name, weight, FunctionReward(f"{tmp_path}/mine.py:{name}", None))


def scored(*parts):
    return checked(SumReward(list(parts)).load(Placement("cpu", "float32")))(*TEXTS)


def test_the_sum_is_weighted_and_its_parts_are_not(part):
    scores = scored(part("length", 2.0), part("topic", -0.5))
    assert scores.values == [2 * 3 - 0.5 * 3, 2 * 1 - 0.5 * 5]
    assert scores.parts == {"length": [3, 1], "topic": [3, 5]}


def test_parts_of_parts_go_by_both_names(part):
    inner = Part("both", 10.0, SumReward([part("length", 2.0), part("topic", 1.0)]))
    scores = scored(inner, part("length", 1.0))
    assert scores.values == [10 * (2 * 3 + 3) + 3, 10 * (2 * 1 + 5) + 1]
    assert scores.parts == {"both": [9, 7], "both/length": [3, 1], "both/topic": [3, 5], "length": [3, 1]}


def test_an_error_names_the_part(part, tmp_path):
    with pytest.raises(UserError, match=r"^broken: reward: the score of response 0 is nan"):
        scored(part("length", 1.0), part("broken", 1.0))
    absent = Part("classifier", 1.0, ModelReward(str(tmp_path / "absent"), 0, 1.0, False, None, 8, 64))
    with pytest.raises(UserError, match=r"^classifier: reward\.path: "):
        scored(absent)


def test_the_parts_that_lack_a_model_get_the_one_that_is_trained(part):
    lacking, given = (ModelReward(path, 0, 1.0, False, None, 8, 64) for path in (None, "mine"))
    reward = SumReward([Part("a", 1.0, lacking), Part("b", 2.0, given), part("length", 3.0)])
    assert reward.lacks_model and not SumReward([part("length", 1.0)]).lacks_model
    trained = reward.with_model("trained")
    assert not trained.lacks_model
    assert [part.reward.path for part in trained.parts[:2]] == ["trained", "mine"]
    assert [(part.name, part.weight) for part in trained.parts] == [("a", 1.0), ("b", 2.0), ("length", 3.0)]


def test_no_parts():
    with pytest.raises(ConfigError, match="parts needs at least one reward"):
        SumReward([])
