"""reward=ensemble: mean, minimum and lower bound over models, and each model's own score."""

import pytest

from apa_cli.errors import ConfigError, UserError
from apa_cli.rewards.base import Placement, add_score_check
from apa_cli.rewards.ensemble import EnsembleReward, Reduction
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import RewardFormat

# 1, 2 and 6: mean 3; squared distances 4, 1 and 9, so the population deviation is √(14/3) = 2.160247.
SCORES = (1.0, 2.0, 6.0)


def make_ensemble(paths, reduce=Reduction.mean, deviations=1.0, output=0, scale=1.0):
    return EnsembleReward(
        [str(path) for path in paths], reduce, deviations, output, scale, False, None, 3, 64, RewardFormat.auto
    )


@pytest.mark.parametrize(
    ("reduce", "deviations", "expected"),
    [
        (Reduction.mean, 1.0, 3.0),
        (Reduction.min, 1.0, 1.0),
        (Reduction.lower, 1.0, 3 - 2.160247),
        (Reduction.lower, 0.5, 3 - 1.0801234),
        (Reduction.lower, 0.0, 3.0),
    ],
)
def test_reductions_by_hand(reduce, deviations, expected):
    assert make_ensemble(["a"], reduce, deviations).reduce_scores(SCORES) == pytest.approx(expected, abs=1e-6)


def test_the_lower_bound_of_a_single_model_is_its_score():
    assert make_ensemble(["a"], Reduction.lower, 5.0).reduce_scores((0.3,)) == 0.3


@pytest.fixture(scope="module")
def folders(make_classifier):
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return [make_classifier(seed, **names) for seed in (1, 2, 3)]


def test_each_models_scores_are_a_part(folders, texts, score_one_text):
    by_model = [[score_one_text(path, p + r, 1) for p, r, _ in zip(*texts, strict=True)] for path in folders]
    scores = make_ensemble(folders, Reduction.mean, output="good", scale=-2.0).load(Placement("cpu", "float32"))(*texts)
    assert list(scores.parts) == ["model_1", "model_2", "model_3"]
    for name, values in zip(scores.parts, by_model, strict=True):
        assert scores.parts[name] == pytest.approx([-2 * value for value in values], rel=0, abs=1e-5)
    mean = [-2 * sum(values) / 3 for values in zip(*by_model, strict=True)]
    assert scores.values == pytest.approx(mean, rel=0, abs=1e-5)


def test_the_minimum_is_taken_after_scaling(folders, texts, score_one_text):
    by_model = [[score_one_text(path, p + r, 0) for p, r, _ in zip(*texts, strict=True)] for path in folders]
    scores = make_ensemble(folders, Reduction.min, scale=-1.0).load(Placement("cpu", "float32"))(*texts)
    assert scores.values == pytest.approx([-max(values) for values in zip(*by_model, strict=True)], rel=0, abs=1e-5)


def test_a_nan_of_one_model_is_reported(monkeypatch):
    values = iter([[1.0, 2.0], [float("nan"), 3.0]])

    def load(reward, placement):
        scores = next(values)
        return lambda *texts: scores

    monkeypatch.setattr(ModelReward, "load", load)
    score = add_score_check(make_ensemble(["a", "b"], Reduction.min).load(Placement("cpu", "float32")))
    with pytest.raises(UserError, match="got nan for response 0"):
        score(["p", "p"], ["x", "y"], [{}, {}])


def test_an_empty_list_of_models_is_refused():
    with pytest.raises(ConfigError, match="paths needs at least one model"):
        make_ensemble([])
