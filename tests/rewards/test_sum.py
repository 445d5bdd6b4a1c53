"""reward=sum: weights apply to the sum, not to the parts' own scores."""

import pytest

from apa_cli.errors import ConfigError, UserError
from apa_cli.rewards.base import NamedReward, Placement, add_score_check, show_model_input
from apa_cli.rewards.ensemble import EnsembleReward, Reduction
from apa_cli.rewards.function import FunctionReward
from apa_cli.rewards.model import ModelReward
from apa_cli.rewards.sum import SumReward
from apa_cli.settings import RewardFormat

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
def make_part(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return lambda name, weight: NamedReward(name, weight, FunctionReward(f"{tmp_path}/mine.py:{name}", None))


def score(*parts):
    return add_score_check(SumReward(list(parts)).load(Placement("cpu", "float32")))(*TEXTS)


def test_the_sum_is_weighted_and_the_parts_are_not(make_part):
    scores = score(make_part("length", 2.0), make_part("topic", -0.5))
    assert scores.values == [2 * 3 - 0.5 * 3, 2 * 1 - 0.5 * 5]
    assert scores.parts == {"length": [3, 1], "topic": [3, 5]}


def test_nested_parts_are_named_by_both_names(make_part):
    inner = NamedReward("both", 10.0, SumReward([make_part("length", 2.0), make_part("topic", 1.0)]))
    scores = score(inner, make_part("length", 1.0))
    assert scores.values == [10 * (2 * 3 + 3) + 3, 10 * (2 * 1 + 5) + 1]
    assert scores.parts == {"both": [9, 7], "both/length": [3, 1], "both/topic": [3, 5], "length": [3, 1]}


def test_an_error_begins_with_the_parts_name(make_part, tmp_path):
    with pytest.raises(UserError, match=r"^broken: reward: expected finite scores, got nan for response 0"):
        score(make_part("length", 1.0), make_part("broken", 1.0))
    absent = NamedReward(
        "classifier", 1.0, ModelReward(str(tmp_path / "absent"), 0, 1.0, False, None, 8, 64, RewardFormat.auto)
    )
    with pytest.raises(UserError, match=r"^classifier: reward\.path: "):
        score(absent)


def test_a_trained_model_fills_the_parts_that_need_it(make_part):
    without_path, with_path = (
        ModelReward(path, 0, 1.0, False, None, 8, 64, RewardFormat.auto) for path in (None, "mine")
    )
    reward = SumReward(
        [NamedReward("a", 1.0, without_path), NamedReward("b", 2.0, with_path), make_part("length", 3.0)]
    )
    assert reward.needs_trained_model and not SumReward([make_part("length", 1.0)]).needs_trained_model
    trained = reward.use_trained_model("trained")
    assert not trained.needs_trained_model
    assert [part.reward.path for part in trained.parts[:2]] == ["trained", "mine"]
    assert [(part.name, part.weight) for part in trained.parts] == [("a", 1.0), ("b", 2.0), ("length", 3.0)]


def test_an_empty_sum_is_refused():
    with pytest.raises(ConfigError, match="parts needs at least one reward"):
        SumReward([])


def test_the_texts_of_all_models_are_shown_under_their_names(classifier, make_part):
    model = ModelReward(str(classifier), 0, 1.0, False, None, 8, 64, RewardFormat.auto)
    ensemble = EnsembleReward(
        [str(classifier)] * 2, Reduction.mean, 0.0, 0, 1.0, False, None, 8, 64, RewardFormat.plain
    )
    inner = SumReward([NamedReward("several", 1.0, ensemble)])
    reward = SumReward([NamedReward("one", 1.0, model), make_part("length", 1.0), NamedReward("inner", 1.0, inner)])
    score = add_score_check(reward.load(Placement("cpu", "float32")))
    names = ("one", "inner/several/model_1", "inner/several/model_2")
    assert show_model_input(score, "Tea?", " Yes.", {}) == dict.fromkeys(names, "Tea? Yes.")
    assert show_model_input(len, "Tea?", " Yes.", {}) == {}
