"""dataset=jsonl: the user's own rows."""

import pytest

from apa_cli.datasets.base import PromptStyle
from apa_cli.datasets.jsonl import JSONLines


def make_dataset(path, held_out_path=None, held_out_every=2):
    held_out = None if held_out_path is None else str(held_out_path)
    return JSONLines(str(path), held_out, held_out_every, PromptStyle.hh, [])


def prompts(data, split):
    return [example.prompt for example in data.load(split)]


def rows(*names):
    return [{"prompt": name} for name in names]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def load_row(write):
    """load_row(row): return the example read from a file with this row."""

    def load(row):
        file = write("train.jsonl", [row])
        (example,) = make_dataset(file, held_out_path=file).load("train")
        return example

    return load


def test_plain_prompt_and_replies_are_unchanged_and_other_fields_are_columns(load_row):
    row = {"prompt": " Q? \n", "chosen": "yes ", "rejected": "no", "answer": 4, "tags": ["a", None]}
    example = load_row(row)
    assert (example.prompt, example.chosen, example.rejected) == (" Q? \n", "yes ", "no")
    assert example.columns == {"answer": 4, "tags": ["a", None]} and example.messages is None


@pytest.mark.parametrize("row", [{"prompt": "Q"}, {"prompt": "Q", "chosen": None, "rejected": None}])
def test_a_row_may_have_only_a_prompt(load_row, row):
    example = load_row(row)
    assert (example.prompt, example.chosen, example.rejected, example.columns) == ("Q", None, None, {})


def test_messages_that_end_with_the_user_are_the_prompt(load_row):
    turns = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), {**user("Bye"), "name": "Al"}]
    example = load_row({"messages": turns, "id": 7})
    assert example.prompt == "Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    assert example.messages == [*turns[:3], user("Bye")]
    assert (example.chosen, example.rejected, example.columns) == (None, None, {"id": 7})


def test_a_last_message_by_the_assistant_is_the_chosen_reply(load_row):
    example = load_row({"messages": [user("Hi"), assistant("Hello")], "rejected": "What?"})
    assert (example.prompt, example.chosen, example.rejected) == ("\n\nHuman: Hi\n\nAssistant:", " Hello", " What?")
    assert example.messages == [user("Hi")]


def test_messages_with_chosen_and_rejected_fields(load_row):
    example = load_row({"messages": [user("Hi")], "chosen": "a", "rejected": "b"})
    assert (example.chosen, example.rejected) == (" a", " b") and example.columns == {}


def test_a_logged_response_and_its_score_are_fields_and_columns(load_row):
    example = load_row({"prompt": "Q", "response": " A ", "score": 2, "answer": 4})
    assert (example.response, example.score) == (" A ", 2.0) and isinstance(example.score, float)
    assert example.columns == {"response": " A ", "score": 2, "answer": 4}
    example = load_row({"messages": [user("Hi")], "response": "Hello", "score": -0.5})
    assert (example.response, example.score) == (" Hello", -0.5)  # as chosen and rejected
    assert example.columns == {"response": "Hello", "score": -0.5}
    assert load_row({"prompt": "Q", "response": ""}).response == ""  # nothing but the terminator
    assert (load_row({"prompt": "Q"}).response, load_row({"prompt": "Q"}).score) == (None, None)


@pytest.mark.parametrize("score", [True, "1.5", None, [1], {"a": 1}, 10**400, float("nan"), float("inf")])
def test_a_score_of_another_type_is_only_a_column(load_row, score):
    example = load_row({"prompt": "Q", "score": score})
    assert example.score is None and str(example.columns["score"]) == str(score)


@pytest.mark.parametrize("response", [3, None, ["a"], {"content": "a"}])
def test_a_response_of_another_type_is_only_a_column(load_row, response):
    example = load_row({"prompt": "Q", "response": response})
    assert example.response is None and example.columns == {"response": response}


INVALID_ROWS = {
    "no json": "not JSON (Expecting value)",
    "[1]": "not an object with fields",
    '{"chosen": "x"}': "either prompt or messages is needed",
    '{"prompt": "x", "messages": []}': "either prompt or messages is needed, not both",
    '{"prompt": " "}': 'prompt must be a non-empty text, got " "',
    '{"prompt": 3}': "prompt must be a non-empty text, got 3",
    '{"prompt": null}': "prompt must be a non-empty text, got null",
    '{"prompt": "x", "chosen": ""}': 'chosen must be a non-empty text, got ""',
    '{"prompt": "x", "chosen": ["a"]}': 'chosen must be a non-empty text, got ["a"]',
    '{"prompt": "x", "chosen": "a", "rejected": 1}': "rejected must be a non-empty text, got 1",
    '{"prompt": "x", "rejected": "a"}': "rejected without chosen",
    '{"messages": []}': "messages must be a non-empty list, got []",
    '{"messages": "x"}': 'messages must be a non-empty list, got "x"',
    '{"messages": [{"role": "human", "content": "x"}]}': "the role of message 1 must be user, assistant or, in the "
    'first message, system, got "human"',
    '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}': "the role of message 2",
    '{"messages": ["x"]}': "the role of message 1 must be user, assistant or, in the first message, system, got null",
    '{"messages": [{"role": "user", "content": null}]}': "the content of message 1 must be a non-empty text",
    '{"messages": [{"role": "user", "content": ""}]}': "the content of message 1 must be a non-empty text",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "messages contain no turn to respond to",
    '{"messages": [{"role": "system", "content": "x"}]}': "messages contain no turn to respond to",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "chosen": "z"}': "both "
    "chosen and a last message by the assistant; only one can be the chosen reply",
}


