"""The dialogue data that the package makes itself, so that a first run needs no download.

Questions about two dozen everyday activities, and replies to them, both drawn from one grammar and written
in the format of Anthropic's HH data. Every question asks for some of four parts (needs, steps, time, tip)
of one topic. Replies have random faults (no courtesy, wrong topic, a part left out, a sentence repeated; some
rejected ones garbled words), so that there is something to prefer. What the grammar makes it also reads:
`parse_prompt`, `parse_reply`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations, product
from typing import Annotated, NamedTuple

import numpy as np

from apa_cli.datasets.base import Dataset
from apa_cli.types import AtLeastOne, Example, NonNegative


class Topic(NamedTuple):
    """What can be said about one activity: a time, and phrases that fill the templates of a part."""

    time: str
    needs: tuple[str, ...]
    steps: tuple[str, ...]
    tips: tuple[str, ...]


def _topic(time: str, needs: str, steps: str, tips: str) -> Topic:
    return Topic(time, *(tuple(phrases.split(" / ")) for phrases in (needs, steps, tips)))


# fmt: off
TOPICS: dict[str, Topic] = {
    "bake bread": _topic(
        "about three hours", "flour / yeast / warm water / a pinch of salt",
        "mix the flour with the water / knead the dough / let the dough rise / bake the loaf in a hot oven",
        "keep the dough warm / use fresh yeast / let the loaf cool before you cut it"),
    "grow tomatoes": _topic(
        "about three months", "tomato seeds / a deep pot / rich soil / a sunny place",
        "fill the pot with soil / plant the seeds / water the plants every morning / pick the red tomatoes",
        "tie each plant to a stick / turn the pot to the sun / remove the small side leaves"),
    "brew tea": _topic(
        "about five minutes", "tea leaves / a kettle / a teapot / a slice of lemon",
        "boil the kettle / warm the teapot / pour the water over the leaves / let the tea stand",
        "add the milk last / never boil the leaves / buy loose tea"),
    "fix a bicycle tyre": _topic(
        "about half an hour", "a patch / a pump / tyre levers / a tube of glue",
        "take off the wheel / find the hole in the tube / glue the patch over the hole / pump up the tyre",
        "check the tyre for glass / carry a spare tube / hold the tube under water to see bubbles"),
    "knit a scarf": _topic(
        "about two weeks", "soft wool / two needles / a pair of scissors / a simple pattern",
        "cast on thirty stitches / knit every row / change the colour of the wool / hide the loose ends",
        "count your stitches often / choose thick wool / keep the stitches loose"),
    "train a puppy": _topic(
        "about six weeks", "small treats / a collar / a short lead / a quiet garden",
        "show the puppy a treat / say the command once / wait until the puppy sits / praise the puppy",
        "keep each lesson short / never shout at the puppy / use the same command each time"),
    "paint a wall": _topic(
        "about one day", "a roller / a wide brush / two cans of paint / sticky tape",
        "cover the floor / tape the edges of the wall / roll on the first coat / add a second coat",
        "stir the paint well / open a window while the paint dries / paint the corners first"),
    "learn the guitar": _topic(
        "about one year", "a guitar / a set of strings / a chord book / a tuner",
        "tune the strings / learn three chords / practise the rhythm / play a whole song",
        "press the strings firmly / practise the chords slowly / sing along with the guitar"),
    "make soup": _topic(
        "about forty minutes", "carrots / onions / a large pan / vegetable stock",
        "chop the carrots / fry the onions in butter / pour in the stock / simmer the soup gently",
        "taste the soup before you add pepper / cut the carrots small / serve the soup with herbs"),
    "build a birdhouse": _topic(
        "about four hours", "wooden boards / nails / a hammer / a saw",
        "saw the boards to size / cut a round door / nail the boards together / hang the house in a tree",
        "sand the rough boards / face the door away from the wind / keep the house far from cats"),
    "wash a car": _topic(
        "about one hour", "two buckets / a sponge / car shampoo / a hose",
        "rinse the car with the hose / wash the roof with a sponge / scrub the wheels / polish the doors",
        "park the car in the shade / rinse the sponge often / dry the car with a towel"),
    "catch a fish": _topic(
        "about two hours", "a rod / a sharp hook / worms / a net",
        "tie the hook to the line / put on a worm / throw the line into the river / lift out the fish",
        "stay quiet near the river / go fishing at dawn / keep your worms cool"),
    "write a poem": _topic(
        "about one evening", "a notebook / a good pencil / a quiet desk / a strong feeling",
        "choose a feeling / write down ten words / find words that rhyme / read the poem aloud",
        "read other poems first / leave out weak words / write about a true memory"),
    "sew on a button": _topic(
        "about ten minutes", "a needle / strong thread / a matching button / your shirt",
        "thread the needle / tie a knot in the thread / push the needle through the button / cut the thread",
        "use double thread / mark the spot with chalk / leave a gap under the button"),
    "pitch a tent": _topic(
        "about twenty minutes", "a tent / eight pegs / two poles / a mat",
        "look for flat ground / spread out the tent / raise the poles / push the pegs into the ground",
        "stay away from the lake / clear stones from the ground / keep the pegs in a bag"),
    "cook rice": _topic(
        "about fifteen minutes", "a cup of rice / a pot with a lid / cold water / a fork",
        "wash the rice / cover the rice with water / put the lid on the pot / fluff the rice with a fork",
        "never lift the lid early / rest the rice off the heat / fry the rice in oil first"),
    "clean the windows": _topic(
        "about ninety minutes", "vinegar / a rubber blade / a soft cloth / a ladder",
        "dust the frames / spray vinegar on the glass / pull the blade down the glass / wipe the frames",
        "work on a cloudy day / rub the glass with newspaper / wipe the blade after each pull"),
    "plant a tree": _topic(
        "about one afternoon", "a young tree / a spade / a bag of compost / a wooden stake",
        "dig a wide hole / loosen the roots / set the tree in the hole / fill the hole with compost",
        "plant in autumn / soak the roots overnight / protect the trunk from deer"),
    "make candles": _topic(
        "about five hours", "a block of wax / cotton wicks / glass jars / a thermometer",
        "melt the wax / fix the wick in the jar / pour the wax into the jar / trim the wick",
        "watch the wax at all times / warm the jars first / add a drop of lavender"),
    "learn to swim": _topic(
        "about eight weeks", "a swimsuit / goggles / a calm pool / a patient teacher",
        "breathe out under water / float on your back / kick with straight legs / swim across the pool",
        "relax your neck in the pool / wear goggles from the start / hold a float while you kick"),
    "draw a portrait": _topic(
        "about three evenings", "drawing paper / charcoal / an eraser / a bright lamp",
        "sketch the shape of the head / mark the line of the eyes / draw the nose and mouth / shade the face",
        "look at the face more than the paper / draw lightly at first / put the lamp on one side"),
    "learn chess": _topic(
        "about four weeks", "a board / a set of pieces / a clock / a partner",
        "learn how each piece moves / guard your king / bring out your knights / trade pieces with care",
        "think about every check / keep your king safe / study short games"),
    "make jam": _topic(
        "about two afternoons", "ripe berries / sugar / clean jars / a long spoon",
        "crush the berries / stir in the sugar / boil the fruit / seal the jam in jars",
        "test the jam on a cold plate / skim off the foam / mix two kinds of berries"),
    "start a beehive": _topic(
        "about one season", "a hive / a veil / thick gloves / a smoker",
        "place the hive near flowers / light the smoker / settle the queen in the hive / collect the honey",
        "move slowly near the bees / leave some honey for the bees / wear a veil on every visit"),
}

PARTS = ("needs", "steps", "time", "tip")

# How a question names each part. Every phrase can stand alone or be followed by "to bake bread".
PHRASES: dict[str, tuple[str, ...]] = {
    "needs": ("what do I need", "what should I buy", "which things should I get"),
    "steps": ("what are the steps", "what should I do", "what is the right way"),
    "time": ("how long does it take", "how much time do I need", "how long should I plan"),
    "tip": ("do you know a good tip", "which tip would help me", "is there a trick"),
}
INTROS = ("", "I want to", "I would like to", "I plan to", "Please help me", "I have decided to")
CONTEXTS = ("", " on my own", " with my sister", " for the first time", " this weekend", " with my children",
            " on a rainy day", " for a friend")
FOLLOW_UPS = ("And", "Thank you!", "I see.")

# Each template with the number of the topic's phrases that it takes.
TEMPLATES: dict[str, tuple[tuple[str, int], ...]] = {
    "needs": (("You will need {}, {} and {}.", 3), ("You need {} and {}.", 2),
              ("Make sure that you have {} and {}.", 2)),
    "steps": (("First {}, then {}.", 2), ("Begin like this: {}, and then {}.", 2),
              ("To {activity}, {}, {} and then {}.", 3)),
    "time": (("It takes {} to {activity}.", 1), ("Allow {} to {activity}.", 1),
             ("You can {activity} in {}.", 1)),
    "tip": (("A good tip is to {}.", 1), ("Remember to {}.", 1), ("It helps to {}.", 1)),
}
OPENINGS = ("Of course!", "Happy to help.", "Good question!", "Sure thing.", "Gladly!", "What a lovely idea!",
            "Thanks for asking.", "Here is my answer.")
CLOSINGS = ("I hope this helps.", "Enjoy!", "Let me know how it goes.", "Good luck!", "Have fun!",
            "Ask me if you want more.", "You can do it!", "I am here if you need me.")
# fmt: on

# The mix of prompts: (human turns, parts asked in the last one, share of the prompts).
SHAPES = ((1, 1, 0.40), (1, 2, 0.33), (1, 3, 0.12), (2, 1, 0.10), (2, 2, 0.05))

# How often a drawn reply has each fault, and what each feature weighs in its quality.
P_OFF_TOPIC, P_SENTENCE_OFF_TOPIC, P_INCOMPLETE, P_EXTRA, P_REPEAT = 0.45, 0.6, 0.5, 0.2, 0.4
P_GARBLED = 0.4  # of rejected replies
P_OPENING = P_CLOSING = 0.25
WEIGHTS = {"relevance": 0.75, "completeness": 0.75, "courtesy": 1.0, "repetition": -1.0, "extra": -0.3}
UNPARSED = -1.0  # the quality of what is no reply of the grammar: below that of every reply
NOISE_SLOPE = 8.0  # of the Bradley-Terry labels, per unit of quality


class Sentence(NamedTuple):
    """One sentence of a reply. `part` is one of PARTS, or "opening" or "closing" with "" for a topic."""

    text: str
    part: str
    topic: str


def _sentences(activity: str, part: str) -> tuple[str, ...]:
    topic = TOPICS[activity]
    phrases = {"needs": topic.needs, "steps": topic.steps, "time": (topic.time,), "tip": topic.tips}[part]
    return tuple(
        template.format(*chosen, activity=activity)
        for template, size in TEMPLATES[part]
        for chosen in combinations(phrases, size)
    )


SENTENCES = {(activity, part): _sentences(activity, part) for activity in TOPICS for part in PARTS}
_PHRASES = [phrase for topic in TOPICS.values() for phrase in (topic.time, *topic.needs, *topic.steps, *topic.tips)]
_KNOWN = {text: Sentence(text, part, topic) for (topic, part), texts in SENTENCES.items() for text in texts}
_KNOWN |= {text: Sentence(text, "opening", "") for text in OPENINGS}
_KNOWN |= {text: Sentence(text, "closing", "") for text in CLOSINGS}


def parse_reply(text: str) -> list[Sentence] | None:
    """The sentences of a reply: [opening] content+ [closing], one space between them, one or none in front.

    None if the text is not such a reply to the letter. Which topic was asked for does not matter here.
    """
    sentences = [_KNOWN.get(part) for part in re.split(r"(?<=[.!]) ", text.removeprefix(" "))]
    if None in sentences:
        return None
    order = "".join({"opening": "o", "closing": "c"}.get(sentence.part, "s") for sentence in sentences)
    return sentences if re.fullmatch("o?s+c?", order) else None


def parse_prompt(prompt: str) -> tuple[str, list[str]]:
    """The topic of a prompt and the parts that its last human turn asks for, in that turn's order.

    The topic is the one that a human turn named last. ValueError if no topic is named or nothing is asked.
    """
    turns = [turn.split("\n\nAssistant:")[0].lower() for turn in prompt.split("\n\nHuman:")[1:]]
    named = [activity for turn in reversed(turns) for activity in TOPICS if activity in turn]
    last = turns[-1] if turns else ""
    found = sorted((last.find(phrase.lower()), part) for part in PARTS for phrase in PHRASES[part])
    asked = [part for place, part in found if place >= 0]
    if not named or not asked:
        raise ValueError(f"not a question of the embedded data set: {prompt!r}")
    return named[0], asked


def features(topic: str, asked: list[str], sentences: list[Sentence]) -> dict[str, float]:
    """What `quality` weighs, each in 0..1, for a parsed reply to a question about these parts of this topic.

    courtesy: 0, 0.5 or 1 for none, one or both of opening and closing. completeness: the share of the asked
    parts that a sentence on the right topic answers. The others are shares of the content sentences:
    relevance, of those on the right topic; repetition, of those whose topic and part an earlier one had (in
    the same words or not); extra, of those on the right topic about a part that was not asked for.
    """
    content = [(sentence.topic, sentence.part) for sentence in sentences if sentence.topic]
    right = [part for about, part in content if about == topic]
    return {
        "courtesy": (len(sentences) - len(content)) / 2,
        "relevance": len(right) / len(content),
        "completeness": len(set(right) & set(asked)) / len(set(asked)),
        "repetition": 1 - len(set(content)) / len(content),
        "extra": sum(part not in asked for part in right) / len(content),
    }


def quality(prompt: str, reply: str) -> float:
    """How good a reply is, from UNPARSED for what does not parse to the 2.5 of a reply without a fault.

    ValueError if the prompt is not a question of the grammar.
    """
    return _quality(*parse_prompt(prompt), reply)


def _quality(topic: str, asked: list[str], reply: str) -> float:
    sentences = parse_reply(reply)
    if sentences is None:
        return UNPARSED
    return sum(WEIGHTS[name] * value for name, value in features(topic, asked, sentences).items())


def _rng(seed: int, stream: int, index: int) -> np.random.Generator:
    """Streams: 0 the test split's rows, 1 the train split's, 2 the order in each shape, 3 in each split."""
    key = np.array([seed, (stream << 32) + index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _pick(rng: np.random.Generator, items):
    return items[int(rng.random() * len(items))]


def _asks(turns: int, count: int) -> list[tuple[tuple[str, str], ...]]:
    """Every way to ask for `count` parts, as (part, phrase) pairs; of two turns, the first's pair leads."""
    return [
        tuple(zip(parts, phrases, strict=True))
        for parts in permutations(PARTS, count + turns - 1)
        for phrases in product(*(PHRASES[part] for part in parts))
    ]


