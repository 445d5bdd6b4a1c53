"""dataset=stack_exchange: questions with a better and a worse answer, by the votes of Stack Exchange's users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any

from apa_cli.datasets.base import Dataset
from apa_cli.datasets.source import Row, Source, share, text, usable
from apa_cli.errors import UserError
from apa_cli.randomness import Stream, permutation
from apa_cli.types import AtLeastOne, Example, Examples, NonNegative, Range

FORMS = {"paired": ("qid", "question", "response_j", "response_k"), "answers": ("qid", "question", "answers")}


def answer_score(upvotes: int, accepted: bool) -> int:
    """The score of an answer (arXiv 2112.00861): −1 below zero, accepted or not; else in steps of doubled votes."""
    return -1 if upvotes < 0 else round(math.log2(1 + upvotes)) + int(accepted)


def score(answer: dict[str, Any]) -> int:
    """An answer's `pm_score`, which is such a score already, or that of its `upvotes` and `selected` or `accepted`."""
    if answer.get("pm_score") is not None:
        return answer["pm_score"]
    if answer.get("upvotes") is None:
        raise UserError(f"dataset.path: answers need pm_score or upvotes, one has only {', '.join(answer)}")
    return answer_score(answer["upvotes"], bool(answer.get("selected") or answer.get("accepted")))


def answer_pairs(answers: list[dict[str, Any]], most: int) -> list[tuple[str, str]]:
    """At most `most` (better, worse) pairs of answers with different scores.

    Those that are furthest apart come first, equal ones in the order of the answers.
    """
    scored = [(score(answer), text(answer, "text")) for answer in answers]
    pairs = [sorted(two, key=lambda item: -item[0]) for two in combinations(scored, 2) if two[0][0] != two[1][0]]
    pairs.sort(key=lambda two: two[1][0] - two[0][0])
    return [(better, worse) for (_, better), (_, worse) in pairs[:most]]


@dataclass(frozen=True)
class StackExchange(Dataset):
    """Pairs of answers, stored as such (lvwerra/stack-exchange-paired) or made of each question's answers
    (HuggingFaceH4/stack-exchange-preferences). The prompt's form is StackLLaMA's.

    Of the train split, which is the only one read, one distinct question in each `held_out_every` is held out with all
    its pairs. The first rows of each kind are taken as they are stored; then they are put into an order keyed by
    `data_seed`, in which one pair of every question comes before a second of any.
    """

    path: str
    folder: str | None
    max_pairs: Annotated[int, AtLeastOne]
    held_out_every: Annotated[int, Range(2)]
    train_rows: Annotated[int | None, AtLeastOne]
    test_rows: Annotated[int | None, AtLeastOne]
    data_seed: Annotated[int, NonNegative]
    stop_strings: list[str]

    def load(self, split: str) -> Examples:
        held_out = split == "test"
        most = self.test_rows if held_out else self.train_rows
        form, rows = Source(self.path, self.folder, streamed=most is not None).rows("train", FORMS)
        rows = share(rows, lambda row: row["qid"], self.held_out_every, held_out)
        found = usable((item for row in rows for item in self._candidates(row, form)), most)
        return Examples(spread(found, self.data_seed), found.dropped)

    def _candidates(self, row: Row, form: str) -> Iterator[Example | str]:
        if form == "paired":
            pairs = [(text(row, "response_j"), text(row, "response_k"))]
        else:
            pairs = answer_pairs(row["answers"] or [], self.max_pairs)
            if not pairs:
                yield "questions without two answers of different scores"
        question = text(row, "question")
        for better, worse in pairs:
            if not (question.strip() and better.strip() and worse.strip()):
                yield "pairs with an empty question or answer"
            elif better == worse:
                yield "pairs of identical answers"
            else:
                prompt = f"Question: {question}\n\nAnswer:"
                yield Example(prompt, f" {better}", f" {worse}", {"qid": row["qid"]})


def spread(examples: list[Example], seed: int) -> list[Example]:
    """In an order keyed by the seed, but first one example of every prompt, then a second, …"""
    seen: Counter[str] = Counter()
    numbered = []
    for place in permutation(len(examples), seed, Stream.data_order):
        example = examples[place]
        numbered.append((seen[example.prompt], example))
        seen[example.prompt] += 1
    return [example for _, example in sorted(numbered, key=lambda item: item[0])]