@pytest.mark.parametrize("line", INVALID_ROWS)
def test_an_invalid_row_is_reported_with_its_file_and_number(write, error_line, line):
    file = write("rows.jsonl", [{"prompt": "a"}, "  ", line, {"prompt": "b"}])
    message = error_line(lambda: make_dataset(file).load("train"))
    assert message.startswith(f"dataset.path: {file}, row 3: {INVALID_ROWS[line]}")


def test_an_invalid_row_of_the_held_out_file_is_reported_with_that_files_key(write, error_line):
    train, held_out = write("a.jsonl", rows("a")), write("b.jsonl.gz", ["{}"])
    message = error_line(lambda: make_dataset(train, held_out).load("test"))
    assert message == f"dataset.held_out_path: {held_out}, row 1: either prompt or messages is needed"


def test_long_values_are_abbreviated_in_messages(write, error_line):
    file = write("rows.jsonl", [{"prompt": ["x" * 500]}])
    assert len(error_line(lambda: make_dataset(file).load("train"))) < len(str(file)) + 150


def test_one_in_three_distinct_prompts_is_held_out_with_all_its_rows(write):
    data = make_dataset(write("rows.jsonl.gz", [*rows(*"abacdced"), "", {"prompt": "f"}]), held_out_every=3)
    # distinct: a b c | d e f; the second and the sixth are held out, one of each group of three
    assert prompts(data, "test") == ["b", "f"]
    assert prompts(data, "train") == ["a", "a", "c", "d", "c", "e", "d"]


def test_a_folder_with_or_without_a_test_file(write, tmp_path):
    write("train.jsonl", rows("a", "b", "c"))
    assert prompts(make_dataset(tmp_path), "test") == ["b"] and prompts(make_dataset(tmp_path), "train") == ["a", "c"]
    write("test.jsonl.gz", rows("x"))
    assert prompts(make_dataset(tmp_path), "test") == ["x"] and prompts(make_dataset(tmp_path), "train") == [
        "a",
        "b",
        "c",
    ]
    other = write("other.jsonl", rows("y"))
    assert prompts(make_dataset(tmp_path, other), "test") == ["y"]


def test_missing_duplicate_and_unreadable_files(write, tmp_path, error_line):
    write("test.jsonl", rows("x"))
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert message == f"dataset.path: neither train.jsonl nor train.jsonl.gz in {tmp_path}; in it: test.jsonl"
    train = write("train.jsonl", rows("a"))
    write("train.jsonl.gz", rows("a"))
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert message == f"dataset.path: both train.jsonl and train.jsonl.gz are in {tmp_path}; remove one"
    absent = tmp_path / "absent.jsonl"
    assert error_line(lambda: make_dataset(absent).load("train")).startswith(f"dataset.path: cannot read {absent} (")
    message = error_line(lambda: make_dataset(train, absent).load("test"))
    assert message.startswith(f"dataset.held_out_path: cannot read {absent} (")
    assert error_line(lambda: make_dataset(write("none.jsonl", ["", " "])).load("train")).endswith(
        "none.jsonl has no rows"
    )
    one = write("one.jsonl", rows("a", "a"))
    assert error_line(lambda: make_dataset(one).load("test")) == (
        f"dataset.path: {one} has 1 distinct prompts, too few for dataset.held_out_every=2; lower that or add prompts"
    )
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert "cannot read" in error_line(lambda: make_dataset(tmp_path / "latin.jsonl").load("train"))
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "train.jsonl.gz").read_bytes()[:20])
    assert "cannot read" in error_line(lambda: make_dataset(tmp_path / "cut.jsonl.gz").load("train"))


def test_byte_order_mark_and_crlf_line_ends_are_accepted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{"prompt": "é\\n"}\r\n{"prompt": "b"}\r\n'.encode())
    assert prompts(make_dataset(file, file), "train") == ["é\n", "b"]


def test_prompt_style_is_the_users_choice(tmp_path):
    assert make_dataset(tmp_path).prompt_style is PromptStyle.hh
