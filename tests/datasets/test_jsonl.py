"""dataset=jsonl: the user's own rows."""

from types import SimpleNamespace

import pytest

from apa_cli.datasets.base import PromptStyle
from apa_cli.datasets.jsonl import FIELDS, JSONLines


def make_dataset(path, held_out_path=None, held_out_every=2, subset=None, splits=("train", None), **columns):
    held_out = None if held_out_path is None else str(held_out_path)
    names = dict.fromkeys(FIELDS) | columns
    return JSONLines(str(path), names, subset, *splits, held_out, held_out_every, PromptStyle.hh, [])


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
    """load_row(row, **columns): return the example read from a file with this row."""

    def load(row, **columns):
        file = write("train.jsonl", [row])
        (example,) = make_dataset(file, held_out_path=file, **columns).load("train")
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


@pytest.mark.parametrize("score", [True, "good", "nan", "", None, [1], {"a": 1}, 10**400, float("nan"), float("inf")])
def test_a_score_of_another_type_is_only_a_column(load_row, score):
    example = load_row({"prompt": "Q", "score": score})
    assert example.score is None and str(example.columns["score"]) == str(score)


@pytest.mark.parametrize("response", [3, None, ["a"], {"content": "a"}])
def test_a_response_of_another_type_is_only_a_column(load_row, response):
    example = load_row({"prompt": "Q", "response": response})
    assert example.response is None and example.columns == {"response": response}


def test_a_score_may_be_a_number_in_text_as_in_csv(write, load_row):
    assert load_row({"prompt": "Q", "response": "A", "score": "-1.5"}).score == -1.5
    file = write("rows.csv", ["prompt,response,score,answer", "Q,A,0.25,007", "R,,,"])
    first, second = make_dataset(file, file).load("train")
    assert (first.prompt, first.response, first.score, first.columns["answer"]) == ("Q", "A", 0.25, "007")
    assert (second.response, second.score) == (None, None)


