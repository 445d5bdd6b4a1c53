"""dataset=tldr: posts and summaries."""

from apa_cli.datasets.tldr import TLDR


def make_dataset(path, train_rows=None, test_rows=None):
    return TLDR(str(path), train_rows, test_rows, [])


POST = {"subreddit": "tea", "title": "Hot!", "post": "I made tea.\n\nIt was hot.", "summary": "hot tea", "score": 3}


def test_prompt_of_a_post_with_title_and_subreddit(write, tmp_path):
    write("train.jsonl.gz", [POST])
    write("test.jsonl.gz", [{**POST, "summary": " spaced \n"}])
    (example,) = make_dataset(tmp_path).load("train")
    assert example.prompt == "SUBREDDIT: r/tea\n\nTITLE: Hot!\n\nPOST: I made tea.\n\nIt was hot.\n\nTL;DR:"
    assert (example.chosen, example.rejected, example.columns) == (" hot tea", None, {"subreddit": "tea"})
    assert make_dataset(tmp_path).load("test")[0].chosen == " spaced \n"


def test_stored_prompts_are_unchanged(write, tmp_path):
    prompt = "SUBREDDIT: r/tea\nTITLE: t\nPOST: p\nTL;DR:"
    write("trl/train.jsonl", [{"prompt": prompt, "completion": " short"}, {"prompt": "post", "completion": "s"}])
    write("carper/train.jsonl", [{"prompt": prompt, "label": "short"}])
    first, second = make_dataset(tmp_path / "trl").load("train")
    assert (first.prompt, first.chosen, first.columns) == (prompt, " short", {})
    assert (second.prompt, second.chosen) == ("post\n\nTL;DR:", " s")
    (third,) = make_dataset(tmp_path / "carper").load("train")
    assert (third.prompt, third.chosen, third.rejected) == (prompt, " short", None)


def test_unusable_rows_are_counted_and_the_first_usable_rows_selected(write, tmp_path):
    rows = [{**POST, "post": " \n"}, POST, {**POST, "summary": ""}, {**POST, "title": "2"}, {**POST, "title": "3"}]
    write("train.jsonl", rows)
    write("test.jsonl", rows)
    examples = make_dataset(tmp_path).load("train")
    assert (len(examples), examples.drop_counts) == (3, {"empty posts": 1, "posts with an empty summary": 1})
    first_two = make_dataset(tmp_path, train_rows=2, test_rows=1).load("train")
    assert [example.prompt.split("\n\n")[1] for example in first_two] == ["TITLE: Hot!", "TITLE: 2"]
    assert make_dataset(tmp_path, train_rows=2, test_rows=1).load("test").drop_counts == {"empty posts": 1}


def test_missing_columns_and_splits_are_named(write, tmp_path, error_line):
    write("train.jsonl", [{"prompt": "x", "summary": "y"}])
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert "the columns prompt, summary; needed are prompt, completion or prompt, label or subreddit, title" in message
    assert "has no split test, only train" in error_line(lambda: make_dataset(tmp_path).load("test"))


def test_real_posts_have_the_documented_format(real):
    data = make_dataset(real("reddit-tldr"), train_rows=2000)
    train, held_out = data.load("train"), data.load("test")
    assert (len(train), len(held_out)) == (2000, 1000) and not train.drop_counts and not held_out.drop_counts
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    for example in held_out:
        assert example.prompt.startswith(f"SUBREDDIT: r/{example.columns['subreddit']}\n\nTITLE: ")
        assert example.prompt.endswith("\n\nTL;DR:") and example.chosen[0] == " "
    assert held_out[0].columns == {"subreddit": "finance"}
