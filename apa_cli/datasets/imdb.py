"""dataset=imdb: the first words of film reviews, as prompts to continue."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from apa_cli.datasets.base import Dataset
from apa_cli.datasets.row_file import Row
from apa_cli.datasets.source import Candidate, Source, get_text, select_split, take_examples
from apa_cli.randomness import Stream, sample_permutation
from apa_cli.types import AtLeastOne, Example, Examples, NonNegative, Range

_LAYOUTS = {"review": ("text", "label")}


@dataclass(frozen=True)
class IMDB(Dataset):
    """Film reviews: the first `prompt_words` words are the prompt, the rest is the chosen continuation.

    The rows on the hub are sorted by label, so each split gets an order keyed by `data_seed`. If there is no test
    split, one distinct review in each `held_out_every` is held out of the train split.
    """

    path: str
    prompt_words: Annotated[int, AtLeastOne]
    held_out_every: Annotated[int, Range(2)]
    train_rows: Annotated[int | None, AtLeastOne]
    test_rows: Annotated[int | None, AtLeastOne]
    data_seed: Annotated[int, NonNegative]
    stop_strings: list[str]

    def load(self, split: str) -> Examples:
        source = Source(self.path)
        reviews: Iterable[Row]
        _, reviews = source.rows(split if "test" in source else "train", _LAYOUTS)
        if "test" not in source:
            held_out = split == "test"
            reviews = select_split(reviews, lambda row: get_text(row, "text"), self.held_out_every, held_out)
        rows = list(reviews)
        order = sample_permutation(len(rows), self.data_seed, Stream.data_order)
        limit = self.test_rows if split == "test" else self.train_rows
        return take_examples((self._parse_review(rows[index]) for index in order), limit)

    def _parse_review(self, row: Row) -> Candidate:
        review = get_text(row, "text")
        beginning = re.match(rf"\s*\S+(?:\s+\S+){{{self.prompt_words - 1}}}(?=\s)", review)
        if beginning is None or not review[beginning.end() :].strip():
            return f"reviews of no more than {self.prompt_words} words"
        return Example(beginning[0], review[beginning.end() :], None, {"label": row["label"]})
