"""dataset=stack_exchange: questions with a better and a worse answer, by the votes of Stack Exchange's users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

from apa_cli.datasets.base import Dataset
from apa_cli.datasets.row_file import Row, abbreviate
from apa_cli.datasets.source import Candidate, Source, get_text, select_split, take_examples
from apa_cli.errors import UserError
from apa_cli.randomness import Stream, sample_permutation
from apa_cli.types import AtLeastOne, Example, Examples, NonNegative, Range

_LAYOUTS = {"paired": ("qid", "question", "response_j", "response_k"), "answers": ("qid", "question", "answers")}


def score_votes(upvotes: int, accepted: bool) -> int:
    """Return the score of an answer (2112.00861): −1 for negative votes, else round(log2(1 + votes)) + accepted."""
    return -1 if upvotes < 0 else round(math.log2(1 + upvotes)) + int(accepted)


def score_answer(answer: Row) -> int:
    """Return the answer's `pm_score`, or else the score computed from `upvotes` and `selected` or `accepted`.

    Raise UserError if the answer has neither `pm_score` nor `upvotes`.
    """
    name = "pm_score" if answer.get("pm_score") is not None else "upvotes"
    number = answer.get(name)
    if number is None:
        raise UserError(
            f"dataset.path: {answer.place}: an answer needs pm_score or upvotes, got only {', '.join(answer)}"
        )
    if not isinstance(number, int):
        raise UserError(f"dataset.path: {answer.place}: {name} must be a whole number, got {abbreviate(number)}")
    if name == "pm_score":
        return number
    return score_votes(number, bool(answer.get("selected") or answer.get("accepted")))


def get_answers(row: Row) -> list[Row]:
    """Return a question's answers, [] for null. Raise UserError if they are not a list of objects."""
    answers = row["answers"] or []
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(f"dataset.path: {row.place}: answers must be a list of objects, got {abbreviate(answers)}")
    return [Row(answer, row.place) for answer in answers]


def pair_answers(answers: list[Row], limit: int) -> list[tuple[str, str]]:
    """Return at most `limit` (better, worse) pairs of answers with different scores.

    Pairs are sorted by descending difference of scores; pairs with equal differences keep the order of the answers.
    """
    scored = [(score_answer(answer), get_text(answer, "text")) for answer in answers]
    pairs = [sorted(pair, key=lambda item: -item[0]) for pair in combinations(scored, 2) if pair[0][0] != pair[1][0]]
    pairs.sort(key=lambda pair: pair[1][0] - pair[0][0])
    return [(better, worse) for (_, better), (_, worse) in pairs[:limit]]


@dataclass(frozen=True)
class StackExchange(Dataset):
    """Pairs of answers, stored as pairs or built from each question's answers, with StackLLaMA's prompt format.

    lvwerra/stack-exchange-paired stores pairs, HuggingFaceH4/stack-exchange-preferences answers. Only the train split
    is read; one distinct question in each `held_out_every` is held out with all its pairs. The first rows of each split
    are selected in stored order, then shuffled by `data_seed` so that one pair of every question comes before a second
    pair of any question.
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
        limit = self.test_rows if held_out else self.train_rows
        layout, all_rows = Source(self.path, self.folder, streamed=limit is not None).rows("train", _LAYOUTS)
        rows = select_split(all_rows, lambda row: str(row["qid"]), self.held_out_every, held_out)
        candidates = (candidate for row in rows for candidate in self._iterate_candidates(row, layout))
        examples = take_examples(candidates, limit)
        return Examples(shuffle_round_robin(examples, self.data_seed), examples.drop_counts)

    def _iterate_candidates(self, row: Row, layout: str) -> Iterator[Candidate]:
        if layout == "paired":
            pairs = [(get_text(row, "response_j"), get_text(row, "response_k"))]
        else:
            pairs = pair_answers(get_answers(row), self.max_pairs)
            if not pairs:
                yield "questions without two answers of different scores"
        question = get_text(row, "question")
        for better, worse in pairs:
            if not (question.strip() and better.strip() and worse.strip()):
                yield "pairs with an empty question or answer"
            elif better == worse:
                yield "pairs of identical answers"
            else:
                prompt = f"Question: {question}\n\nAnswer:"
                yield Example(prompt, f" {better}", f" {worse}", {"qid": row["qid"]})


def shuffle_round_robin(examples: list[Example], seed: int) -> list[Example]:
    """Return the examples in an order keyed by the seed: first one of every prompt, then a second of every prompt, …"""
    counts: Counter[str] = Counter()
    numbered = []
    for index in sample_permutation(len(examples), seed, Stream.data_order):
        example = examples[index]
        numbered.append((counts[example.prompt], example))
        counts[example.prompt] += 1
    return [example for _, example in sorted(numbered, key=lambda item: item[0])]
