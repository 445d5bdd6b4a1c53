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
    "fix a bicycle tyre": _make_topic(
        "about half an hour", "a patch / a pump / tyre levers / a tube of glue",
        "take off the wheel / find the hole in the tube / glue the patch over the hole / pump up the tyre",
        "check the tyre for glass / carry a spare tube / hold the tube under water to see bubbles"),
    "knit a scarf": _make_topic(
        "about two weeks", "soft wool / two needles / a pair of scissors / a simple pattern",
        "cast on thirty stitches / knit every row / change the colour of the wool / hide the loose ends",
        "count your stitches often / choose thick wool / keep the stitches loose"),
    "train a puppy": _make_topic(
        "about six weeks", "small treats / a collar / a short lead / a quiet garden",
        "show the puppy a treat / say the command once / wait until the puppy sits / praise the puppy",
        "keep each lesson short / never shout at the puppy / use the same command each time"),
    "paint a wall": _make_topic(
        "about one day", "a roller / a wide brush / two cans of paint / sticky tape",
        "cover the floor / tape the edges of the wall / roll on the first coat / add a second coat",
        "stir the paint well / open a window while the paint dries / paint the corners first"),
    "learn the guitar": _make_topic(
        "about one year", "a guitar / a set of strings / a chord book / a tuner",
        "tune the strings / learn three chords / practise the rhythm / play a whole song",
        "press the strings firmly / practise the chords slowly / sing along with the guitar"),
    "make soup": _make_topic(
        "about forty minutes", "carrots / onions / a large pan / vegetable stock",
        "chop the carrots / fry the onions in butter / pour in the stock / simmer the soup gently",
        "taste the soup before you add pepper / cut the carrots small / serve the soup with herbs"),
    "build a birdhouse": _make_topic(
        "about four hours", "wooden boards / nails / a hammer / a saw",
        "saw the boards to size / cut a round door / nail the boards together / hang the house in a tree",
        "sand the rough boards / face the door away from the wind / keep the house far from cats"),
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
    "sew on a button": _make_topic(
        "about ten minutes", "a needle / strong thread / a matching button / your shirt",
        "thread the needle / tie a knot in the thread / push the needle through the button / cut the thread",
        "use double thread / mark the spot with chalk / leave a gap under the button"),
    "pitch a tent": _make_topic(
        "about twenty minutes", "a tent / eight pegs / two poles / a mat",
        "look for flat ground / spread out the tent / raise the poles / push the pegs into the ground",
        "stay away from the lake / clear stones from the ground / keep the pegs in a bag"),
    "cook rice": _make_topic(
        "about fifteen minutes", "a cup of rice / a pot with a lid / cold water / a fork",
        "wash the rice / cover the rice with water / put the lid on the pot / fluff the rice with a fork",
        "never lift the lid early / rest the rice off the heat / fry the rice in oil first"),
    "clean the windows": _make_topic(
        "about ninety minutes", "vinegar / a rubber blade / a soft cloth / a ladder",
        "dust the frames / spray vinegar on the glass / pull the blade down the glass / wipe the frames",
        "work on a cloudy day / rub the glass with newspaper / wipe the blade after each pull"),
    "plant a tree": _make_topic(
        "about one afternoon", "a young tree / a spade / a bag of compost / a wooden stake",
        "dig a wide hole / loosen the roots / set the tree in the hole / fill the hole with compost",
        "plant in autumn / soak the roots overnight / protect the trunk from deer"),
    "make candles": _make_topic(
        "about five hours", "a block of wax / cotton wicks / glass jars / a thermometer",
        "melt the wax / fix the wick in the jar / pour the wax into the jar / trim the wick",
        "watch the wax at all times / warm the jars first / add a drop of lavender"),
    "learn to swim": _make_topic(
        "about eight weeks", "a swimsuit / goggles / a calm pool / a patient teacher",
        "breathe out under water / float on your back / kick with straight legs / swim across the pool",
        "relax your neck in the pool / wear goggles from the start / hold a float while you kick"),
    "draw a portrait": _make_topic(
        "about three evenings", "drawing paper / charcoal / an eraser / a bright lamp",
        "sketch the shape of the head / mark the line of the eyes / draw the nose and mouth / shade the face",
        "look at the face more than the paper / draw lightly at first / put the lamp on one side"),
    "learn chess": _make_topic(
        "about four weeks", "a board / a set of pieces / a clock / a partner",
        "learn how each piece moves / guard your king / bring out your knights / trade pieces with care",
        "think about every check / keep your king safe / study short games"),
    "make jam": _make_topic(
        "about two afternoons", "ripe berries / sugar / clean jars / a long spoon",
        "crush the berries / stir in the sugar / boil the fruit / seal the jam in jars",
        "test the jam on a cold plate / skim off the foam / mix two kinds of berries"),
    "start a beehive": _make_topic(
        "about one season", "a hive / a veil / thick gloves / a smoker",
        "place the hive near flowers / light the smoker / settle the queen in the hive / collect the honey",
        "move slowly near the bees / leave some honey for the bees / wear a veil on every visit"),
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
    "needs": (("You will need {}, {} and {}.", 3), ("You need {} and {}.", 2),
              ("Make sure that you have {} and {}.", 2)),
    "steps": (("First {}, then {}.", 2), ("Begin like this: {}, and then {}.", 2),
              ("To {activity}, {}, {} and then {}.", 3)),
    "time": (("It takes {} to {activity}.", 1), ("Allow {} to {activity}.", 1),
             ("You can {activity} in {}.", 1)),
    "tip": (("A good tip is to {}.", 1), ("Remember to {}.", 1), ("It helps to {}.", 1)),
}
"""Sentence templates for each part, with the number of the topic's phrases that each takes."""
OPENINGS = ("Of course!", "Happy to help.", "Good question!", "Sure thing.", "Gladly!", "What a lovely idea!",
            "Thanks for asking.", "Here is my answer.")
"""Courtesies at the start of a reply."""
CLOSINGS = ("I hope this helps.", "Enjoy!", "Let me know how it goes.", "Good luck!", "Have fun!",
            "Ask me if you want more.", "You can do it!", "I am here if you need me.")
"""Courtesies at the end of a reply."""
# fmt: on
