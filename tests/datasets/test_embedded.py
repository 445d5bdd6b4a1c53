"""The embedded dialogues: rows, parsing, quality of replies, preference pairs and evaluation metrics."""

import math
import re
from itertools import combinations, takewhile

import pytest

from apa_cli.datasets import embedded
from apa_cli.datasets.embedded import EmbeddedDataset, compute_quality, parse_prompt, parse_reply
from apa_cli.datasets.embedded_phrases import CLOSINGS, OPENINGS, PARTS, QUESTIONS, TOPICS
from apa_cli.errors import UserError


def make_dataset(train=4800, test=256, seed=7):
    return EmbeddedDataset(train, test, seed, stop_strings=["\n\nHuman:"])


@pytest.fixture(scope="module")
def train():
    return make_dataset().load("train")


@pytest.fixture(scope="module")
def test():
    return make_dataset().load("test")


ONE = "\n\nHuman: I want to bake bread. How long does it take?\n\nAssistant:"
TWO = "\n\nHuman: What do I need and how long does it take to bake bread?\n\nAssistant:"
NEEDS = "To bake bread, get flour and yeast."
TIME = "It takes about three hours to bake bread."
TIP = "When you bake bread, remember to keep the dough warm."
TEA = "It takes about five minutes to brew tea."


# The rows


def test_rows_depend_on_the_seed():
    rows = make_dataset(train=200).load("train")
    assert rows == make_dataset(train=200).load("train")
    other_rows = make_dataset(train=200, seed=8).load("train")
    assert len({row.prompt for row in rows} & {row.prompt for row in other_rows}) < 20


def test_a_row_of_one_seed_is_pinned():
    row = make_dataset(train=1, test=1, seed=0).load("test")[0]
    question = "What do I need and is there a trick to catch a fish for a friend?"
    assert row.prompt == f"\n\nHuman: {question}\n\nAssistant:"
    jam = "You can make jam in about two afternoons."
    assert row.chosen == f" If you catch a fish, a good tip is to go fishing at dawn. {jam} {jam}"
    assert row.rejected == f" If you catch a fish, a good tip is to go fishing at dawn. You at dawn. {jam} {jam}"
    assert row.columns == {"topic": "catch a fish", "asked": ["needs", "tip"]}


def test_the_test_split_does_not_depend_on_the_size_of_the_train_split(test):
    assert make_dataset(train=10).load("test") == test


def test_prompts_are_distinct_within_and_across_the_splits(train, test):
    assert len({row.prompt for row in train}) == 4800
    assert len({row.prompt for row in test}) == 256
    assert not {row.prompt for row in train} & {row.prompt for row in test}


def test_capacity_is_reachable_and_more_prompts_are_refused():
    first, second = embedded.allocate_prompts(1000), embedded.allocate_prompts(embedded.CAPACITY - 1000)
    # 12 topics × 6 intros × 8 contexts × 4 parts × 3 questions = 6912 prompts ask for one part in one turn. They are
    # 40 % of the mix: (6912 − 2) / 0.4 = 17275. The next shape, of two parts, has 12 × 6 × 8 × (4 · 3) × 3² = 62208.
    assert sum(first) + sum(second) == embedded.CAPACITY == 17275
    for (turns, count, _), *sizes in zip(embedded.SHAPES, first, second, strict=True):
        assert sum(sizes) <= math.prod(embedded.GRIDS[turns, count])
    with pytest.raises(UserError, match=f"exceed the {embedded.CAPACITY} distinct prompts") as error_info:
        EmbeddedDataset(embedded.CAPACITY, 1, 0, []).load("test")
    assert "\n" not in str(error_info.value)
    assert len(make_dataset(embedded.CAPACITY - 1000, 1000).load("test")) == 1000


def test_every_index_of_a_shape_is_a_different_prompt():
    count = math.prod(embedded.GRIDS[1, 1])
    rng = embedded.make_row_generator(0, 0, 0)
    assert len({embedded.build_prompt((1, 1), index, rng)[0] for index in range(count)}) == count


