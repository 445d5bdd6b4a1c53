"""dataset=stack_exchange: pairs of better and worse answers."""

import pytest

from apa_cli.datasets.row_file import Row
from apa_cli.datasets.stack_exchange import StackExchange, pair_answers, score_votes, shuffle_round_robin
from apa_cli.errors import UserError
from apa_cli.types import Example


def make_dataset(path, held_out_every=2, train_rows=None, test_rows=None, max_pairs=10, data_seed=0, folder=None):
    return StackExchange(str(path), folder, max_pairs, held_out_every, train_rows, test_rows, data_seed, [])


def row(qid, number=1):
    return {"qid": qid, "question": f"q{qid}", "response_j": f"good {number}", "response_k": "bad", "date": "x"}


def answer(text, **marks):
    return Row({"text": text, **marks}, "FILE, row 3")


@pytest.mark.parametrize(
    ("upvotes", "accepted", "expected"),
    [
        (-1, False, -1),
        (-7, True, -1),  # no logarithm, and acceptance does not count
        (0, False, 0),  # log2 1 = 0
        (0, True, 1),
        (1, False, 1),  # log2 2 = 1
        (2, False, 2),  # log2 3 = 1.58
        (4, False, 2),  # log2 5 = 2.32
        (5, False, 3),  # log2 6 = 2.58
        (5, True, 4),
        (10, False, 3),  # log2 11 = 3.46
        (11, False, 4),  # log2 12 = 3.58
        (1023, True, 11),  # log2 1024 = 10
    ],
)
def test_scores_of_votes_by_hand(upvotes, accepted, expected):
    assert score_votes(upvotes, accepted) == expected


def test_pairs_are_sorted_by_descending_difference_of_scores():
    # scores: a 2 (log2 5 = 2.3), b -1, c 2 (log2 3 = 1.6), d 3 (log2 5, accepted)
    answers = [
        answer("a", upvotes=4, selected=False),
        answer("b", upvotes=-3, selected=True),
        answer("c", upvotes=2, accepted=False),
        answer("d", upvotes=4, accepted=True),
    ]
    # gaps: d-b 4, a-b 3, c-b 3, d-a 1, d-c 1; a and c have equal scores. Equal gaps keep the order of the answers
    pairs = [("d", "b"), ("a", "b"), ("c", "b"), ("d", "a"), ("d", "c")]
    assert pair_answers(answers, 10) == pairs
    assert pair_answers(answers, 2) == pairs[:2]
    assert pair_answers(answers[:1], 10) == pair_answers(answers[::2], 10) == []


def test_a_stored_score_is_used_unchanged():
    answers = [answer("a", pm_score=1, upvotes=100), answer("b", pm_score=5), answer("c", pm_score=0, selected=True)]
    assert pair_answers(answers, 10) == [("b", "c"), ("b", "a"), ("a", "c")]
    with pytest.raises(UserError, match="FILE, row 3: an answer needs pm_score or upvotes, got only text, votes"):
        pair_answers([answer("a", votes=1), answer("b", votes=2)], 10)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        (["a", "b"], 'answers must be a list of objects, got ["a", "b"]'),
        ("text", 'answers must be a list of objects, got "text"'),
        ([{"text": "a", "upvotes": "3"}, {"text": "b", "upvotes": 1}], 'upvotes must be a whole number, got "3"'),
    ],
)
def test_answers_of_another_form_are_errors_with_file_and_row(write, tmp_path, error_line, answers, problem):
    good = {"qid": 1, "question": "Q", "answers": []}
    file = write("train.jsonl", [good, {**good, "answers": answers}])
    message = error_line(lambda: make_dataset(tmp_path, held_out_every=99).load("train"))
    assert message == f"dataset.path: {file}, row 2: {problem}"


def test_a_row_without_a_column_and_a_key_that_is_a_list(write, tmp_path, error_line):
    file = write("train.jsonl", [{**row(1), "qid": [1]}, {"qid": 2}])
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert message == f"dataset.path: {file}, row 2: no column question, only qid"


def test_stored_pairs_get_stackllamas_prompt_format(write, tmp_path):
    write("train.jsonl.gz", [{**row(1), "question": "Why?\n\n*Really* "}, row(2)])
    (example,) = make_dataset(tmp_path).load("train")
    assert example.prompt == "Question: Why?\n\n*Really* \n\nAnswer:"
    assert (example.chosen, example.rejected, example.columns) == (" good 1", " bad", {"qid": 1})
    assert example.messages is None


