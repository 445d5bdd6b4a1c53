"""dataset=jsonl: rows of one's own."""

import pytest

from apa_cli.datasets.base import PromptForm
from apa_cli.datasets.jsonl import JSONLines


def dataset(path, held_out_path=None, held_out_every=2):
    held_out = None if held_out_path is None else str(held_out_path)
    return JSONLines(str(path), held_out, held_out_every, PromptForm.hh, [])


def prompts(data, split):
    return [example.prompt for example in data.load(split)]


def rows(*names):
    return [{"prompt": name} for name in names]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def only_row(write):
    """only_row(row) → the example that it becomes."""

    def load(row):
        file = write("train.jsonl", [row])
        (example,) = dataset(file, held_out_path=file).load("train")
        return example

    return load


def test_a_prompt_with_replies_and_further_columns_to_the_letter(only_row):
    row = {"prompt": " Q? \n", "chosen": "yes ", "rejected": "no", "answer": 4, "tags": ["a", None]}
    example = only_row(row)
    assert (example.prompt, example.chosen, example.rejected) == (" Q? \n", "yes ", "no")
    assert example.columns == {"answer": 4, "tags": ["a", None]} and example.messages is None


@pytest.mark.parametrize("row", [{"prompt": "Q"}, {"prompt": "Q", "chosen": None, "rejected": None}])
def test_a_prompt_alone(only_row, row):
    example = only_row(row)
    assert (example.prompt, example.chosen, example.rejected, example.columns) == ("Q", None, None, {})


def test_messages_that_end_with_the_user_are_all_prompt(only_row):
    turns = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello"), {**user("Bye"), "name": "Al"}]
    example = only_row({"messages": turns, "id": 7})
    assert example.prompt == "Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    assert example.messages == [*turns[:3], user("Bye")]
    assert (example.chosen, example.rejected, example.columns) == (None, None, {"id": 7})


def test_a_last_message_of_the_assistants_is_the_chosen_reply(only_row):
    example = only_row({"messages": [user("Hi"), assistant("Hello")], "rejected": "What?"})
    assert (example.prompt, example.chosen, example.rejected) == ("\n\nHuman: Hi\n\nAssistant:", " Hello", " What?")
    assert example.messages == [user("Hi")]


def test_messages_with_both_replies_beside_them(only_row):
    example = only_row({"messages": [user("Hi")], "chosen": "a", "rejected": "b"})
    assert (example.chosen, example.rejected) == (" a", " b") and example.columns == {}


BAD = {
    "no json": "not JSON (Expecting value)",
    "[1]": "not an object with fields",
    '{"chosen": "x"}': "either prompt or messages is needed",
    '{"prompt": "x", "messages": []}': "either prompt or messages is needed, not both",
    '{"prompt": " "}': 'prompt must be a text that is not empty, got " "',
    '{"prompt": 3}': "prompt must be a text that is not empty, got 3",
    '{"prompt": null}': "prompt must be a text that is not empty, got null",
    '{"prompt": "x", "chosen": ""}': 'chosen must be a text that is not empty, got ""',
    '{"prompt": "x", "chosen": ["a"]}': 'chosen must be a text that is not empty, got ["a"]',
    '{"prompt": "x", "chosen": "a", "rejected": 1}': "rejected must be a text that is not empty, got 1",
    '{"prompt": "x", "rejected": "a"}': "rejected is given without chosen",
    '{"messages": []}': "messages must be a list that is not empty, got []",
    '{"messages": "x"}': 'messages must be a list that is not empty, got "x"',
    '{"messages": [{"role": "human", "content": "x"}]}': "the role of message 1 must be user, assistant or, in the "
    'first message, system, got "human"',
    '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}': "the role of message 2",
    '{"messages": ["x"]}': "the role of message 1 must be user, assistant or, in the first message, system, got null",
    '{"messages": [{"role": "user", "content": null}]}': "the content of message 1 must be a text that is not empty",
    '{"messages": [{"role": "user", "content": ""}]}': "the content of message 1 must be a text that is not empty",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "messages hold nothing to reply to",
    '{"messages": [{"role": "system", "content": "x"}]}': "messages hold nothing to reply to",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "chosen": "z"}': "chosen "
    "is given, and the last message is a reply of the assistant's too",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_one_line_with_its_file_and_number(write, refused, line):
    file = write("mine.jsonl", [{"prompt": "a"}, "  ", line, {"prompt": "b"}])
    message = refused(lambda: dataset(file).load("train"))
    assert message.startswith(f"dataset.path: {file}, row 3: {BAD[line]}")