# --- forms of chats and pairs -------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be kind."}
CHAT = [SYSTEM, user("Hi"), assistant("Hello"), user("Bye")]
TEXT = "Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
GOOD, BAD = assistant("See you"), assistant("Go")
SHARE_GPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
    {"from": "human", "value": "Bye"},
]
PARTS = [{"type": "text", "text": "B"}, {"type": "text", "text": "ye", "image": None}]
PAIRS = {
    "prompt as messages": {"prompt": CHAT, "chosen": "See you", "rejected": "Go"},
    "only the assistant's turn": {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"messages": CHAT, "chosen": GOOD, "rejected": BAD},
    "whole dialogues": {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
    "whole dialogues, with their prompt": {"prompt": CHAT, "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
    "UltraFeedback": {
        "prompt": "Bye", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD], "messages": [*CHAT, GOOD],
    },
    "messages and a text": {"messages": [*CHAT, GOOD], "chosen": "See you", "rejected": "Go"},
    "one whole dialogue": {"messages": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
    "ShareGPT": {
        "conversations": SHARE_GPT, "chosen": {"from": "gpt", "value": "See you"},
        "rejected": {"from": "gpt", "value": "Go"},
    },
    "ShareGPT with its reply": {"conversations": [*SHARE_GPT, {"from": "gpt", "value": "See you"}], "rejected": "Go"},
    "nulls of other columns": {"messages": None, "prompt": None, "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
    "null fields of parquet": {
        "prompt": [{**turn, "from": None, "value": None} for turn in CHAT], "chosen": [GOOD], "rejected": [BAD],
    },
    "parts": {"prompt": [*CHAT[:-1], {"role": "user", "content": PARTS}], "chosen": [GOOD], "rejected": [BAD]},
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_a_chat_with_a_pair_is_the_same_example(load_row, form):
    example = load_row({**PAIRS[form], "id": 7})
    assert (example.prompt, example.chosen, example.rejected) == (TEXT, " See you", " Go")
    assert example.messages == CHAT and example.columns == {"id": 7}


def test_a_text_prompt_with_replies_as_messages_is_the_users_turn(load_row):
    example = load_row({"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]})
    assert example.messages == [user("Hi")] and example.prompt == "\n\nHuman: Hi\n\nAssistant:"
    assert (example.chosen, example.rejected) == (" a", " b")


@pytest.mark.parametrize(
    ("role", "expected"), [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("developer", "system")]
)
def test_other_names_of_roles(load_row, role, expected):
    example = load_row({"messages": [{"role": role, "content": "x"}, user("y")]})
    assert example.messages == [{"role": expected, "content": "x"}, user("y")]


def test_a_column_conversations_that_is_no_list_is_a_column(load_row):
    example = load_row({"prompt": "Q", "conversations": 3})
    assert example.columns == {"conversations": 3}


# --- columns ------------------------------------------------------------------------------------------------


def test_columns_maps_names_to_the_datas_columns_which_stay_columns(load_row):
    row = {"question": "Q", "good": "a", "bad": "b", "said": "c", "votes": 3, "prompt": "other", "score": "x"}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad", "response": "said", "score": "votes"}
    example = load_row(row, **names)
    assert (example.prompt, example.chosen, example.rejected) == ("Q", "a", "b")
    assert (example.response, example.score, example.columns) == ("c", 3.0, row)
    example = load_row({"dialog": [*CHAT, GOOD], "turn": [*CHAT, BAD]}, messages="dialog", rejected="turn")
    assert (example.prompt, example.chosen, example.rejected) == (TEXT, " See you", " Go")


def test_a_template_joins_columns(load_row):
    row = {"words": ["a", "b"], "n": 2, "none": None, "t": True}
    example = load_row(row, prompt="Use {words} ({n}{none}, {t}).\\nSentence:")
    assert example.prompt == "Use a, b (2, True).\nSentence:" and example.columns == row


@pytest.mark.parametrize(
    ("row", "columns", "problem"),
    [
        ({"a": 1}, {"prompt": "b"}, "dataset.columns.prompt: no row of FILE has the column 'b'; the first one has a"),
        ({"a": 1}, {"prompt": "{a} {b}"}, "dataset.columns.prompt: no row of FILE has the column 'b'; the first one"),
        ({"prompt": "a"}, {"chosen": "b"}, "dataset.columns.chosen: no row of FILE has the column 'b'"),
        (
            {"a": 1},
            {"prompt": "a"},
            "dataset.path: FILE, row 1: a must be a non-empty text or a list of messages, got 1",
        ),
        ({"a": {"b": 1}}, {"prompt": "{a}"}, 'dataset.path: FILE, row 1: a template cannot show {"b": 1}'),
        (
            {"a": None},
            {"prompt": "{a}"},
            "dataset.path: FILE, row 1: {a} must be a non-empty text or a list of messages",
        ),
        ({"prompt": "a", "b": [1]}, {"response": "b"}, "dataset.path: FILE, row 1: b is no response, got [1]"),
        ({"prompt": "a", "b": "x"}, {"score": "b"}, 'dataset.path: FILE, row 1: b is no score, got "x"'),
    ],
)
def test_wrong_columns_are_errors(write, error_line, row, columns, problem):
    file = write("rows.jsonl", [row])
    message = error_line(lambda: make_dataset(file, **columns).load("train"))
    assert message.startswith(problem.replace("FILE", str(file)))


def test_a_row_without_a_column_of_the_template_is_named(write, error_line):
    file = write("rows.jsonl", [{"a": 1}, {"b": 2}])
    message = error_line(lambda: make_dataset(file, prompt="{a}").load("train"))
    assert message == f"dataset.path: {file}, row 2: no column 'a' for the template '{{a}}'"


def test_held_out_rows_may_be_without_responses(write):
    train, held_out = write("a.jsonl", [{"q": "x", "a": "y"}]), write("b.jsonl", [{"q": "z"}])
    assert prompts(make_dataset(train, held_out, prompt="q", chosen="a"), "test") == ["z"]


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="columns: 'promt' is none of prompt, messages, chosen, rejected, response, score"
    ):
        make_dataset("x", promt="a")
    with pytest.raises(ValueError, match=r"columns.prompt: \['a'\] is not the name of a column"):
        make_dataset("x", prompt=["a"])


# --- invalid rows -------------------------------------------------------------------------------------------

ROLES = "must be user, assistant or, in the first message, system, got"
INVALID_ROWS = {
    "no json": "not JSON (Expecting value); one object per line, or one array of objects, is needed",
    "[1]": "not an object with fields",
    "3": "not an object with fields",
    '{"chosen": "x"}': "no prompt; the columns are chosen; name the one with the prompt by "
    "dataset.columns.prompt=COLUMN, or the one with messages by dataset.columns.messages=COLUMN",
    "{}": "no prompt; the columns are none; name",
    '{"prompt": "x", "messages": []}': "messages must be a non-empty list of messages, got []",
    '{"prompt": " "}': 'prompt must be a non-empty text or a list of messages, got " "',
    '{"prompt": 3}': "prompt must be a non-empty text or a list of messages, got 3",
    '{"prompt": null}': "prompt must be a non-empty text or a list of messages, got null",
    '{"prompt": []}': "prompt must be a non-empty list of messages, got []",
    '{"prompt": ["a", "b"]}': 'prompt must be a text or a list of messages, got ["a", "b"]; a template joins texts, as '
    "'dataset.columns.prompt=\"{prompt}\"'",
    '{"prompt": "x", "chosen": ""}': 'chosen must be a non-empty text, got ""',
    '{"prompt": "x", "chosen": ["a"]}': 'chosen: message 1 must be {"role": …, "content": …}, got "a"',
    '{"prompt": "x", "chosen": []}': "chosen must be a non-empty list of messages, got []",
    '{"prompt": "x", "chosen": "a", "rejected": 1}': "rejected must be a non-empty text or a list of messages, got 1",
    '{"prompt": "x", "rejected": "a"}': "rejected without chosen",
    '{"messages": []}': "messages must be a non-empty list of messages, got []",
    '{"messages": "x"}': 'messages must be a non-empty list of messages, got "x"',
    '{"messages": [{"role": "tool", "content": "x"}]}': f'messages: the role of message 1 {ROLES} "tool"',
    '{"messages": [{"role": ["user"], "content": "x"}]}': f'messages: the role of message 1 {ROLES} ["user"]',
    '{"messages": [{"content": "x"}]}': f"messages: the role of message 1 {ROLES} null",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}': "messages: the role of "
    "message 2",
    '{"messages": ["x"]}': 'messages: message 1 must be {"role": …, "content": …}, got "x"',
    '{"messages": [{"role": "user", "content": null}]}': "messages: the content of message 1 must be a non-empty text",
    '{"messages": [{"role": "user", "content": ""}]}': "messages: the content of message 1 must be a non-empty text",
    '{"messages": [{"role": "user", "content": []}]}': "messages: the content of message 1 must be a non-empty text",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "messages: the content of message 1 has a part "
    'of type "image"; only text can be read',
    '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': "messages: the content of message 1 has a part",
    '{"messages": [{"role": "user", "content": ["x"]}]}': 'messages: the content of message 1 has a part of type "x"',
    '{"messages": [{"role": "assistant", "content": "x"}]}': "no turn to respond to in messages",
    '{"messages": [{"role": "system", "content": "x"}]}': "no turn to respond to in messages",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "chosen": "z"}': "both "
    "chosen and a last message by the assistant in messages; only one can be the chosen reply",
    '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}': "prompt ends with the "
    "assistant's turn; dataset.columns.messages=prompt makes that chosen",
    '{"prompt": "x", "chosen": [{"role": "user", "content": "y"}]}': "chosen: the last message must be the "
    "assistant's, got the role user",
    '{"chosen": [{"role": "assistant", "content": "y"}]}': "no turn to respond to in chosen",
    '{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}': "prompt is none of the turns of messages; leave",
    '{"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "rejected": [{"role": '
    '"user", "content": "z"}, {"role": "assistant", "content": "y"}]}': "chosen and rejected differ before the last",
    '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}': "chosen and "
    "rejected are whole dialogues in HH's format, without a prompt; give dataset=hh dataset.path=FOLDER "
    "dataset.subsets=null, with train.jsonl and test.jsonl in FOLDER",
    '{"prompt": "x", "a": {"b": ["\\udc00"]}}': "half of a surrogate pair, which is no character, in '\\udc00'",
}


@pytest.mark.parametrize("line", INVALID_ROWS)
def test_an_invalid_row_is_reported_with_its_file_and_number(write, error_line, line):
    file = write("rows.jsonl", [{"prompt": "a"}, "  ", line, {"prompt": "b"}])
    message = error_line(lambda: make_dataset(file).load("train"))
    assert message.startswith(f"dataset.path: {file}, row 3: {INVALID_ROWS[line]}")


def test_an_invalid_row_of_the_held_out_file_is_reported_with_that_files_key(write, error_line):
    train, held_out = write("a.jsonl", rows("a")), write("b.jsonl.gz", ["{}"])
    message = error_line(lambda: make_dataset(train, held_out).load("test"))
    assert message == (
        f"dataset.held_out_path: {held_out}, row 1: no prompt; the columns are none; name the "
        "one with the prompt by dataset.columns.prompt=COLUMN, or the one with messages by "
        "dataset.columns.messages=COLUMN"
    )


def test_long_values_are_abbreviated_in_messages(write, error_line):
    file = write("rows.jsonl", [{"prompt": ["x" * 500]}])
    assert len(error_line(lambda: make_dataset(file).load("train"))) < len(str(file)) + 200


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
    assert message == f"dataset.path: {tmp_path} has no split train, only test"
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
    assert "row 1: not UTF-8" in error_line(lambda: make_dataset(tmp_path / "latin.jsonl").load("train"))
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "train.jsonl.gz").read_bytes()[:20])
    assert "cannot read" in error_line(lambda: make_dataset(tmp_path / "cut.jsonl.gz").load("train"))


def test_byte_order_mark_and_crlf_line_ends_are_accepted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{"prompt": "é\\n"}\r\n{"prompt": "b"}\r\n'.encode())
    assert prompts(make_dataset(file, file), "train") == ["é\n", "b"]


@pytest.mark.parametrize("name", ["train.json", "train.csv", "train.parquet"])
def test_other_formats_in_a_file_and_in_a_folder(tmp_path, name):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"]}), file)
    else:
        file.write_text(
            '[{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]' if "json" in name else "prompt\na\nb\nc\n"
        )
    for path in (file, tmp_path):
        data = make_dataset(path)
        assert (prompts(data, "train"), prompts(data, "test")) == (["a", "c"], ["b"])


def test_a_folder_in_the_hubs_layout_with_subsets_and_splits(write, tmp_path, error_line):
    for name in ("main", "other"):
        write(f"{name}/train-00000-of-00001.jsonl", rows(f"{name} train"))
        write(f"{name}/validation-00000-of-00001.jsonl", rows(f"{name} validation"))
        write(f"{name}/extra-00000-of-00001.jsonl", rows(f"{name} extra"))
    splits = "".join(f"    - {{split: {split}, path: NAME/{split}-*}}\n" for split in ("train", "validation", "extra"))
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n{splits.replace('NAME', name)}" for name in ("main", "other")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    data = make_dataset(tmp_path, subset="other")
    assert (prompts(data, "train"), prompts(data, "test")) == (["other train"], ["other validation"])
    data = make_dataset(tmp_path, subset="main", splits=("validation", "extra"))
    assert (prompts(data, "train"), prompts(data, "test")) == (["main validation"], ["main extra"])
    message = error_line(lambda: make_dataset(tmp_path).load("train"))
    assert message.startswith(f"dataset.path: cannot read {tmp_path} (Config name is missing")
    message = error_line(lambda: make_dataset(tmp_path, subset="main", splits=("train", "tset")).load("train"))
    assert message == f"dataset.path: {tmp_path} has no split tset, only train, validation, extra"
    file = tmp_path / "main" / "train-00000-of-00001.jsonl"
    message = error_line(lambda: make_dataset(file, subset="main").load("train"))
    assert message.startswith(f"dataset.path: {file} is a file, without splits; leave out dataset.subset")


def test_a_folder_whose_name_has_brackets(write, tmp_path, error_line):
    write("a [1], b/train.jsonl", rows("a", "b", "c"))
    assert prompts(make_dataset(tmp_path / "a [1], b"), "train") == ["a", "c"]
    write("c [1]/validation.csv", ["prompt", "x"])
    message = error_line(lambda: make_dataset(tmp_path / "c [1]").load("train"))
    assert message == f"dataset.path: {tmp_path}/c [1] has no split train, only validation"


def test_prompts_that_differ_in_white_space_only_are_on_one_side(write):
    data = make_dataset(write("rows.jsonl", rows("a b", "c", "d", "a  b\n", "e", "f", " a b", "g")), held_out_every=3)
    # distinct: a b, c, d | e, f, g; the second and the sixth are held out
    assert prompts(data, "test") == ["c", "g"]
    assert prompts(data, "train") == ["a b", "d", "a  b\n", "e", "f", " a b"]


def test_a_run_counts_prompts_and_removes_held_out_ones_whatever_their_white_space(write):
    from apa_cli.training.examples import load_examples

    train, held_out = (
        write("train.jsonl", rows("a  b", "c", "c", " c", "d")),
        write("test.jsonl", rows("a b ", "e", "e")),
    )
    lines = []
    examples, held_out_examples = load_examples(SimpleNamespace(dataset=make_dataset(train, held_out)), lines.append)
    assert [row.prompt for row in examples] == ["c", "c", " c", "d"] and len(held_out_examples) == 3
    assert lines == [
        "dataset: 1 held-out prompts are also in train and are left out of it, such as 'a b'",
        "dataset: 4 rows of 2 prompts to train on, 3 rows of 2 prompts held out",
    ]


def test_real_files_by_their_columns(real):
    names = {"prompt": "Use {concepts}.", "chosen": "A sentence with {concepts}."}
    data = make_dataset(real("commongen"), **names)
    example = data.load("train")[0]
    assert example.prompt == "Use chicken, cheese, pizza, broccoli." and example.columns["references"]
    assert len(data.load("test")) == 1497 and data.load("test")[0].prompt.startswith("Use ")
    data = make_dataset(real("reddit-tldr"), prompt="post", chosen="summary")
    assert len(data.load("test")) == 1000 and data.load("test")[0].chosen == data.load("test")[0].columns["summary"]


def test_prompt_style_is_the_users_choice(tmp_path):
    assert make_dataset(tmp_path).prompt_style is PromptStyle.hh
