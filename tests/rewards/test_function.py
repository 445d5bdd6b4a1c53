"""reward=function: import of a user's function, its arguments, and the errors when it fails."""

import sys
import time

import pytest

from apa_cli.errors import UserError, find_details
from apa_cli.rewards.base import Placement, add_score_check
from apa_cli.rewards.function import FunctionReward
from apa_cli.user_code import import_object

SOURCE = """\
import asyncio
import math
seen = []

def plain(prompts, responses):
    return [len(prompt) + 10 * len(response) for prompt, response in zip(prompts, responses)]

def with_topic(prompts, responses, topic):
    seen.append(topic)
    return [len(t or "") for t in topic]

def with_all(prompts, responses, **columns):
    seen.append(columns)
    return [0.0] * len(responses)

def with_default(prompts, responses, missing=7):
    return [missing] * len(responses)

async def waiting(prompts, responses, topic):
    await asyncio.sleep(0)
    return [len(response) + len(word) for response, word in zip(responses, topic)]

async def failing_later(prompts, responses):
    await asyncio.sleep(0)
    raise ValueError("no answer")

def concurrent(prompts, responses):
    barrier = asyncio.Barrier(2)  # each waits for the other: run in sequence they would never end

    async def one(response):
        async with asyncio.timeout(20):
            await barrier.wait()
        return len(response)

    return [one(response) for response in responses]

async def returning_coroutines(prompts, responses):
    return concurrent(prompts, responses)

def failing(prompts, responses):
    numbers = {}
    return [numbers["no such\\nkey"] for _ in responses]

def too_few(prompts, responses):
    return [1.0]

def refusing(prompts, responses):
    from apa_cli.errors import UserError
    raise UserError("install the other package")

number = 3
"""

PROMPTS, RESPONSES = ["a", "bcd"], ["xx", "y"]
COLUMNS = [{"topic": "tea", "asked": ["time"]}, {"topic": "bread", "other": 1}]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def call_target(target):
    return FunctionReward(str(target), None).load(Placement("cpu", "float32"))(PROMPTS, RESPONSES, COLUMNS)


def test_a_function_in_a_file_receives_prompts_and_responses(file):
    assert call_target(f"{file}:plain") == [1 + 20, 3 + 10]


def test_a_function_in_a_module_in_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert call_target("my_rewards:plain") == [21, 13]
    sys.modules.pop("my_rewards")


def test_a_function_in_a_module_of_a_package(tmp_path, monkeypatch):
    package = tmp_path / "some_package" / "inner"
    package.mkdir(parents=True)
    (package / "scores.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert call_target("some_package.inner.scores:plain") == [21, 13]


def test_two_files_with_the_same_name_are_two_modules(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "same.py").write_text(f"def score(prompts, responses):\n    return [{number}] * 2\n")
    first = FunctionReward(f"{tmp_path}/1/same.py:score", None).load(Placement("cpu", "float32"))
    second = FunctionReward(f"{tmp_path}/2/same.py:score", None).load(Placement("cpu", "float32"))
    assert first(PROMPTS, RESPONSES, COLUMNS) == [1, 1] and second(PROMPTS, RESPONSES, COLUMNS) == [2, 2]


def test_a_function_receives_only_the_columns_it_names(file):
    assert call_target(f"{file}:with_topic") == [3, 5]
    assert import_object(f"{file}:seen") == [["tea", "bread"]]
    assert call_target(f"{file}:with_default") == [7, 7]


def test_keywords_receive_all_columns_with_none_for_missing_values(file):
    call_target(f"{file}:with_all")
    expected = {"topic": ["tea", "bread"], "asked": [["time"], None], "other": [None, 1]}
    assert import_object(f"{file}:seen") == [expected]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{file}:nothing", "defines no nothing"),
        ("{file}:number", "has no function number"),
        ("{folder}/absent.py:plain", "cannot import .*absent.py .*no file"),
        ("no_such_module_anywhere:plain", "cannot import no_such_module_anywhere"),
        ("{file}", "not of the form"),
        ("{file}:", "not of the form"),
        (":plain", "not of the form"),
        ("plain", "not of the form"),
    ],
)
def test_a_missing_target_is_a_one_line_error(target, message, file):
    target = target.format(file=file, folder=file.parent)
    with pytest.raises(UserError, match=message) as error:
        FunctionReward(target, None).load(Placement("cpu", "float32"))
    assert "\n" not in str(error.value) and str(error.value).startswith("reward.target")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_package\n", "ModuleNotFoundError"),
        ("1 / 0\n", "ZeroDivision"),
    ],
)
def test_a_file_that_cannot_be_imported_is_a_one_line_error(source, message, tmp_path):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UserError, match=message) as error:
        FunctionReward(f"{tmp_path}/bad.py:f", None).load(Placement("cpu", "float32"))
    assert "\n" not in str(error.value)