def test_a_bad_row_of_the_held_out_file_names_its_own_key(write, refused):
    train, held_out = write("a.jsonl", rows("a")), write("b.jsonl.gz", ["{}"])
    message = refused(lambda: dataset(train, held_out).load("test"))
    assert message == f"dataset.held_out_path: {held_out}, row 1: either prompt or messages is needed"


def test_long_values_are_cut_in_messages(write, refused):
    file = write("mine.jsonl", [{"prompt": ["x" * 500]}])
    assert len(refused(lambda: dataset(file).load("train"))) < len(str(file)) + 150


def test_one_in_three_distinct_prompts_is_held_out_with_all_its_rows(write):
    data = dataset(write("mine.jsonl.gz", [*rows(*"abacdced"), "", {"prompt": "f"}]), held_out_every=3)
    # distinct: a b c | d e f; of each stretch one is held out, by key: the second, and the sixth
    assert prompts(data, "test") == ["b", "f"]
    assert prompts(data, "train") == ["a", "a", "c", "d", "c", "e", "d"]


def test_a_folder_with_both_files_or_one(write, tmp_path):
    write("train.jsonl", rows("a", "b", "c"))
    assert prompts(dataset(tmp_path), "test") == ["b"] and prompts(dataset(tmp_path), "train") == ["a", "c"]
    write("test.jsonl.gz", rows("x"))
    assert prompts(dataset(tmp_path), "test") == ["x"] and prompts(dataset(tmp_path), "train") == ["a", "b", "c"]
    other = write("other.jsonl", rows("y"))
    assert prompts(dataset(tmp_path, other), "test") == ["y"]


def test_files_that_are_missing_doubled_or_unreadable(write, tmp_path, refused):
    write("test.jsonl", rows("x"))
    message = refused(lambda: dataset(tmp_path).load("train"))
    assert message == f"dataset.path: neither train.jsonl nor train.jsonl.gz in {tmp_path}; in it: test.jsonl"
    train = write("train.jsonl", rows("a"))
    write("train.jsonl.gz", rows("a"))
    message = refused(lambda: dataset(tmp_path).load("train"))
    assert message == f"dataset.path: both train.jsonl and train.jsonl.gz are in {tmp_path}; one is needed"
    absent = tmp_path / "absent.jsonl"
    assert refused(lambda: dataset(absent).load("train")).startswith(f"dataset.path: cannot read {absent} (")
    message = refused(lambda: dataset(train, absent).load("test"))
    assert message.startswith(f"dataset.held_out_path: cannot read {absent} (")
    assert refused(lambda: dataset(write("none.jsonl", ["", " "])).load("train")).endswith("none.jsonl has no rows")
    one = write("one.jsonl", rows("a", "a"))
    assert refused(lambda: dataset(one).load("test")) == (
        f"dataset.path: {one} has 1 prompts, too few to hold out every 2th"
    )
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert "cannot read" in refused(lambda: dataset(tmp_path / "latin.jsonl").load("train"))
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "train.jsonl.gz").read_bytes()[:20])
    assert "cannot read" in refused(lambda: dataset(tmp_path / "cut.jsonl.gz").load("train"))


def test_a_mark_of_the_byte_order_and_lines_of_another_system_are_no_fault(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes('\ufeff{"prompt": "é\\n"}\r\n{"prompt": "b"}\r\n'.encode())
    assert prompts(dataset(file, file), "train") == ["é\n", "b"]


def test_the_form_of_prompts_is_the_users_choice(tmp_path):
    assert dataset(tmp_path).prompt_form is PromptForm.hh