_ASKS = {(turns, count): _asks(turns, count) for turns, count, _ in SHAPES}
_GRIDS = {
    (turns, count): (
        len(TOPICS),
        len(INTROS),
        len(CONTEXTS),
        len(FOLLOW_UPS) if turns == 2 else 1,
        len(_ASKS[turns, count]),
    )
    for turns, count, _ in SHAPES
}
# The most prompts there can be in the mix of SHAPES (2 is for rounding in each of two splits).
CAPACITY = min(int((math.prod(_GRIDS[turns, count]) - 2) / share) for turns, count, share in SHAPES)


def _sizes(total: int) -> list[int]:
    """`total` prompts shared out over SHAPES."""
    edges = [round(total * sum(share for *_, share in SHAPES[:i])) for i in range(len(SHAPES) + 1)]
    return [after - before for before, after in pairwise(edges)]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


def _prompt(shape: tuple[int, int], index: int, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """Prompt `index` of a shape, its topic and the parts it asks for. `rng` words the earlier reply."""
    topic, intro, context, follow_up, ask = (int(i) for i in np.unravel_index(index, _GRIDS[shape]))
    activity, asks = list(TOPICS)[topic], _ASKS[shape][ask]
    turns = [asks[:1], asks[1:]] if shape[0] == 2 else [asks]
    first, last = (_listed([phrase for _, phrase in turn]) for turn in (turns[0], turns[-1]))

    first, about = _capital(first), activity + CONTEXTS[context]
    question = f"{INTROS[intro]} {about}. {first}?" if INTROS[intro] else f"{first} to {about}?"
    dialogue = f"\n\nHuman: {question}\n\nAssistant:"
    if len(turns) == 2:
        if rng.random() < P_OPENING:
            dialogue += f" {_pick(rng, OPENINGS)}"
        dialogue += f" {_pick(rng, SENTENCES[activity, asks[0][0]])}"
        opener = FOLLOW_UPS[follow_up]
        dialogue += f"\n\nHuman: {opener} {last if opener == 'And' else _capital(last)}?\n\nAssistant:"
    return dialogue, activity, [part for part, _ in turns[-1]]


def _reply(topic: str, asked: list[str], rng: np.random.Generator) -> str:
    """A reply with random faults, beginning with a space."""
    parts, unasked = list(asked), [part for part in PARTS if part not in asked]
    if rng.random() < P_INCOMPLETE:
        parts.remove(_pick(rng, parts))
    if not parts or rng.random() < P_EXTRA:
        parts.insert(int(rng.random() * (len(parts) + 1)), _pick(rng, unasked))

    topics = [topic] * len(parts)
    if rng.random() < P_OFF_TOPIC:
        other = _pick(rng, [other for other in TOPICS if other != topic])
        topics = [other if rng.random() < P_SENTENCE_OFF_TOPIC else topic for _ in parts]
    about = list(zip(topics, parts, strict=True))
    content = [_pick(rng, SENTENCES[key]) for key in about]
    if rng.random() < P_REPEAT:
        again = int(rng.random() * len(content))
        same = content[again] if rng.random() < 0.5 else _pick(rng, SENTENCES[about[again]])
        content.insert(again + 1 + int(rng.random() * (len(content) - again)), same)

    opening = [_pick(rng, OPENINGS)] if rng.random() < P_OPENING else []
    closing = [_pick(rng, CLOSINGS)] if rng.random() < P_CLOSING else []
    return " " + " ".join(opening + content + closing)


def _garbled(reply: str, rng: np.random.Generator) -> str:
    """The reply with one slip that the grammar does not allow: words lost, said twice or of another sentence, a
    phrase that stands there already or belongs to another topic, a courtesy in the wrong place, or nothing else."""
    words, garbled = reply.split(), reply
    while parse_reply(garbled) is not None:
        start = int(rng.integers(len(words)))
        stop = min(len(words), start + int(rng.integers(1, 4)))
        ends = [place + 1 for place, word in enumerate(words) if word[-1] in ".!"]
        strange = _pick(rng, SENTENCES[_pick(rng, list(SENTENCES))]).split()
        courtesy = _pick(rng, OPENINGS + CLOSINGS).split()
        between = _pick(rng, ends)
        said = [phrase for phrase in _PHRASES if phrase in reply]
        slips = (
            reply.replace(_pick(rng, said), _pick(rng, said), 1).split(),
            reply.replace(_pick(rng, said), _pick(rng, _PHRASES), 1).split(),
            words[:start] + words[stop:],
            words[:start] + words[start:stop] * 2 + words[stop:],
            words[:start] + strange[len(strange) // 2 :] + words[stop:],
            words[:between] + courtesy + words[between:],
            words[:between] + strange[len(strange) // 2 :] + words[between:],
            [_pick(rng, OPENINGS), *courtesy],
        )
        garbled = " " + " ".join(_pick(rng, slips))
    return garbled


def _pair(topic: str, asked: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """Two replies of different quality, (chosen, rejected): the better first but for Bradley-Terry noise."""
    first = second = _reply(topic, asked, rng)
    gap = 0.0
    while abs(gap) < 1e-6:
        second = _reply(topic, asked, rng)
        gap = _quality(topic, asked, first) - _quality(topic, asked, second)
    better, worse = (first, second) if gap > 0 else (second, first)
    if rng.random() < P_GARBLED:
        return better, _garbled(worse, rng)
    flipped = rng.random() < 1 / (1 + math.exp(NOISE_SLOPE * abs(gap)))
    return (worse, better) if flipped else (better, worse)


@dataclass(frozen=True)
class EmbeddedDataset(Dataset):
    """Dialogues from the grammar, with preference pairs. Prompts are distinct within and across the splits.

    The test split depends on `test_prompts` and `data_seed` alone, not on how much there is to train on.
    """

    train_prompts: Annotated[int, AtLeastOne]
    test_prompts: Annotated[int, AtLeastOne]
    data_seed: Annotated[int, NonNegative]
    stop_strings: list[str]

    def load(self, split: str) -> list[Example]:
        """The examples of "train" or "test", the same at every call; columns are `topic` and `asked`.

        ValueError if the split is another, a number is negative or the grammar has too few prompts.
        """
        if split not in ("train", "test"):
            raise ValueError(f"the embedded data set has the splits train and test, not {split!r}")
        if min(self.train_prompts, self.test_prompts, self.data_seed) < 0:
            raise ValueError("the embedded data set takes no negative train_prompts, test_prompts or data_seed")
        if self.train_prompts + self.test_prompts > CAPACITY:
            raise ValueError(
                f"the embedded data set has {CAPACITY} distinct prompts: train_prompts="
                f"{self.train_prompts} and test_prompts={self.test_prompts} ask for more"
            )
        stream = ("test", "train").index(split)
        places: list[tuple[tuple[int, int], int]] = []
        held_out, train = _sizes(self.test_prompts), _sizes(self.train_prompts)
        for i, (turns, count, _) in enumerate(SHAPES):
            order = _rng(self.data_seed, 2, i).permutation(math.prod(_GRIDS[turns, count]))
            mine = order[held_out[i] :][: train[i]] if split == "train" else order[: held_out[i]]
            places += [((turns, count), int(place)) for place in mine]

        examples = []
        for row, place in enumerate(_rng(self.data_seed, 3, stream).permutation(len(places))):
            rng = _rng(self.data_seed, stream, row)
            prompt, topic, asked = _prompt(*places[place], rng)
            chosen, rejected = _pair(topic, asked, rng)
            examples.append(Example(prompt, chosen, rejected, {"topic": topic, "asked": asked}))
        return examples

    def describe(self, prompts: list[str], responses: list[str]) -> dict[str, float]:
        """Means over responses to prompts of this data set, each in 0..1, for evaluation.

        parse_rate is over all responses, each up to its first stop string; courtesy, relevance, completeness
        and repetition (see `features`) are over those that parse, 0.0 if none does. ValueError if the lists
        differ in length or a prompt is not a question of the grammar.
        """
        parsed = []
        for prompt, response in zip(prompts, responses, strict=True):
            topic, asked = parse_prompt(prompt)
            for stop in self.stop_strings:
                response = response.split(stop)[0]
            sentences = parse_reply(response)
            if sentences is not None:
                parsed.append(features(topic, asked, sentences))
        means = {
            name: sum(row[name] for row in parsed) / max(len(parsed), 1)
            for name in ("courtesy", "relevance", "completeness", "repetition")
        }
        return {"parse_rate": len(parsed) / max(len(responses), 1), **means}
