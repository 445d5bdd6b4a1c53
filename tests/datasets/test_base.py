"""The order in which a run goes through its prompts."""

import pytest

from apa_cli.datasets.base import PromptForm, is_held_out, positions
from apa_cli.datasets.prompts import PromptFile


@pytest.mark.parametrize("size", [1, 7, 10])
def test_each_pass_is_a_permutation(size):
    for number in range(4):
        assert sorted(positions(number * size, size, size, seed=0)) == list(range(size))


def test_passes_have_orders_of_their_own_and_seeds_too():
    passes = [tuple(positions(number * 50, 50, 50, seed)) for seed in (0, 1) for number in range(3)]
    assert len(set(passes)) == 6


@pytest.mark.parametrize(("start", "count"), [(0, 23), (3, 4), (5, 2), (6, 9), (7, 7), (13, 16), (20, 0)])
def test_any_stretch_is_a_slice_of_the_whole(start, count):
    whole = positions(0, 40, 7, seed=5)
    assert positions(start, count, 7, seed=5) == whole[start : start + count]


def test_a_stretch_longer_than_the_data_goes_round():
    rows = positions(0, 25, 10, seed=1)
    assert len(rows) == 25 and sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))


def test_prompts_are_formatted_as_suits_the_model_unless_the_data_set_says_otherwise():
    assert PromptFile("x", 2, "", "", []).prompt_form is PromptForm.auto


@pytest.mark.parametrize("every", [2, 4, 10])
def test_one_prompt_of_each_stretch_is_held_out_at_a_place_that_changes(every):
    places = [[is_held_out(stretch * every + i + 1, every) for i in range(every)] for stretch in range(400)]
    assert all(sum(stretch) == 1 for stretch in places)
    counts = [sum(stretch[i] for stretch in places) for i in range(every)]
    # binomial with mean 400 / every: within four deviations
    assert all(abs(count - 400 / every) < 4 * (400 / every) ** 0.5 for count in counts)
