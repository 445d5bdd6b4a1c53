"""dataset=story_openings: generated prompts."""

import pytest

from apa_cli.datasets.story_openings import NAMES, PLACES, STORY_TEMPLATES, StoryOpenings
from apa_cli.errors import UserError

TOTAL = len(NAMES) * len(STORY_TEMPLATES) * len(PLACES)


def load_prompts(split, train=40, test=8, seed=0):
    return [example.prompt for example in StoryOpenings(train, test, seed, []).load(split)]


def test_splits_have_the_requested_sizes_and_are_disjoint():
    train, test = load_prompts("train"), load_prompts("test")
    assert (len(train), len(test)) == (40, 8) and len({*train, *test}) == 48


def test_rows_depend_on_the_data_seed_alone():
    assert load_prompts("train") == load_prompts("train") and load_prompts("test") == load_prompts("test")
    assert load_prompts("train") != load_prompts("train", seed=1)
    assert load_prompts("test", train=10) == load_prompts("test", train=100)
    assert load_prompts("train", train=10) == load_prompts("train", train=100)[:10]


def test_openings_contain_a_name_and_a_place():
    for text in load_prompts("train"):
        assert "{" not in text and any(name in text for name in NAMES) and any(place in text for place in PLACES)
        assert text == text.strip()


def test_more_prompts_than_openings_are_refused():
    assert (
        TOTAL
        == 12 * 10 * 12
        == len({*load_prompts("train", TOTAL - 100, 100), *load_prompts("test", TOTAL - 100, 100)})
    )
    with pytest.raises(UserError, match=f"exceed the {TOTAL} story openings") as error:
        load_prompts("train", TOTAL, 1)
    assert "\n" not in str(error.value)