def test_questions_are_held_out_with_all_their_pairs(write, tmp_path):
    write("train.jsonl", [row("a"), row("b"), row("c", 1), row("c", 2), row("d"), row("b", 2), row("e"), row("f")])
    # distinct questions: a b c | d e f; b and f are held out, one of each group of three
    data = make_dataset(tmp_path, held_out_every=3)
    assert sorted(e.columns["qid"] for e in data.load("test")) == ["b", "b", "f"]
    assert sorted(e.columns["qid"] for e in data.load("train")) == ["a", "c", "c", "d", "e"]


def test_limits_select_the_first_stored_pairs(write, tmp_path):
    write("train.jsonl", [row(number) for number in range(40)])
    data = make_dataset(tmp_path, train_rows=3, test_rows=2)
    assert sorted(e.columns["qid"] for e in data.load("train")) == [0, 2, 4]
    assert sorted(e.columns["qid"] for e in data.load("test")) == [1, 3]


def test_pairs_are_formed_from_answers(write, tmp_path):
    answers = [answer("x", pm_score=0), answer("y", pm_score=2), answer("z", pm_score=1)]
    equal = [answer("x", pm_score=1), answer("y", pm_score=1)]
    rows = [
        {"qid": 1, "question": "one", "answers": answers},
        {"qid": 2, "question": "two", "answers": answers},
        {"qid": 3, "question": "three", "answers": equal},
    ]
    write("data/a/train.jsonl", rows)
    write("data/b/train.jsonl", [row(9)])
    examples = make_dataset(tmp_path, max_pairs=2, folder="data/a").load("train")
    # gaps: y-x 2, z-x 1, y-z 1; the limit of 2 leaves the last one out
    assert sorted((e.prompt, e.chosen, e.rejected) for e in examples) == [
        ("Question: one\n\nAnswer:", " y", " x"),
        ("Question: one\n\nAnswer:", " z", " x"),
    ]
    assert examples.drop_counts == {"questions without two answers of different scores": 1}


def test_unusable_pairs_are_counted_by_reason(write, tmp_path):
    rows = [
        {**row(1), "question": " "},
        row(2),
        {**row(3), "response_j": ""},
        {**row(2), "response_k": None},
        {**row(5), "response_j": "bad"},
        row(5),
    ]
    write("train.jsonl", rows)
    # distinct questions 1 2 3 5; 2 and 5 are held out
    train, held_out = make_dataset(tmp_path).load("train"), make_dataset(tmp_path).load("test")
    assert (len(train), train.drop_counts) == (0, {"pairs with an empty question or answer": 2})
    assert len(held_out) == 2
    assert held_out.drop_counts == {"pairs with an empty question or answer": 1, "pairs of identical answers": 1}


def test_one_pair_of_every_question_comes_before_a_second_pair_of_any():
    def pairs(seed):
        rows = [Example(prompt, str(n), None, {}) for n, prompt in enumerate("aaabbcdefgh")]
        return shuffle_round_robin(rows, seed)

    prompts = "".join(example.prompt for example in pairs(0))
    assert sorted(prompts[:8]) == list("abcdefgh") and sorted(prompts[8:10]) == ["a", "b"] and prompts[10] == "a"
    assert pairs(0) == pairs(0) != pairs(1)
    assert sorted(int(example.chosen) for example in pairs(1)) == list(range(11))
    assert shuffle_round_robin([], 0) == []


def test_missing_columns_are_named(write, tmp_path, error_line):
    write("train.jsonl", [{"question": "x"}])
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert "has the columns question; needed are qid, question, response_j, response_k or qid, question" in message


def test_real_pairs_are_split_by_question(real):
    data = make_dataset(real("stack-exchange-paired"), held_out_every=10)
    train, held_out = data.load("train"), data.load("test")
    assert len(train) + len(held_out) == 3098 and not train.drop_counts and not held_out.drop_counts
    train_ids, held_out_ids = ({example.columns["qid"] for example in rows} for rows in (train, held_out))
    assert (len(train_ids), len(held_out_ids)) == (918 - 92, 92) and not train_ids & held_out_ids
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    first = [example.columns["qid"] for example in held_out[:92]]
    assert set(first) == held_out_ids and len({qid.split(":")[0] for qid in first[:20]}) >= 3
