"""reward=ensemble: mean, minimum and lower bound over models, each model's score beside it."""

import pytest

from apa_cli.errors import ConfigError, UserError
from apa_cli.rewards.base import Placement, checked
from apa_cli.rewards.ensemble import EnsembleReward, Reduce
from apa_cli.rewards.model import ModelReward

# 1, 2 and 6: mean 3; squared distances 4, 1 and 9, so the population deviation is √(14/3) = 2.160247.
SCORES = (1.0, 2.0, 6.0)


def ensemble(paths, reduce=Reduce.mean, deviations=1.0, output=0, scale=1.0):
    return EnsembleReward([str(path) for path in paths], reduce, deviations, output, scale, False, None, 3, 64)


@pytest.mark.parametrize(
    ("reduce", "deviations", "expected"),
    [
        (Reduce.mean, 1.0, 3.0),
        (Reduce.min, 1.0, 1.0),
        (Reduce.lower, 1.0, 3 - 2.160247),
        (Reduce.lower, 0.5, 3 - 1.0801234),
        (Reduce.lower, 0.0, 3.0),
    ],
)
def test_three_scores_become_one(reduce, deviations, expected):
    assert ensemble(["a"], reduce, deviations).reduced(SCORES) == pytest.approx(expected, abs=1e-6)


def test_a_single_model_has_no_deviation():
    assert ensemble(["a"], Reduce.lower, 5.0).reduced((0.3,)) == 0.3


@pytest.fixture(scope="module")
def folders(make_classifier):
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return [make_classifier(seed, **names) for seed in (1, 2, 3)]


def test_each_model_scores_and_is_a_part(folders, texts, by_hand):
    own = [[by_hand(path, p + r, 1) for p, r, _ in zip(*texts, strict=True)] for path in folders]
    scores = ensemble(folders, Reduce.mean, output="good", scale=-2.0).load(Placement("cpu", "float32"))(*texts)
    assert list(scores.parts) == ["model_1", "model_2", "model_3"]
    for name, values in zip(scores.parts, own, strict=True):
        assert scores.parts[name] == pytest.approx([-2 * value for value in values], rel=0, abs=1e-5)
    mean = [-2 * sum(values) / 3 for values in zip(*own, strict=True)]
    assert scores.values == pytest.approx(mean, rel=0, abs=1e-5)


def test_the_minimum_is_over_models_after_scaling(folders, texts, by_hand):
    own = [[by_hand(path, p + r, 0) for p, r, _ in zip(*texts, strict=True)] for path in folders]
    scores = ensemble(folders, Reduce.min, scale=-1.0).load(Placement("cpu", "float32"))(*texts)
    assert scores.values == pytest.approx([-max(values) for values in zip(*own, strict=True)], rel=0, abs=1e-5)


def test_a_score_that_is_no_number_is_not_hidden_by_the_others(monkeypatch):
    values = iter([[1.0, 2.0], [float("nan"), 3.0]])

    def load(reward, place):
        own = next(values)
        return lambda *texts: own

    monkeypatch.setattr(ModelReward, "load", load)
    score = checked(ensemble(["a", "b"], Reduce.min).load(Placement("cpu", "float32")))
    with pytest.raises(UserError, match="score of response 0 is nan"):
        score(["p", "p"], ["x", "y"], [{}, {}])


def test_no_models():
    with pytest.raises(ConfigError, match="paths needs at least one model"):
        ensemble([])
