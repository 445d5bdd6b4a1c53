"""dataset=story_openings."""

import pytest

from apa_cli.datasets.story_openings import NAMES, OPENINGS, PLACES, StoryOpenings
from apa_cli.errors import UserError

ALL = len(NAMES) * len(OPENINGS) * len(PLACES)


def prompts(split, train=40, test=8, seed=0):
    return [example.prompt for example in StoryOpenings(train, test, seed, []).load(split)]


def test_splits_have_their_sizes_and_share_nothing():
    train, test = prompts("train"), prompts("test")
    assert (len(train), len(test)) == (40, 8) and len({*train, *test}) == 48


def test_the_rows_depend_on_the_data_seed_alone():
    assert prompts("train") == prompts("train") and prompts("test") == prompts("test")
    assert prompts("train") != prompts("train", seed=1)
    assert prompts("test", train=10) == prompts("test", train=100)
    assert prompts("train", train=10) == prompts("train", train=100)[:10]


def test_names_and_places_stand_in_the_openings():
    for text in prompts("train"):
        assert "{" not in text and any(name in text for name in NAMES) and any(place in text for place in PLACES)
        assert text == text.strip()


def test_all_of_them_and_not_one_more():
    assert ALL == 12 * 10 * 12 == len({*prompts("train", ALL - 100, 100), *prompts("test", ALL - 100, 100)})
    with pytest.raises(UserError, match=f"there are {ALL} story openings") as error:
        prompts("train", ALL, 1)
    assert "\n" not in str(error.value)
