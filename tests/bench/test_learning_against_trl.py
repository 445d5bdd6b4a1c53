"""Interpolation and paired differences of the learning benchmark, by hand."""

import math
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "learning_against_trl.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("kls", "target", "weights"),
    [
        # 4 is a third of the way from 3 to 6, whatever the order of the runs
        ([6.0, 1.0, 3.0], 4.0, [1 / 3, 0, 2 / 3]),
        ([1.0, 3.0, 6.0], 1.5, [3 / 4, 1 / 4, 0]),
        ([1.0, 3.0], 3.0, [0, 1]),
        ([1.0, 3.0], 3.1, None),
        ([1.0, 3.0], 0.9, None),
        ([3.0], 3.0, None),
    ],
)
def test_weights_of_the_runs_next_to_the_target(script, kls, target, weights):
    found = script["find_weights"](kls, target)
    assert found is None if weights is None else found == pytest.approx(weights, rel=1e-12)


def test_every_prompt_is_interpolated_by_the_same_weights(script):
    runs = [{"kl": 2.0, "scores": [1.0, 5.0]}, {"kl": 6.0, "scores": [3.0, 4.0]}]
    # 5 is three quarters of the way: 1 + ¾ · 2, 5 − ¾ · 1
    assert script["interpolate_scores"](runs, 5.0) == pytest.approx([2.5, 4.25], rel=1e-12)
    assert script["interpolate_scores"](runs, 7.0) is None


def test_interval_of_three_values(script):
    # mean 3, deviations −2, 0, 2, variance 8 / 2: half width 4.303 · 2 / √3
    assert script["compute_interval"]([1.0, 3.0, 5.0]) == pytest.approx((3.0, 4.303 * 2 / math.sqrt(3)), rel=1e-12)
    mean, half = script["compute_interval"]([7.0])
    assert mean == 7.0 and math.isnan(half)
    texts = [script["format_interval"](script["compute_interval"](values)) for values in ([1.0, 3.0, 5.0], [7.0], [])]
    assert texts == ["3.000 ± 4.969", "7.000", ""]


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (7, 2.365), (15, 2.131), (16, 2.120), (30, 2.042), (255, 1.969)]
)
def test_t_quantiles_are_the_tables(script, degrees, quantile):
    assert script["get_t_quantile"](degrees) == pytest.approx(quantile, rel=2e-3)


def test_differences_count_common_seeds_over_seeds_and_over_prompts(script):
    ours = {0: [2.0, 5.0], 1: [3.0, 6.0], 7: [9.0, 9.0]}
    trl = {0: [1.0, 5.0], 1: [0.0, 7.0], 5: [0.0, 0.0]}
    differences = script["compare_sides"](ours, trl)
    # By seed (1 + 0) / 2 and (3 − 1) / 2: mean ¾, deviation ¼√2, half width 12.706 · ¼√2 / √2
    assert differences["seeds"] == pytest.approx((0.75, 12.706 / 4), rel=1e-12)
    # By prompt (1 + 3) / 2 and (0 − 1) / 2: mean ¾, deviation 1.25√2, half width 12.706 · 1.25
    assert differences["prompts"] == pytest.approx((0.75, 12.706 * 1.25), rel=1e-12)
