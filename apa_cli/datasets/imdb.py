"""dataset=imdb: the first words of film reviews, to be continued."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from apa_cli.datasets.base import Dataset
from apa_cli.datasets.source import Row, Source, share, text, usable
from apa_cli.randomness import Stream, permutation
from apa_cli.types import AtLeastOne, Example, Examples, NonNegative, Range

FORMS = {"review": ("text", "label")}


@dataclass(frozen=True)
class IMDB(Dataset):
    """The first `prompt_words` words of a review are the prompt, the rest is the chosen continuation.

    The rows of the hub are sorted by label, so each split gets an order keyed by `data_seed`. Where there is no test
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
        _, found = source.rows(split if "test" in source else "train", FORMS)
        if "test" not in source:
            found = share(found, lambda row: row["text"], self.held_out_every, held_out=split == "test")
        rows = list(found)
        order = permutation(len(rows), self.data_seed, Stream.data_order)
        most = self.test_rows if split == "test" else self.train_rows
        return usable((self._example(rows[place]) for place in order), most)

    def _example(self, row: Row) -> Example | str:
        review = text(row, "text")
        beginning = re.match(rf"\s*\S+(?:\s+\S+){{{self.prompt_words - 1}}}(?=\s)", review)
        if beginning is None or not review[beginning.end() :].strip():
            return f"reviews of no more than {self.prompt_words} words"
        return Example(beginning[0], review[beginning.end() :], None, {"label": row["label"]})
