"""dataset=imdb: the beginnings of reviews."""

import gzip
import json
from itertools import islice

import pytest

from apa_cli.datasets.imdb import IMDB


def dataset(path, prompt_words=3, held_out_every=2, train_rows=None, test_rows=None, data_seed=0):
    return IMDB(str(path), prompt_words, held_out_every, train_rows, test_rows, data_seed, [])


def review(number, label=0):
    return {"text": f"film number {number} was fine", "label": label}


def numbers(rows):
    return [int(example.prompt.split()[2]) for example in rows]


@pytest.mark.parametrize(
    ("words", "prompt", "rest"),
    [
        (1, " A", "  very\n\ngood film.<br />"),
        (2, " A  very", "\n\ngood film.<br />"),
        (4, " A  very\n\ngood film.<br", " />"),
    ],
)
def test_the_first_words_and_the_rest_to_the_letter(write, tmp_path, words, prompt, rest):
    write("train.jsonl", [{"text": " A  very\n\ngood film.<br />", "label": 1}])
    write("test.jsonl", [review(1)])
    (example,) = dataset(tmp_path, words).load("train")
    assert (example.prompt, example.chosen, example.rejected, example.columns) == (prompt, rest, None, {"label": 1})


def test_a_review_needs_words_beyond_the_prompt(write, tmp_path):
    texts = ["one two three", "one two three ", "longlonglong two", "", "one two three 4"]
    write("train.jsonl", [{"text": text, "label": 0} for text in texts])
    write("test.jsonl", [review(1)])
    rows = dataset(tmp_path).load("train")
    assert [(example.prompt, example.chosen) for example in rows] == [("one two three", " 4")]
    assert rows.dropped == {"reviews of no more than 3 words": 4}


def test_the_test_split_is_used_where_there_is_one(write, tmp_path):
    write("train.jsonl.gz", [review(1), review(2)])
    write("test.jsonl.gz", [review(3), review(4), review(5)])
    data = dataset(tmp_path)
    assert sorted(numbers(data.load("train"))) == [1, 2] and sorted(numbers(data.load("test"))) == [3, 4, 5]


def test_else_one_in_three_distinct_reviews_is_held_out(write, tmp_path):
    write("train.jsonl", [review(number) for number in (1, 2, 1, 3, 4, 3, 5, 6, 7)])
    # distinct: 1 2 3 | 4 5 6 | 7; of each whole stretch one is held out, by key: the second, and the sixth
    data = dataset(tmp_path, held_out_every=3)
    assert sorted(numbers(data.load("test"))) == [2, 6]
    assert sorted(numbers(data.load("train"))) == [1, 1, 3, 3, 4, 5, 7]


def test_rows_sorted_by_label_are_mixed_and_a_first_part_is_of_the_same_order(write, tmp_path):
    write("train.jsonl", [review(number, label=number // 50) for number in range(100)])
    write("test.jsonl", [review(number, label=number // 50) for number in range(100, 200)])
    whole = dataset(tmp_path).load("train")
    assert sorted(numbers(whole)) == list(range(100))
    labels = [example.columns["label"] for example in whole[:40]]
    assert 10 <= sum(labels) <= 30
    assert dataset(tmp_path, train_rows=20, test_rows=5).load("train") == whole[:20]
    assert len(dataset(tmp_path, train_rows=20, test_rows=5).load("test")) == 5
    assert dataset(tmp_path).load("train") == whole != dataset(tmp_path, data_seed=1).load("train")


def test_columns_that_are_missing_are_named(write, tmp_path, refused):
    write("train.jsonl", [{"text": "x"}])
    assert "has the columns text; needed are text, label" in refused(lambda: dataset(tmp_path).load("train"))


def test_the_first_real_reviews(real, write, tmp_path):
    with gzip.open(real("imdb") / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 3000)]
    write("train.jsonl.gz", rows)
    data = dataset(tmp_path, prompt_words=8, held_out_every=10)
    train, held_out = data.load("train"), data.load("test")
    distinct = len({row["text"] for row in rows})
    assert len({example.prompt + example.chosen for example in held_out}) == distinct // 10
    assert len(train) + len(held_out) == 3000 and not train.dropped and not held_out.dropped
    written = {(row["text"], row["label"]) for row in rows}
    for example in [*train, *held_out]:
        assert (example.prompt + example.chosen, example.columns["label"]) in written
        assert len(example.prompt.split()) == 8 and example.chosen[0].isspace()