@pytest.mark.parametrize("field", [{"train": -1}, {"test": -1}, {"seed": -1}])
def test_negative_sizes_and_seeds_are_refused(field):
    with pytest.raises(ValueError, match="must not be negative"):
        make_dataset(**field).load("test")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'"):
        make_dataset().load("validation")


def test_rows_have_the_dialogue_format(train, test):
    turn = r"\n\nHuman: [A-Z][^\n]*\?\n\nAssistant:"
    for row in train + test:
        assert re.fullmatch(rf"({turn} [A-Z][^\n]*[.!])?{turn}", row.prompt)
        assert re.fullmatch(r" [A-Z][^\n]*[.!]", row.chosen)
        assert re.fullmatch(r" [^\n]+", row.rejected)
        assert "  " not in row.chosen + row.rejected


def test_15_percent_of_prompts_name_the_topic_only_in_an_earlier_turn(train):
    longer = [row for row in train if row.prompt.count("Human:") == 2]
    assert len(longer) == 720  # 15 % of 4800
    for row in longer:
        last = row.prompt.split("\n\nHuman:")[-1]
        assert not any(activity in last for activity in TOPICS)
        earlier = row.prompt.split("\n\nAssistant:")[1].split("\n\nHuman:")[0]
        subjects = [(sentence.topic, sentence.part) for sentence in parse_reply(earlier) if sentence.topic]
        assert [topic for topic, _ in subjects] == [row.columns["topic"]]
        assert subjects[0][1] not in row.columns["asked"]


