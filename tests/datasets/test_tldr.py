"""dataset=tldr: posts and summaries."""

from apa_cli.datasets.tldr import TLDR


def dataset(path, train_rows=None, test_rows=None):
    return TLDR(str(path), train_rows, test_rows, [])


POST = {"subreddit": "tea", "title": "Hot!", "post": "I made tea.\n\nIt was hot.", "summary": "hot tea", "score": 3}


def test_posts_with_title_and_subreddit(write, tmp_path):
    write("train.jsonl.gz", [POST])
    write("test.jsonl.gz", [{**POST, "summary": " spaced \n"}])
    (example,) = dataset(tmp_path).load("train")
    assert example.prompt == "SUBREDDIT: r/tea\n\nTITLE: Hot!\n\nPOST: I made tea.\n\nIt was hot.\n\nTL;DR:"
    assert (example.chosen, example.rejected, example.columns) == (" hot tea", None, {"subreddit": "tea"})
    assert dataset(tmp_path).load("test")[0].chosen == " spaced \n"


def test_prompts_that_are_stored_stay_as_they_are(write, tmp_path):
    prompt = "SUBREDDIT: r/tea\nTITLE: t\nPOST: p\nTL;DR:"
    write("trl/train.jsonl", [{"prompt": prompt, "completion": " short"}, {"prompt": "post", "completion": "s"}])
    write("carper/train.jsonl", [{"prompt": prompt, "label": "short"}])
    first, second = dataset(tmp_path / "trl").load("train")
    assert (first.prompt, first.chosen, first.columns) == (prompt, " short", {})
    assert (second.prompt, second.chosen) == ("post\n\nTL;DR:", " s")
    (third,) = dataset(tmp_path / "carper").load("train")
    assert (third.prompt, third.chosen, third.rejected) == (prompt, " short", None)


def test_what_cannot_be_used_is_counted_and_the_first_rows_are_taken(write, tmp_path):
    rows = [{**POST, "post": " \n"}, POST, {**POST, "summary": ""}, {**POST, "title": "2"}, {**POST, "title": "3"}]
    write("train.jsonl", rows)
    write("test.jsonl", rows)
    everything = dataset(tmp_path).load("train")
    assert (len(everything), everything.dropped) == (3, {"empty posts": 1, "posts with an empty summary": 1})
    some = dataset(tmp_path, train_rows=2, test_rows=1).load("train")
    assert [example.prompt.split("\n\n")[1] for example in some] == ["TITLE: Hot!", "TITLE: 2"]
    assert dataset(tmp_path, train_rows=2, test_rows=1).load("test").dropped == {"empty posts": 1}


def test_what_is_missing_is_named(write, tmp_path, refused):
    write("train.jsonl", [{"prompt": "x", "summary": "y"}])
    message = refused(lambda: dataset(tmp_path).load("train"))
    assert "the columns prompt, summary; needed are prompt, completion or prompt, label or subreddit, title" in message
    assert "has no split test, only train" in refused(lambda: dataset(tmp_path).load("test"))


def test_the_real_posts(real):
    data = dataset(real("reddit-tldr"), train_rows=2000)
    train, held_out = data.load("train"), data.load("test")
    assert (len(train), len(held_out)) == (2000, 1000) and not train.dropped and not held_out.dropped
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    for example in held_out:
        assert example.prompt.startswith(f"SUBREDDIT: r/{example.columns['subreddit']}\n\nTITLE: ")
        assert example.prompt.endswith("\n\nTL;DR:") and example.chosen[0] == " "
    assert held_out[0].columns == {"subreddit": "finance"}