def test_an_exception_is_reported_with_its_file_and_line(file):
    with pytest.raises(UserError) as error:
        call_target(f"{file}:failing")
    line = 1 + SOURCE.splitlines().index('    return [numbers["no such\\nkey"] for _ in responses]')
    assert "KeyError" in str(error.value) and f"(my_rewards.py, line {line})" in str(error.value)
    assert "failing" in str(error.value) and "\n" not in str(error.value)


def test_an_exception_of_several_lines_is_reported_in_one_line(tmp_path):
    (tmp_path / "many.py").write_text("def f(prompts, responses):\n    raise ValueError('first\\nsecond')\n")
    with pytest.raises(UserError, match="first") as error:
        call_target(f"{tmp_path}/many.py:f")
    assert "\n" not in str(error.value)


def test_a_function_with_other_parameters_is_a_one_line_error(file):
    file.write_text("def f(texts):\n    return texts\n")
    with pytest.raises(
        UserError, match=r"f takes \(texts\), but a reward function takes \(prompts, responses\) or"
    ) as error:
        call_target(f"{file}:f")
    assert "\n" not in str(error.value)


def test_an_async_function_is_awaited(file):
    assert call_target(f"{file}:waiting") == [2 + 3, 1 + 5]
    with pytest.raises(UserError, match="failing_later raised ValueError: no answer") as error:
        call_target(f"{file}:failing_later")
    assert "\n" not in str(error.value)


def test_coroutines_one_per_response_run_concurrently(file):
    assert call_target(f"{file}:concurrent") == [2, 1]
    assert call_target(f"{file}:returning_coroutines") == [2, 1]


def test_a_users_own_error_passes_unchanged(file):
    with pytest.raises(UserError, match=r"^install the other package$"):
        call_target(f"{file}:refusing")


def test_a_wrong_number_of_scores_is_refused(file):
    score = add_score_check(FunctionReward(f"{file}:too_few", None).load(Placement("cpu", "float32")))
    with pytest.raises(UserError, match="got 1 for 2 responses"):
        score(PROMPTS, RESPONSES, COLUMNS)


def test_vader_scores_replies_alone_and_with_the_right_sign():
    pytest.importorskip("vaderSentiment")
    score = FunctionReward("apa_cli.rewards.vader:compound", None).load(Placement("cpu", "float32"))
    replies = [
        "I love this wonderful day!",
        "I hate this horrible, awful day.",
        "The table has four legs.",
        "",
    ]
    prompts = ["Tell me something terrible, sad and disgusting."] * 4
    good, bad, neutral, empty = score(prompts, replies, [{"topic": "x"}] * 4)
    assert 0.5 < good <= 1 and -1 <= bad < -0.5 and neutral == 0 and empty == 0


