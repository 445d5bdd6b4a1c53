"""dataset=imdb: the first words of reviews as prompts."""

import gzip
import json
from itertools import islice

import pytest

from apa_cli.datasets.imdb import IMDB


def make_dataset(path, prompt_words=3, held_out_every=2, train_rows=None, test_rows=None, data_seed=0):
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
def test_prompt_and_continuation_are_the_unchanged_text(write, tmp_path, words, prompt, rest):
    write("train.jsonl", [{"text": " A  very\n\ngood film.<br />", "label": 1}])
    write("test.jsonl", [review(1)])
    (example,) = make_dataset(tmp_path, words).load("train")
    assert (example.prompt, example.chosen, example.rejected, example.columns) == (prompt, rest, None, {"label": 1})


def test_reviews_without_a_continuation_are_counted_as_unusable(write, tmp_path):
    texts = ["one two three", "one two three ", "longlonglong two", "", "one two three 4"]
    write("train.jsonl", [{"text": text, "label": 0} for text in texts])
    write("test.jsonl", [review(1)])
    rows = make_dataset(tmp_path).load("train")
    assert [(example.prompt, example.chosen) for example in rows] == [("one two three", " 4")]
    assert rows.drop_counts == {"reviews of no more than 3 words": 4}


def test_an_existing_test_split_is_used(write, tmp_path):
    write("train.jsonl.gz", [review(1), review(2)])
    write("test.jsonl.gz", [review(3), review(4), review(5)])
    data = make_dataset(tmp_path)
    assert sorted(numbers(data.load("train"))) == [1, 2] and sorted(numbers(data.load("test"))) == [3, 4, 5]


def test_without_a_test_split_one_in_three_distinct_reviews_is_held_out(write, tmp_path):
    write("train.jsonl", [review(number) for number in (1, 2, 1, 3, 4, 3, 5, 6, 7)])
    # distinct: 1 2 3 | 4 5 6 | 7; the second and the sixth are held out, one of each whole group of three
    data = make_dataset(tmp_path, held_out_every=3)
    assert sorted(numbers(data.load("test"))) == [2, 6]
    assert sorted(numbers(data.load("train"))) == [1, 1, 3, 3, 4, 5, 7]


def test_rows_are_shuffled_and_a_limit_selects_the_first_of_them(write, tmp_path):
    write("train.jsonl", [review(number, label=number // 50) for number in range(100)])
    write("test.jsonl", [review(number, label=number // 50) for number in range(100, 200)])
    whole = make_dataset(tmp_path).load("train")
    assert sorted(numbers(whole)) == list(range(100))
    labels = [example.columns["label"] for example in whole[:40]]
    assert 10 <= sum(labels) <= 30
    assert make_dataset(tmp_path, train_rows=20, test_rows=5).load("train") == whole[:20]
    assert len(make_dataset(tmp_path, train_rows=20, test_rows=5).load("test")) == 5
    assert make_dataset(tmp_path).load("train") == whole != make_dataset(tmp_path, data_seed=1).load("train")


def test_missing_columns_are_named(write, tmp_path, error_line):
    write("train.jsonl", [{"text": "x"}])
    assert "has the columns text; needed are text, label" in error_line(lambda: make_dataset(tmp_path).load("train"))


def test_real_reviews_are_split_without_loss(real, write, tmp_path):
    with gzip.open(real("imdb") / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 3000)]
    write("train.jsonl.gz", rows)
    data = make_dataset(tmp_path, prompt_words=8, held_out_every=10)
    train, held_out = data.load("train"), data.load("test")
    distinct = len({row["text"] for row in rows})
    assert len({example.prompt + example.chosen for example in held_out}) == distinct // 10
    assert len(train) + len(held_out) == 3000 and not train.drop_counts and not held_out.drop_counts
    written = {(row["text"], row["label"]) for row in rows}
    for example in [*train, *held_out]:
        assert (example.prompt + example.chosen, example.columns["label"]) in written
        assert len(example.prompt.split()) == 8 and example.chosen[0].isspace()
