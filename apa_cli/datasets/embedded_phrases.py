"""The phrases of the embedded data set: topics, questions and sentence templates."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """The phrases about one activity that fill the templates of each part of a reply."""

    time: str
    needs: tuple[str, ...]
    steps: tuple[str, ...]
    tips: tuple[str, ...]


def _make_topic(time: str, needs: str, steps: str, tips: str) -> Topic:
    """Return a topic from texts in which slashes separate the phrases."""
    return Topic(time, tuple(needs.split(" / ")), tuple(steps.split(" / ")), tuple(tips.split(" / ")))


# fmt: off
TOPICS: dict[str, Topic] = {
    "bake bread": _make_topic(
        "about three hours", "flour / yeast / warm water / a pinch of salt",
        "mix the flour with the water / knead the dough / let the dough rise / bake the loaf in a hot oven",
        "keep the dough warm / use fresh yeast / let the loaf cool before you cut it"),
    "grow tomatoes": _make_topic(
        "about three months", "tomato seeds / a deep pot / rich soil / a sunny place",
        "fill the pot with soil / plant the seeds / water the plants every morning / pick the red tomatoes",
        "tie each plant to a stick / turn the pot to the sun / remove the small side leaves"),
    "brew tea": _make_topic(
        "about five minutes", "tea leaves / a kettle / a teapot / a slice of lemon",
        "boil the kettle / warm the teapot / pour the water over the leaves / let the tea stand",
        "add the milk last / never boil the leaves / buy loose tea"),
    "train a puppy": _make_topic(
        "about six weeks", "small treats / a collar / a short lead / a quiet garden",
        "show the puppy a treat / say the command once / wait until the puppy sits / praise the puppy",
        "keep each lesson short / never shout at the puppy / use the same command each time"),
    "paint a wall": _make_topic(
        "about one day", "a roller / a wide brush / two cans of paint / sticky tape",
        "cover the floor / tape the edges of the wall / roll on the first coat / add a second coat",
        "stir the paint well / open a window while the paint dries / paint the corners first"),
    "wash a car": _make_topic(
        "about one hour", "two buckets / a sponge / car shampoo / a hose",
        "rinse the car with the hose / wash the roof with a sponge / scrub the wheels / polish the doors",
        "park the car in the shade / rinse the sponge often / dry the car with a towel"),
    "catch a fish": _make_topic(
        "about two hours", "a rod / a sharp hook / worms / a net",
        "tie the hook to the line / put on a worm / throw the line into the river / lift out the fish",
        "stay quiet near the river / go fishing at dawn / keep your worms cool"),
    "write a poem": _make_topic(
        "about one evening", "a notebook / a good pencil / a quiet desk / a strong feeling",
        "choose a feeling / write down ten words / find words that rhyme / read the poem aloud",
        "read other poems first / leave out weak words / write about a true memory"),
    "pitch a tent": _make_topic(
        "about twenty minutes", "a tent / eight pegs / two poles / a mat",
        "look for flat ground / spread out the tent / raise the poles / push the pegs into the ground",
        "stay away from the lake / clear stones from the ground / keep the pegs in a bag"),
    "learn to swim": _make_topic(
        "about eight weeks", "a swimsuit / goggles / a calm pool / a patient teacher",
        "breathe out under water / float on your back / kick with straight legs / swim across the pool",
        "relax your neck in the pool / wear goggles from the start / hold a float while you kick"),
    "learn chess": _make_topic(
        "about four weeks", "a board / a set of pieces / a clock / a partner",
        "learn how each piece moves / guard your king / bring out your knights / trade pieces with care",
        "think about every check / keep your king safe / study short games"),
    "make jam": _make_topic(
        "about two afternoons", "ripe berries / sugar / clean jars / a long spoon",
        "crush the berries / stir in the sugar / boil the fruit / seal the jam in jars",
        "test the jam on a cold plate / skim off the foam / mix two kinds of berries"),
}
"""activity → its phrases. A prompt names the activity."""

PARTS = ("needs", "steps", "time", "tip")
"""The parts that a question can ask for."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "needs": ("what do I need", "what should I buy", "which things should I get"),
    "steps": ("what are the steps", "what should I do", "what is the right way"),
    "time": ("how long does it take", "how much time do I need", "how long should I plan"),
    "tip": ("do you know a good tip", "which tip would help me", "is there a trick"),
}
"""Questions for each part; each can stand alone or be followed by "to bake bread"."""
INTROS = ("", "I want to", "I would like to", "I plan to", "Please help me", "I have decided to")
"""Texts in front of the activity; with an empty one the question itself names the activity."""
CONTEXTS = ("", " on my own", " with my sister", " for the first time", " this weekend", " with my children",
            " on a rainy day", " for a friend")
"""Texts after the activity."""
FOLLOW_UPS = ("And", "Thank you!", "I see.")
"""First words of the second human turn."""

TEMPLATES: dict[str, tuple[tuple[str, int], ...]] = {
    "needs": (("To {activity}, you need {}, {} and {}.", 3), ("To {activity}, get {} and {}.", 2),
              ("Before you {activity}, find {} and {}.", 2)),
    "steps": (("To {activity}, first {}, then {}.", 2), ("You {activity} like this: {}, and then {}.", 2),
              ("To {activity}, {}, {} and then {}.", 3)),
    "time": (("It takes {} to {activity}.", 1), ("Allow {} to {activity}.", 1),
             ("You can {activity} in {}.", 1)),
    "tip": (("If you {activity}, a good tip is to {}.", 1), ("When you {activity}, remember to {}.", 1),
            ("If you {activity}, it helps to {}.", 1)),
}
"""Sentence templates for each part, with the number of the topic's phrases that each takes."""
OPENINGS = ("Of course!", "Happy to help.", "Good question!", "Sure thing.", "Gladly!", "What a lovely idea!",
            "Thanks for asking.", "Here is my answer.")
"""Courtesies at the start of a reply."""
CLOSINGS = ("I hope this helps.", "Enjoy!", "Let me know how it goes.", "Good luck!", "Have fun!",
            "Best wishes!", "Feel free to write again.", "Until next time!")
"""Courtesies at the end of a reply. None begins like a sentence about a part, which a small model would mix up."""
# fmt: on