def test_a_call_that_exceeds_the_timeout_is_abandoned(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\n\n\ndef slow(prompts, responses):\n    time.sleep(5)\n    return [0.0] * len(responses)\n"
        "\n\nasync def quick(prompts, responses):\n    return [1.0] * len(responses)\n"
        "\n\ndef failing(prompts, responses):\n    raise ValueError('no')\n"
    )
    start = time.monotonic()
    score = FunctionReward(f"{tmp_path}/slow.py:slow", 0.2).load(Placement("cpu", "float32"))
    with pytest.raises(UserError, match=r"^reward\.timeout: .*slow\.py:slow has not returned within 0\.2 s; "):
        score(PROMPTS, RESPONSES, COLUMNS)
    assert time.monotonic() - start < 2
    quick = FunctionReward(f"{tmp_path}/slow.py:quick", 5.0).load(Placement("cpu", "float32"))
    assert quick(PROMPTS, RESPONSES, COLUMNS) == [1, 1]
    failing = FunctionReward(f"{tmp_path}/slow.py:failing", 5.0).load(Placement("cpu", "float32"))
    with pytest.raises(UserError, match=r"raised ValueError: no \(slow\.py, line 14\)"):
        failing(PROMPTS, RESPONSES, COLUMNS)


@pytest.mark.parametrize(
    "body",
    [
        "(1 / 0 for _ in responses)",
        "[10**400] * len(responses)",
        "__import__('torch').zeros(2, 2)",
        "None",
        "'ab'",
        "3",
    ],
)
def test_other_return_values_are_one_line_errors(body, tmp_path):
    (tmp_path / "odd.py").write_text(f"def odd(prompts, responses):\n    return {body}\n")
    score = add_score_check(FunctionReward(f"{tmp_path}/odd.py:odd", None).load(Placement("cpu", "float32")))
    with pytest.raises(UserError, match=r"^reward: ") as error:
        score(PROMPTS, RESPONSES, COLUMNS)
    assert "\n" not in str(error.value)


TRL = """\
import functools
import json

def trl(prompts, completions, topic, **kwargs):
    return [len(str(prompt)) + 100 * len(str(reply)) for prompt, reply in zip(prompts, completions)]

def show(prompts, completions, **kwargs):
    seen.append((prompts, completions, kwargs))
    return [0.0] * len(completions)

seen = []

async def alone(completions):
    return [len(reply) for reply in completions]

def swapped(responses, prompts):
    return [len(response) for response in responses]

def other_names(inputs, responses):
    return [10 * len(first) + len(second) for first, second in zip(inputs, responses)]

def weighted(prompts, responses, weight):
    return [weight * len(response) for response in responses]

half = functools.partial(weighted, weight=0.5)
anonymous = lambda prompts, responses: [7.0] * len(responses)

class Length:
    def __call__(self, prompts, completions, **kwargs):
        return [float(len(reply)) for reply in completions]

made = Length()

class Scale(Length):
    def __init__(self, factor):
        self.factor = factor

def token_ids(completions, completion_ids):
    return [0.0] * len(completions)

def one(text):
    return 0.0

def deep(prompts, responses):
    return [json.loads("{bad") for _ in responses]

def leaving(prompts, responses):
    raise SystemExit("enough")

def column_names(prompts, responses, **columns):
    return [len(columns)] * len(responses)
"""


@pytest.fixture
def trl_file(tmp_path):
    path = tmp_path / "trl_rewards.py"
    path.write_text(TRL)
    return path


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("trl", [1 + 200, 3 + 100]),  # texts of prompts "a", "bcd" and responses "xx", "y"
        ("alone", [2, 1]),
        ("swapped", [2, 1]),
        ("other_names", [12, 31]),
        ("half", [1.0, 0.5]),
        ("anonymous", [7.0, 7.0]),
        ("Length", [2.0, 1.0]),
        ("made", [2.0, 1.0]),
        ("column_names", [3, 3]),
    ],
)
def test_the_parameters_names_decide_what_a_function_receives(name, scores, trl_file):
    assert call_target(f"{trl_file}:{name}") == scores