def test_vocabulary_is_small_and_replies_are_short(train):
    texts = [text for row in train for text in (row.chosen, row.rejected)]
    full_text = " ".join(texts + [row.prompt for row in train])
    words = set(re.findall("[a-z]+", full_text.lower()))
    # A topic has up to 23 words (bake bread three hours flour yeast warm water pinch salt mix knead dough rise loaf hot
    # oven keep fresh let cool before cut) and shares some with others: about 20 × 12 = 240. About 100 more are in
    # questions, contexts, courtesies and templates.
    assert 300 <= len(words) <= 380
    lengths = sorted(len(text.split()) for text in texts)
    assert lengths[len(lengths) // 4] >= 13 and lengths[len(lengths) * 9 // 10] <= 45


# Parsing


def test_no_sentence_belongs_to_two_parts_or_topics():
    sentences = [text for texts in embedded.SENTENCES.values() for text in texts]
    sentences += [*OPENINGS, *CLOSINGS]
    assert len(sentences) == len(set(sentences)) == len(embedded.SENTENCE_BY_TEXT)
    assert not [text for text in sentences if re.search(r"[.!?] ", text)]


def test_no_topic_or_question_is_part_of_another():
    for texts in (TOPICS, [question for part in PARTS for question in QUESTIONS[part]]):
        for one, other in combinations(texts, 2):
            assert one not in other and other not in one


def test_every_prompt_and_reply_is_parsed_back(train, test):
    for row in train + test:
        assert parse_prompt(row.prompt) == (row.columns["topic"], row.columns["asked"])
        for reply in (row.chosen, row.rejected):
            sentences = parse_reply(reply)
            if sentences is not None:
                assert " " + " ".join(sentence.text for sentence in sentences) == reply


def test_every_chosen_reply_parses_and_about_40_percent_of_rejected_ones_are_garbled(train, test):
    rows = train + test
    assert all(parse_reply(row.chosen) for row in rows)
    garbled = sum(parse_reply(row.rejected) is None for row in rows) / len(rows)
    assert 0.37 < garbled < 0.44


def count_equal(words, other_words):
    """Return the number of words at the start that two lists share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, other_words, strict=False)))


def test_a_garbled_reply_is_the_chosen_one_with_one_error(train):
    garbled = [row for row in train if parse_reply(row.rejected) is None]
    courtesies = {*OPENINGS, *CLOSINGS}
    edited = [row for row in garbled if not set(re.split(r"(?<=[.!]) ", row.rejected[1:])) <= courtesies]
    # The one error in eight that keeps no word is two courtesies; some of the others parse by chance and are not taken.
    assert 3 / 4 < len(edited) / len(garbled) < 7 / 8
    for row in edited:
        words, rejected_words = row.chosen.split(), row.rejected.split()
        kept = count_equal(words, rejected_words) + count_equal(words[::-1], rejected_words[::-1])
        # One run of words is lost: at most 3, or a phrase of at most 8, "let the loaf cool before you cut it".
        assert kept >= len(words) - 8, (row.chosen, row.rejected)


def test_a_reply_is_parsed_into_its_sentences():
    parsed = parse_reply(f" Of course! {NEEDS} {TEA} Enjoy!")
    assert [(part, topic) for _, part, topic in parsed] == [
        ("opening", ""),
        ("needs", "bake bread"),
        ("time", "brew tea"),
        ("closing", ""),
    ]
    assert parse_reply(NEEDS)[0].text == NEEDS  # decoding may have stripped the first space


@pytest.mark.parametrize(
    "reply",
    [
        "",
        " ",
        " Of course!",
        " Of course! Enjoy!",
        " Of course! To bake bread, get flour and.",
        " Of course! To bake bread, get flour and yeast",
        " Of course! To bake bread, get flour and ye",
        " of course! To bake bread, get flour and yeast.",
        "  Of course! To bake bread, get flour and yeast.",
        " Of course!  To bake bread, get flour and yeast.",
        " Of course!To bake bread, get flour and yeast.",
        " Of course! To bake bread, get flour and yeast. ",
        " Of course! To bake bread, get flour and yeast. Well, yes.",
        " Of course! Sure thing. To bake bread, get flour and yeast.",
        " Enjoy! To bake bread, get flour and yeast.",
        " To bake bread, get flour and yeast. Enjoy! Have fun!",
        " To bake bread, get flour and yeast. Of course!",
        " To bake bread, get flour and yeast.\n\nHuman: Thanks",
        " To bake bread, get flour and a kettle.",
        " To brew tea, get flour and yeast.",
        " To bake bread, get yeast and flour.",
        " To bake bread, get flour and flour.",
        " to bake bread, get flour and yeast.",
        " It takes about three hours to brew tea.",
    ],
)
def test_a_garbled_reply_does_not_parse(reply):
    assert parse_reply(reply) is None
    assert compute_quality(ONE, reply) == embedded.UNPARSED_QUALITY


def test_a_reply_without_a_word_or_with_a_cut_sentence_does_not_parse(test):
    for row in test[:40]:
        words = row.chosen.split()
        whole = [sentence.text for sentence in parse_reply(row.chosen)]
        ends = {len(" ".join(whole[:i]).split()) for i in range(len(whole) + 1)}
        for i in range(len(words)):
            if i not in ends:
                assert parse_reply(" " + " ".join(words[:i])) is None
            if not {i, i + 1} <= ends:  # not a sentence of one word
                assert parse_reply(" " + " ".join(words[:i] + words[i + 1 :])) is None


def test_the_topic_is_the_one_named_last_and_the_parts_are_those_of_the_last_turn():
    earlier = f"\n\nHuman: What do I need to bake bread?\n\nAssistant: {TEA}\n\nHuman: "
    follow_up = earlier + "And which tip would help me and how long does it take?\n\nAssistant:"
    assert parse_prompt(follow_up) == ("bake bread", ["tip", "time"])
    another = earlier + "Is there a trick to brew tea?\n\nAssistant:"
    assert parse_prompt(another) == ("brew tea", ["tip"])


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "bake bread",
        "\n\nHuman: I want to bake bread.\n\nAssistant:",
        "\n\nHuman: How long does it take?\n\nAssistant:",
    ],
)
def test_a_text_without_topic_or_question_is_refused(prompt):
    with pytest.raises(ValueError, match="not a question"):
        parse_prompt(prompt)


# Quality = 0.75 relevance + 0.5 completeness + 2 courtesy - 0.75 repetition - 0.5 extra


@pytest.mark.parametrize(
    ("prompt", "reply", "expected"),
    [
        # no fault
        (TWO, f" Sure thing. {NEEDS} {TIME} Enjoy!", 0.75 + 0.5 + 2),
        # half the courtesy, one of two parts
        (TWO, f" Sure thing. {NEEDS}", 0.75 + 0.5 / 2 + 2 / 2),
        # no courtesy, one sentence of two off the topic, one of two parts
        (TWO, f" {NEEDS} {TEA}", 0.75 / 2 + 0.5 / 2),
        # three sentences, all relevant, one a repetition, none extra
        (TWO, f" Gladly! {NEEDS} {TIME} {NEEDS} Have fun!", 0.75 + 0.5 + 2 - 0.75 / 3),
        # the same part in other words counts as a repetition: one sentence of two
        (ONE, f" {TIME} Allow about three hours to bake bread.", 0.75 + 0.5 - 0.75 / 2),
        # half the courtesy, two of three sentences not asked for
        (ONE, f" {NEEDS} {TIME} {TIP} Good luck!", 0.75 + 0.5 + 2 / 2 - 0.5 * 2 / 3),
        # all off the topic, one of three a repetition; extra counts only the right topic
        (ONE, f" {TEA} To brew tea, get a kettle and a teapot. {TEA}", -0.75 / 3),
    ],
)
def test_quality_by_hand(prompt, reply, expected):
    assert compute_quality(prompt, reply) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "worse",
    [
        f" {NEEDS} {TIME} Enjoy!",  # no opening
        f" Sure thing. {NEEDS} {TIME}",  # no closing
        f" Sure thing. {NEEDS} {TEA} Enjoy!",  # the wrong topic
        f" Sure thing. {NEEDS} {TIME} {TEA} Enjoy!",  # an additional sentence on the wrong topic
        f" Sure thing. {NEEDS} Enjoy!",  # one part missing
        f" Sure thing. {NEEDS} {TIP} Enjoy!",  # another part instead of the asked one
        f" Sure thing. {NEEDS} {TIME} {TIP} Enjoy!",  # an additional part
        f" Sure thing. {NEEDS} {TIME} {TIME} Enjoy!",  # a repetition
        f" Sure thing. {NEEDS} {TIME} To bake bread, get flour and warm water. Enjoy!",  # a repetition in other words
    ],
)
def test_every_fault_lowers_the_quality(worse):
    assert parse_reply(worse) is not None
    assert compute_quality(TWO, worse) <= compute_quality(TWO, f" Sure thing. {NEEDS} {TIME} Enjoy!") - 0.09


def test_any_reply_is_better_than_a_text_that_does_not_parse():
    assert compute_quality(ONE, " " + " ".join([TEA] * 50)) > embedded.UNPARSED_QUALITY


# The pairs


def test_labels_are_mostly_right_but_not_always(train):
    correct = [compute_quality(row.prompt, row.chosen) > compute_quality(row.prompt, row.rejected) for row in train]
    # The 40 % with a garbled reply are right. Of the others about a sixth, 10 % of all, differ by at most 0.3 and are
    # wrong with probability σ(−8 · 0.3) = 0.08 to 0.5: 1 to 5 % of all.
    assert 0.95 <= sum(correct) / len(correct) <= 0.99


def test_pairs_of_similar_quality_are_mislabelled_more_often(train):
    gaps = [compute_quality(row.prompt, row.chosen) - compute_quality(row.prompt, row.rejected) for row in train]
    assert min(map(abs, gaps)) > 1e-6
    # at a gap of 0.5 or less the flip rate is sigmoid(-8 * 0.5) = 0.018 or more; beyond 1 it is below 0.0004
    close, clear = ([gap < 0 for gap in gaps if low < abs(gap) <= high] for low, high in ((0, 0.3), (1, 9)))
    assert sum(close) / len(close) > 0.1
    assert sum(clear) / len(clear) < 0.005


def test_repetitions_use_the_same_words_or_others(train):
    repetitions = same_words = 0
    for row in train[:2000]:
        content = [sentence for sentence in parse_reply(row.rejected) or [] if sentence.topic]
        repetitions += len({(part, topic) for _, part, topic in content}) < len(content)
        same_words += len(set(content)) < len(content)
    assert 0.4 * repetitions < same_words < 0.8 * repetitions
    assert repetitions > 200


def test_chosen_replies_have_mixed_quality_and_no_single_feature_predicts_the_choice(train):
    chosen = [compute_quality(row.prompt, row.chosen) for row in train]
    mean = sum(chosen) / len(chosen)
    deviation = (sum((value - mean) ** 2 for value in chosen) / len(chosen)) ** 0.5
    # A sampled reply has no fault with probability 0.15² (courtesies) · 0.5 (complete) · 0.8 (nothing extra) · 0.7 (no
    # repetition) · 0.78 (on the topic: 0.7 + 0.3 · 0.4ⁿ for n parts; n = 1, 2, 3 in 50, 38, 12 %) = 0.0049. The chosen
    # reply is one of those, or in the 60 % of pairs that are not garbled the better of two:
    # 0.4 · 0.0049 + 0.6 · 2 · 0.0049 = 0.0079, in 4800 pairs 38 ± 6.
    assert 0.004 < sum(value > 3.25 - 1e-9 for value in chosen) / len(chosen) < 0.012
    assert mean + deviation < 3.25  # room for more than one standard deviation

    parsed = [row for row in train if parse_reply(row.rejected)]

    def win_rate(score):  # share of pairs in which the chosen reply scores higher; a tie counts half
        values = [(score(row, row.chosen), score(row, row.rejected)) for row in parsed]
        return sum((a > b) + 0.5 * (a == b) for a, b in values) / len(values)

    def signed_feature(name, sign):
        return lambda row, reply: (
            sign * embedded.compute_reply_features(row.columns["topic"], row.columns["asked"], parse_reply(reply))[name]
        )

    for name, weight in embedded.WEIGHTS.items():
        assert 0.52 < win_rate(signed_feature(name, 1 if weight > 0 else -1)) < 0.8, name
    assert 0.45 < win_rate(lambda row, reply: len(reply.split())) < 0.58


# Evaluation metrics


def test_describe_by_hand():
    responses = [
        f" Sure thing. {NEEDS} {TIME} Enjoy!\n\nHuman: What do I",  # cut at the stop string: 1, 1, 1, 0
        f" {NEEDS} {TEA} {TEA} Enjoy!",  # courtesy 1/2, relevance 1/3, completeness 1/2, repetition 1/3
        " Sure thing. To bake bread, get",  # does not parse
        f" {TEA}",  # 0, 0, 0, 0
    ]
    described = make_dataset().describe([TWO, TWO, TWO, ONE], responses)
    assert described == pytest.approx(
        {
            "parse_rate": 3 / 4,
            "courtesy": (1 + 1 / 2 + 0) / 3,
            "relevance": (1 + 1 / 3 + 0) / 3,
            "completeness": (1 + 1 / 2 + 0) / 3,
            "repetition": (0 + 1 / 3 + 0) / 3,
        },
        abs=1e-12,
    )


@pytest.mark.parametrize(("prompts", "responses"), [([], []), ([ONE], [" Well."])])
def test_describe_is_zero_if_nothing_parses(prompts, responses):
    assert make_dataset().describe(prompts, responses) == dict.fromkeys(
        ("parse_rate", "courtesy", "relevance", "completeness", "repetition"), 0.0
    )


def test_describe_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError):
        make_dataset().describe([ONE], [])
