"""dataset=story_openings: first words of children's stories in the style of TinyStories, generated here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Annotated

from apa_cli.datasets.base import Dataset
from apa_cli.errors import UserError
from apa_cli.randomness import Stream, sample_permutation
from apa_cli.types import AtLeastOne, Example, NonNegative

NAMES = ["Lily", "Tom", "Anna", "Ben", "Mia", "Sam", "Sara", "Tim", "Lucy", "Max", "Jack", "Emma"]
STORY_TEMPLATES = [
    "{name} went to the {place}",
    "One day, {name} was at the {place}",
    "{name} and the dog walked to the {place}",
    "Once upon a time, {name} lived near a {place}",
    "It was raining when {name} came to the {place}",
    "{name} wanted to see the {place}",
    "In the morning, {name} found a box in the {place}",
    "{name} was lost in the {place}",
    "Mom took {name} to the {place}",
    "{name} had a friend who worked at the {place}",
]
PLACES = [
    "park",
    "beach",
    "forest",
    "farm",
    "school",
    "shop",
    "lake",
    "garden",
    "zoo",
    "library",
    "river",
    "castle",
]


@dataclass(frozen=True)
class StoryOpenings(Dataset):
    """Story openings to continue, each from a name, a place and one of ten templates; prompts only."""

    train_prompts: Annotated[int, AtLeastOne]
    test_prompts: Annotated[int, AtLeastOne]
    data_seed: Annotated[int, NonNegative]
    stop_strings: list[str]

    def load(self, split: str) -> list[Example]:
        texts = [
            opening.format(name=name, place=place) for opening, name, place in product(STORY_TEMPLATES, NAMES, PLACES)
        ]
        if self.train_prompts + self.test_prompts > len(texts):
            raise UserError(
                f"dataset.train_prompts: {self.train_prompts} and dataset.test_prompts={self.test_prompts} exceed the "
                f"{len(texts)} story openings; lower one of them"
            )
        order = sample_permutation(len(texts), self.data_seed, Stream.data_order).tolist()
        indices = order[: self.test_prompts] if split == "test" else order[self.test_prompts :][: self.train_prompts]
        return [Example(texts[i], None, None, {}) for i in indices]
