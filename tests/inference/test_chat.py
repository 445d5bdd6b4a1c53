"""apa-chat: the prompts that policy and reward see, how replies are sampled, and how a chat ends."""

import io
import json
import subprocess
import sys

import pytest

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.from_run import compose_from_run
from apa_cli.errors import UserError
from apa_cli.inference.chat import Conversation, choose_prompt_form, converse, read_line
from apa_cli.inference.trained_policy import PromptKind, read_first_prompt
from apa_cli.models.loading import find_end_token_ids, load_policy, load_tokenizer
from apa_cli.models.prompting import PromptFormat, format_chat
from apa_cli.rewards.base import Scores
from apa_cli.runs.records import RecordedRun

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<me>"


@pytest.fixture
def start_conversation(make_config):
    """start_conversation(*overrides, …) → a conversation with the tiny model; what its reward reads, as a list."""

    def make(*overrides: str, template: str | None = None, is_dialogue: bool = True, uses_template: bool = True):
        config = make_config(*overrides)
        policy = load_policy(config.model, config.model.path)
        tokenizer = load_tokenizer(config.model, config.model.path)
        tokenizer.chat_template = template
        scored = []

        def score(prompts, responses, columns):
            scored.extend(zip(prompts, responses, strict=True))
            return Scores([float(len(scored))])

        prompt_format = PromptFormat(tokenizer, config.dataset.prompt_style)
        ends = find_end_token_ids(policy, tokenizer)
        return Conversation(config, policy, prompt_format, ends, is_dialogue, uses_template, score), scored

    return make


def enter(conversation, *lines: str) -> list[str]:
    """Give these lines to a conversation, one after the other; return what it writes."""
    remaining, written = iter(lines), []

    def read():
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    converse(conversation, read, written.append)
    return written


def test_earlier_turns_stay_in_the_prompt_until_a_reset(start_conversation):
    conversation, scored = start_conversation()
    enter(conversation, "One?", "", "Two?", "/reset", "Three?", "/quit")
    replies = [reply.strip() for _, reply in scored]
    assert [prompt for prompt, _ in scored] == [
        "\n\nHuman: One?\n\nAssistant:",
        f"\n\nHuman: One?\n\nAssistant: {replies[0]}\n\nHuman: Two?\n\nAssistant:",
        "\n\nHuman: Three?\n\nAssistant:",
    ]


def test_every_line_can_be_a_prompt_of_its_own(start_conversation):
    conversation, scored = start_conversation(is_dialogue=False)
    enter(conversation, "Once upon", "  a time  ")
    assert [prompt for prompt, _ in scored] == ["Once upon", "a time"]


def test_a_chat_template_renders_the_dialogue_if_training_used_it(start_conversation):
    conversation, scored = start_conversation(template=TEMPLATE)
    enter(conversation, "One?")
    reply = scored[0][1].strip()
    conversation.messages.append({"role": "user", "content": "Two?"})
    prompt, _ = conversation.prompt_format.encode_prompt(conversation.build_example(), 0, 0, 100)
    tokenizer = conversation.prompt_format.tokenizer
    assert tokenizer.decode(prompt.token_ids) == f"<user>One?<assistant>{reply}<user>Two?<me>"
    assert scored[0][0] == "\n\nHuman: One?\n\nAssistant: "  # with the space that only chats have
    plain, scored = start_conversation(template=TEMPLATE, uses_template=False)
    enter(plain, "One?")
    assert scored[0][0] == "\n\nHuman: One?\n\nAssistant:"


def test_replies_depend_on_the_seed_and_the_turn(start_conversation):
    lines = ["Hello", "/reset", "Hello"]

    def sample(*overrides: str) -> list[str]:
        conversation, scored = start_conversation(*overrides)
        enter(conversation, *lines)
        return [reply for _, reply in scored]

    first, again, other = sample(), sample(), sample("seed=1")
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]
    cold = sample("sampling.temperature=1e-3")
    assert cold[0] == cold[1]  # always the most likely token, whatever the random numbers


def test_stop_strings_and_lengths_are_those_of_sampling(start_conversation):
    text = enter(start_conversation("sampling.max_new_tokens=40")[0], "Hello")[0]
    letter = next(char for char in text if char.isalpha())
    stop = f"sampling.stop_strings=['{letter}']"
    cut = enter(start_conversation("sampling.max_new_tokens=40", stop)[0], "Hello")[0]
    assert cut.splitlines()[0] == text.split(letter)[0].rstrip()
    short = enter(start_conversation("sampling.max_new_tokens=1")[0], "Hello")[0]
    assert len(short.splitlines()[0]) < len(text.splitlines()[0])


