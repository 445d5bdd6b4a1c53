"""dataset=embedded: dialogues with preference pairs that the package generates from a grammar, without a download.

Questions about a dozen everyday activities and replies to them are sampled from one grammar, in the format of
Anthropic's HH data. Every question asks for some of four parts (needs, steps, time, tip) of one topic. Replies have
random faults (no courtesy, wrong topic, a missing part, a repeated sentence; garbled words in some rejected replies),
so that some are preferable. `parse_prompt` and `parse_reply` read the grammar's texts back. The phrases are in
`embedded_phrases`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations, product
from typing import Annotated, NamedTuple, TypeVar

import numpy as np

from apa_cli.datasets.base import Dataset
from apa_cli.datasets.embedded_phrases import (
    CLOSINGS,
    CONTEXTS,
    FOLLOW_UPS,
    INTROS,
    OPENINGS,
    PARTS,
    QUESTIONS,
    TEMPLATES,
    TOPICS,
)
from apa_cli.errors import UserError
from apa_cli.types import AtLeastOne, Example, NonNegative

Item = TypeVar("Item")
Request = tuple[tuple[str, str], ...]
"""The (part, question) pairs of one prompt, in order."""

SHAPES = ((1, 1, 0.40), (1, 2, 0.33), (1, 3, 0.12), (2, 1, 0.10), (2, 2, 0.05))
"""The mix of prompts: (human turns, parts that the last turn asks for, share of the prompts)."""

# Probabilities of the faults and courtesies of a sampled reply.
P_OFF_TOPIC, P_SENTENCE_OFF_TOPIC, P_INCOMPLETE, P_EXTRA, P_REPEAT = 0.3, 0.6, 0.5, 0.2, 0.3
P_OPENING = P_CLOSING = 0.15
P_GARBLED = 0.4
"""Probability that the rejected reply is the chosen one, garbled."""
WEIGHTS = {"relevance": 0.75, "completeness": 0.5, "courtesy": 2.0, "repetition": -0.75, "extra": -0.5}
"""Weight of each feature in the quality of a reply."""
UNPARSED_QUALITY = -1.0
"""Quality of a text that is not a reply of the grammar, below that of every reply."""
NOISE_SLOPE = 8.0
"""Slope of the Bradley-Terry label noise, per unit of quality."""


class Sentence(NamedTuple):
    """One sentence of a reply. `part` is one of PARTS, or "opening" or "closing" with "" as the topic."""

    text: str
    part: str
    topic: str


def _list_sentences(activity: str, part: str) -> tuple[str, ...]:
    """Return every sentence about one part of an activity: each template with each choice of phrases."""
    topic = TOPICS[activity]
    phrases = {"needs": topic.needs, "steps": topic.steps, "time": (topic.time,), "tip": topic.tips}[part]
    return tuple(
        template.format(*choice, activity=activity)
        for template, size in TEMPLATES[part]
        for choice in combinations(phrases, size)
    )


SENTENCES = {(activity, part): _list_sentences(activity, part) for activity in TOPICS for part in PARTS}
"""(activity, part) → all sentences about it."""
_TOPIC_PHRASES = [
    phrase for topic in TOPICS.values() for phrase in (topic.time, *topic.needs, *topic.steps, *topic.tips)
]
SENTENCE_BY_TEXT = {text: Sentence(text, part, topic) for (topic, part), texts in SENTENCES.items() for text in texts}
SENTENCE_BY_TEXT |= {text: Sentence(text, "opening", "") for text in OPENINGS}
SENTENCE_BY_TEXT |= {text: Sentence(text, "closing", "") for text in CLOSINGS}


def parse_reply(text: str) -> list[Sentence] | None:
    """Return the sentences of a reply, [opening] content+ [closing], separated by single spaces.

    One leading space is allowed. Return None for any other text. The topic of the question does not matter here.
    """
    sentences = []
    for part in re.split(r"(?<=[.!]) ", text.removeprefix(" ")):
        sentence = SENTENCE_BY_TEXT.get(part)
        if sentence is None:
            return None
        sentences.append(sentence)
    order = "".join({"opening": "o", "closing": "c"}.get(sentence.part, "s") for sentence in sentences)
    return sentences if re.fullmatch("o?s+c?", order) else None


def parse_prompt(prompt: str) -> tuple[str, list[str]]:
    """Return the topic of a prompt and the parts that its last human turn asks for, in the order of that turn.

    The topic is the one that a human turn named last. Raise ValueError if no topic is named or no part is asked for.
    """
    turns = [turn.split("\n\nAssistant:")[0].lower() for turn in prompt.split("\n\nHuman:")[1:]]
    topics = [activity for turn in reversed(turns) for activity in TOPICS if activity in turn]
    last_turn = turns[-1] if turns else ""
    positions = sorted((last_turn.find(question.lower()), part) for part in PARTS for question in QUESTIONS[part])
    asked_parts = [part for position, part in positions if position >= 0]
    if not topics or not asked_parts:
        raise ValueError(f"prompt: {prompt!r} is not a question of the embedded data set")
    return topics[0], asked_parts


def compute_reply_features(topic: str, asked_parts: list[str], sentences: list[Sentence]) -> dict[str, float]:
    """Return the features of a parsed reply to a question about these parts of this topic, each in [0, 1].

    courtesy: 0, 0.5 or 1 for none, one or both of opening and closing. completeness: the share of the asked
    parts that a sentence on the right topic answers. The other features are shares of the content sentences:
    relevance: on the right topic; repetition: with the topic and part of an earlier sentence, in the same words
    or different ones; extra: on the right topic about a part that was not asked for.
    """
    content = [(sentence.topic, sentence.part) for sentence in sentences if sentence.topic]
    relevant_parts = [part for sentence_topic, part in content if sentence_topic == topic]
    return {
        "courtesy": (len(sentences) - len(content)) / 2,
        "relevance": len(relevant_parts) / len(content),
        "completeness": len(set(relevant_parts) & set(asked_parts)) / len(set(asked_parts)),
        "repetition": 1 - len(set(content)) / len(content),
        "extra": sum(part not in asked_parts for part in relevant_parts) / len(content),
    }


def compute_quality(prompt: str, reply: str) -> float:
    """Return the quality of a reply, from UNPARSED_QUALITY for a text that does not parse to 3.25 without faults.

    Raise ValueError if the prompt is not a question of the grammar.
    """
    return _rate_reply(*parse_prompt(prompt), reply)


def _rate_reply(topic: str, asked_parts: list[str], reply: str) -> float:
    sentences = parse_reply(reply)
    if sentences is None:
        return UNPARSED_QUALITY
    return sum(WEIGHTS[name] * value for name, value in compute_reply_features(topic, asked_parts, sentences).items())


def make_row_generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Return the generator of one row or order.

    Values of `stream`: 0 rows of the test split, 1 rows of the train split, 2 order within each shape, 3 order within
    each split.
    """
    key = np.array([seed, (stream << 32) + index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _choose(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def _list_requests(turns: int, count: int) -> list[Request]:
    """Return every request for `count` parts in the last turn; with two turns, the first pair is the first turn's."""
    return [
        tuple(zip(parts, questions, strict=True))
        for parts in permutations(PARTS, count + turns - 1)
        for questions in product(*(QUESTIONS[part] for part in parts))
    ]


_REQUESTS = {(turns, count): _list_requests(turns, count) for turns, count, _ in SHAPES}
GRIDS = {
    (turns, count): (
        len(TOPICS),
        len(INTROS),
        len(CONTEXTS),
        len(FOLLOW_UPS) if turns == 2 else 1,
        len(_REQUESTS[turns, count]),
    )
    for turns, count, _ in SHAPES
}
"""(turns, parts) → numbers of topics, intros, contexts, follow-ups and requests; their product counts the prompts."""
CAPACITY = min(int((math.prod(GRIDS[turns, count]) - 2) / share) for turns, count, share in SHAPES)
"""Maximum number of distinct prompts in the mix of SHAPES (the 2 covers rounding in each of two splits)."""


def allocate_prompts(total: int) -> list[int]:
    """Return the number of prompts of each shape for `total` prompts in the mix of SHAPES."""
    edges = [round(total * sum(share for *_, share in SHAPES[:i])) for i in range(len(SHAPES) + 1)]
    return [after - before for before, after in pairwise(edges)]


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]


def _enumerate(phrases: list[str]) -> str:
    """Return the phrases as "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


def build_prompt(shape: tuple[int, int], index: int, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """Return prompt `index` of a shape, its topic and the parts it asks for. `rng` samples the first turn's reply."""
    topic, intro, context, follow_up, choice = (int(i) for i in np.unravel_index(index, GRIDS[shape]))
    activity, request = list(TOPICS)[topic], _REQUESTS[shape][choice]
    turns = [request[:1], request[1:]] if shape[0] == 2 else [request]
    first, last = (_enumerate([question for _, question in turn]) for turn in (turns[0], turns[-1]))

    first, about = _capitalize(first), activity + CONTEXTS[context]
    question = f"{INTROS[intro]} {about}. {first}?" if INTROS[intro] else f"{first} to {about}?"
    dialogue = f"\n\nHuman: {question}\n\nAssistant:"
    if len(turns) == 2:
        if rng.random() < P_OPENING:
            dialogue += f" {_choose(rng, OPENINGS)}"
        dialogue += f" {_choose(rng, SENTENCES[activity, request[0][0]])}"
        opener = FOLLOW_UPS[follow_up]
        dialogue += f"\n\nHuman: {opener} {last if opener == 'And' else _capitalize(last)}?\n\nAssistant:"
    return dialogue, activity, [part for part, _ in turns[-1]]


def _sample_reply(topic: str, asked_parts: list[str], rng: np.random.Generator) -> str:
    """Return a reply with random faults, with a space in front."""
    parts, other_parts = list(asked_parts), [part for part in PARTS if part not in asked_parts]
    if rng.random() < P_INCOMPLETE:
        parts.remove(_choose(rng, parts))
    if not parts or rng.random() < P_EXTRA:
        parts.insert(int(rng.random() * (len(parts) + 1)), _choose(rng, other_parts))

    topics = [topic] * len(parts)
    if rng.random() < P_OFF_TOPIC:
        other_topic = _choose(rng, [other for other in TOPICS if other != topic])
        topics = [other_topic if rng.random() < P_SENTENCE_OFF_TOPIC else topic for _ in parts]
    subjects = list(zip(topics, parts, strict=True))
    content = [_choose(rng, SENTENCES[subject]) for subject in subjects]
    if rng.random() < P_REPEAT:
        index = int(rng.random() * len(content))
        repetition = content[index] if rng.random() < 0.5 else _choose(rng, SENTENCES[subjects[index]])
        content.insert(index + 1 + int(rng.random() * (len(content) - index)), repetition)

    opening = [_choose(rng, OPENINGS)] if rng.random() < P_OPENING else []
    closing = [_choose(rng, CLOSINGS)] if rng.random() < P_CLOSING else []
    return " " + " ".join(opening + content + closing)


def _garble(reply: str, rng: np.random.Generator) -> str:
    """Return the reply with one random error, so that it does not parse.

    The errors: words missing, repeated or replaced by another sentence's; a phrase replaced by one of the reply or of
    any topic; a courtesy or half a sentence in the wrong place; nothing but two courtesies.
    """
    words, garbled = reply.split(), reply
    while parse_reply(garbled) is not None:
        start = int(rng.integers(len(words)))
        stop = min(len(words), start + int(rng.integers(1, 4)))
        sentence_ends = [index + 1 for index, word in enumerate(words) if word[-1] in ".!"]
        foreign = _choose(rng, SENTENCES[_choose(rng, list(SENTENCES))]).split()
        courtesy = _choose(rng, OPENINGS + CLOSINGS).split()
        boundary = _choose(rng, sentence_ends)
        reply_phrases = [phrase for phrase in _TOPIC_PHRASES if phrase in reply]
        candidates = (
            reply.replace(_choose(rng, reply_phrases), _choose(rng, reply_phrases), 1).split(),
            reply.replace(_choose(rng, reply_phrases), _choose(rng, _TOPIC_PHRASES), 1).split(),
            words[:start] + words[stop:],
            words[:start] + words[start:stop] * 2 + words[stop:],
            words[:start] + foreign[len(foreign) // 2 :] + words[stop:],
            words[:boundary] + courtesy + words[boundary:],
            words[:boundary] + foreign[len(foreign) // 2 :] + words[boundary:],
            [_choose(rng, OPENINGS), *courtesy],
        )
        garbled = " " + " ".join(_choose(rng, candidates))
    return garbled


def _sample_pair(topic: str, asked_parts: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """Return two replies of different quality, (chosen, rejected): the better first, up to Bradley-Terry noise.

    A garbled reply differs from its chosen one in nothing else, so that each such pair teaches what does not parse.
    """
    first = second = _sample_reply(topic, asked_parts, rng)
    if rng.random() < P_GARBLED:
        return first, _garble(first, rng)
    gap = 0.0
    while abs(gap) < 1e-6:
        second = _sample_reply(topic, asked_parts, rng)
        gap = _rate_reply(topic, asked_parts, first) - _rate_reply(topic, asked_parts, second)
    better, worse = (first, second) if gap > 0 else (second, first)
    is_flipped = rng.random() < 1 / (1 + math.exp(NOISE_SLOPE * abs(gap)))
    return (worse, better) if is_flipped else (better, worse)


@dataclass(frozen=True)
class EmbeddedDataset(Dataset):
    """Dialogues from the grammar, with preference pairs. Prompts are distinct within and across the splits.

    The test split depends on `test_prompts` and `data_seed` alone, not on `train_prompts`.
    """

    train_prompts: Annotated[int, AtLeastOne]
    test_prompts: Annotated[int, AtLeastOne]
    data_seed: Annotated[int, NonNegative]
    stop_strings: list[str]

    def load(self, split: str) -> list[Example]:
        """Return the examples of "train" or "test", the same at every call; columns are `topic` and `asked`.

        Raise UserError if the grammar has too few prompts, ValueError for another split or a negative number.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split: the embedded data set has train and test, not {split!r}")
        if min(self.train_prompts, self.test_prompts, self.data_seed) < 0:
            raise ValueError("train_prompts, test_prompts and data_seed must not be negative")
        if self.train_prompts + self.test_prompts > CAPACITY:
            raise UserError(
                f"dataset.train_prompts: {self.train_prompts} and dataset.test_prompts={self.test_prompts} exceed the "
                f"{CAPACITY} distinct prompts of the embedded data set; lower one of them"
            )
        stream = ("test", "train").index(split)
        places: list[tuple[tuple[int, int], int]] = []
        test_counts, train_counts = allocate_prompts(self.test_prompts), allocate_prompts(self.train_prompts)
        for i, (turns, count, _) in enumerate(SHAPES):
            order = make_row_generator(self.data_seed, 2, i).permutation(math.prod(GRIDS[turns, count]))
            held_out, rest = order[: test_counts[i]], order[test_counts[i] :]
            indices = rest[: train_counts[i]] if split == "train" else held_out
            places += [((turns, count), int(index)) for index in indices]

        examples = []
        for row, place in enumerate(make_row_generator(self.data_seed, 3, stream).permutation(len(places))):
            rng = make_row_generator(self.data_seed, stream, row)
            shape, index = places[place]
            prompt, topic, asked_parts = build_prompt(shape, index, rng)
            chosen, rejected = _sample_pair(topic, asked_parts, rng)
            examples.append(Example(prompt, chosen, rejected, {"topic": topic, "asked": asked_parts}))
        return examples

    def describe(self, prompts: list[str], responses: list[str]) -> dict[str, float]:
        """Return means over responses to prompts of this data set, each in [0, 1], for evaluation.

        parse_rate is over all responses, each up to its first stop string; courtesy, relevance, completeness
        and repetition (see `compute_reply_features`) are over the responses that parse, 0.0 if none does. Raise
        ValueError if the lists differ in length or a prompt is not a question of the grammar.
        """
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            topic, asked_parts = parse_prompt(prompt)
            for stop in self.stop_strings:
                response = response.split(stop)[0]
            sentences = parse_reply(response)
            if sentences is not None:
                rows.append(compute_reply_features(topic, asked_parts, sentences))
        means = {
            name: sum(row[name] for row in rows) / max(len(rows), 1)
            for name in ("courtesy", "relevance", "completeness", "repetition")
        }
        return {"parse_rate": len(rows) / max(len(responses), 1), **means}
