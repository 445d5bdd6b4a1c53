"""The order in which a run goes through its prompts, and the held-out split."""

import pytest

from apa_cli.datasets.base import PromptStyle, is_held_out, shuffle_rows
from apa_cli.datasets.prompts import PromptFile


@pytest.mark.parametrize("size", [1, 7, 10])
def test_each_epoch_is_a_permutation(size):
    for epoch in range(4):
        assert sorted(shuffle_rows(epoch * size, size, size, seed=0)) == list(range(size))


def test_order_depends_on_epoch_and_seed():
    epochs = [tuple(shuffle_rows(epoch * 50, 50, 50, seed)) for seed in (0, 1) for epoch in range(3)]
    assert len(set(epochs)) == 6


@pytest.mark.parametrize(("start", "count"), [(0, 23), (3, 4), (5, 2), (6, 9), (7, 7), (13, 16), (20, 0)])
def test_any_range_is_a_slice_of_the_whole(start, count):
    whole = shuffle_rows(0, 40, 7, seed=5)
    assert shuffle_rows(start, count, 7, seed=5) == whole[start : start + count]


def test_a_range_longer_than_the_data_continues_in_the_next_epoch():
    rows = shuffle_rows(0, 25, 10, seed=1)
    assert len(rows) == 25 and sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))


def test_default_prompt_style_is_auto():
    assert PromptFile("x", 2, "", "", []).prompt_style is PromptStyle.auto


@pytest.mark.parametrize("every", [2, 4, 10])
def test_one_prompt_per_group_is_held_out_at_a_uniform_position(every):
    groups = [[is_held_out(group * every + i + 1, every) for i in range(every)] for group in range(400)]
    assert all(sum(group) == 1 for group in groups)
    counts = [sum(group[i] for group in groups) for i in range(every)]
    # binomial with mean 400 / every: within four standard deviations
    assert all(abs(count - 400 / every) < 4 * (400 / every) ** 0.5 for count in counts)