def test_scores_are_written_only_with_a_reward(start_conversation):
    conversation, scored = start_conversation()
    written = enter(conversation, "Hello", "Again")
    assert written[:2] == [f"{reply.strip()}\n[score {n}.000]" for n, (_, reply) in enumerate(scored, 1)]
    conversation, _ = start_conversation()
    conversation.score = None
    assert enter(conversation, "Hello", "/quit") == [written[0].rpartition("\n")[0]]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_chat_ends_with_the_input_and_at_ctrl_c(end, start_conversation):
    def read():
        raise end

    written = []
    converse(start_conversation()[0], read, written.append)
    assert written == [""]


@pytest.mark.parametrize("line", [b"caf\xe9", b"a \xed\xa0\x80"])  # Latin-1; a lone surrogate
def test_input_that_is_not_utf_8_is_one_line(line, monkeypatch):
    data = io.BytesIO("naïve 鑫\n".encode() + line + b"\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data, encoding="utf-8", errors="surrogateescape"))
    assert read_line() == "naïve 鑫"
    with pytest.raises(UserError, match=r"^chat: the input '.*' is not UTF-8; convert it") as error:
        read_line()
    assert "\n" not in str(error.value) and str(error.value).encode()


def test_a_long_line_is_cut_and_answered(start_conversation):
    """Text cut by tokens, decoded and encoded again may be as long as before."""
    conversation, scored = start_conversation("sampling.max_prompt_tokens=20", template=TEMPLATE)
    enter(conversation, "1234567890" * 30, "鑫" * 50)
    assert len(scored) == 2 and scored[0][0].removesuffix("\n\nAssistant: ").endswith("1234567890")


def test_an_unknown_command_is_answered_without_the_model(start_conversation):
    conversation, scored = start_conversation()
    assert "/reset" in enter(conversation, "/help", "/quit")[0] and not scored


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("Once upon a time", PromptKind.text),
        ("\n\nHuman: Hi\n\nAssistant:", PromptKind.dialogue),
        (format_chat([{"role": "user", "content": "Hi"}]), PromptKind.chat),
    ],
)
def test_the_kind_of_prompts_is_read_from_the_runs_samples(prompt, kind, tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"iteration": 0, "prompt": prompt}) + "\n")
    assert read_first_prompt(RecordedRun(tmp_path)) == (prompt, kind)


def test_the_runs_prompts_decide_and_chat_dialogue_overrides_them(run_train):
    run = RecordedRun.find(str(run_train("iterations=0")))  # story openings, which are no dialogues

    def configure(*overrides: str):
        return build_config(compose_from_run([f"run={run.directory}", *overrides], uses_reward=lambda cfg: False))

    assert choose_prompt_form(configure(), run) == (False, False)
    assert choose_prompt_form(configure("chat.dialogue=true"), run) == (True, False)
    assert choose_prompt_form(build_config(compose(["model.path=x"])), None) == (True, True)
    assert choose_prompt_form(build_config(compose(["model.path=x", "chat.dialogue=false"])), None) == (False, True)


@pytest.mark.slow
def test_a_chat_through_a_pipe(run_train, small_overrides, tmp_path):
    run = run_train("iterations=1", "optimizer.lr=1e-2", "evaluation.every=0")
    code = "import sys; from apa_cli.cli.chat import main; sys.argv[0] = 'apa-chat'; main()"
    overrides = [f"run={run}", "chat.score=true", "sampling.max_new_tokens=20", small_overrides[-1]]
    (tmp_path / "empty").mkdir()
    process = subprocess.run(
        [sys.executable, "-c", code, *overrides], input="Once there was\n/quit\nnever read\n",
        cwd=tmp_path / "empty", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    reply, score = process.stdout.rstrip("\n").rsplit("\n", 1)
    vowels = sum(map(reply.lower().count, "aeiou"))
    # The reward reads the reply with the white space before it, if there is any.
    scores = [vowels / (len(reply) + extra + 1) - 0.002 * (len(reply) + extra) for extra in range(4)]
    assert score in [f"[score {value:.3f}]" for value in scores]
    assert "every line is a prompt of its own" in process.stderr and "Traceback" not in process.stderr
    assert not list((tmp_path / "empty").iterdir())