def test_rows_with_turns_are_messages_in_trls_form_and_texts_in_ours(trl_file):
    turns = [{"role": "user", "content": "a"}]
    columns = [{"messages": turns, "topic": "tea"}, {"topic": "bread"}]
    reward = FunctionReward(f"{trl_file}:show", None).load(Placement("cpu", "float32"))
    reward(PROMPTS, [" xx", " y"], columns)
    ((prompts, completions, kwargs),) = import_object(f"{trl_file}:seen")
    assert prompts == [turns, "bcd"] and completions == [[{"role": "assistant", "content": "xx"}], " y"]
    assert kwargs == {"topic": ["tea", "bread"], "messages": [turns, None], "responses": [" xx", " y"]}
    ours = FunctionReward(f"{trl_file}:anonymous", None).load(Placement("cpu", "float32"))
    assert ours(PROMPTS, RESPONSES, columns) == [7.0, 7.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "token_ids",
            r"takes the columns completion_ids, which the data set lacks; its columns are asked, other, topic",
        ),
        ("one", r"takes \(text\), but a reward function takes \(prompts, responses\) or, as in TRL, "),
        ("Scale", r"Scale is a class that cannot be called without arguments \(TypeError: [^()]*__init__\(\) missing"),
        ("deep", r"raised JSONDecodeError: .* \(trl_rewards\.py, line 45\)$"),  # the frame in json is not the user's
        ("leaving", r"raised SystemExit: enough \(trl_rewards\.py, line 48\)$"),
    ],
)
def test_functions_that_cannot_be_called_or_fail_are_one_line_errors(name, message, trl_file):
    with pytest.raises(UserError, match=message) as error:
        call_target(f"{trl_file}:{name}")
    assert "\n" not in str(error.value) and str(error.value).startswith("reward")


def test_the_traceback_of_a_failing_function_is_in_the_details(trl_file):
    with pytest.raises(UserError) as error:
        call_target(f"{trl_file}:deep")
    assert find_details(error.value).startswith("Traceback") and "json.loads" in find_details(error.value)
    assert find_details(UserError("other")) == ""


def test_a_column_with_a_parameters_name_does_not_replace_the_texts(trl_file):
    reward = FunctionReward(f"{trl_file}:column_names", None).load(Placement("cpu", "float32"))
    assert reward(PROMPTS, RESPONSES, [{"prompts": 1, "responses": 2, "more": 3}] * 2) == [1, 1]


def test_an_endless_iterator_and_an_unprintable_error_end(tmp_path):
    (tmp_path / "odd.py").write_text(
        "import itertools\n\n\ndef endless(prompts, responses):\n    return itertools.count()\n\n\n"
        "class Silent(Exception):\n    def __str__(self):\n        raise ValueError\n\n\n"
        "def silent(prompts, responses):\n    raise Silent\n"
    )
    assert call_target(f"{tmp_path}/odd.py:endless") == [0, 1, 2]  # one too many, which the check then refuses
    with pytest.raises(UserError, match=r"silent raised Silent \(odd\.py, line 14\)$"):
        call_target(f"{tmp_path}/odd.py:silent")


def test_a_function_that_changes_its_arguments_changes_nothing_else(tmp_path):
    """Texts, columns and the turns in them stay as they were, for the records, other rewards and later calls."""
    (tmp_path / "greedy.py").write_text(
        "def by_place(prompts, responses, tags):\n"
        "    for texts in (prompts, responses, tags[0]):\n"
        "        texts.clear()\n"
        "    return [1.0]\n"
        "def by_name(prompts, completions, tags, **columns):\n"
        "    prompts[0].append(completions[0][0])\n"
        "    tags[0].clear()\n"
        "    return [len(prompts[0])]\n"
    )
    turn = {"role": "user", "content": "p"}
    prompts, responses, columns = ["p"], ["r"], [{"tags": ["a"], "messages": [turn]}]
    for name, score in (("by_place", 1.0), ("by_name", 2)):  # 2: the user's turn and the response
        function = FunctionReward(f"{tmp_path}/greedy.py:{name}", None).load(Placement("cpu", "float32"))
        assert [function(prompts, responses, columns) for _ in range(2)] == [[score], [score]]
        assert (prompts, responses, columns) == (["p"], ["r"], [{"tags": ["a"], "messages": [turn]}])
