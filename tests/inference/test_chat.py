"""apa-chat: what the policy is shown of what was said, how its replies are drawn, and how it ends."""

import json
import subprocess
import sys
from functools import partial

import pytest

from apa_cli.config.build import build
from apa_cli.config.compose import compose
from apa_cli.config.from_run import compose_run
from apa_cli.inference.chat import Conversation, converse, prompts_of
from apa_cli.inference.trained import PromptKind, an_evaluated_prompt
from apa_cli.models.loading import end_tokens, load_policy, load_tokenizer
from apa_cli.models.prompting import PromptFormat, chat_text
from apa_cli.rewards.base import Scores

look = partial(compose_run, scores=lambda cfg: False)
"""compose_run for a command that asks no reward."""

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<me>"


@pytest.fixture
def talk(configured):
    """talk(*words, …) → a conversation with the tiny model, and the prompts and replies that its reward is shown."""

    def make(*words: str, template: str | None = None, dialogue: bool = True, templated: bool = True):
        config = configured(*words)
        policy = load_policy(config.model, config.model.path)
        tokenizer = load_tokenizer(config.model, config.model.path)
        tokenizer.chat_template = template
        seen = []

        def score(prompts, responses, columns):
            seen.extend(zip(prompts, responses, strict=True))
            return Scores([float(len(seen))])

        form = PromptFormat(tokenizer, config.dataset.prompt_form)
        ends = end_tokens(policy, tokenizer)
        return Conversation(config, policy, form, ends, dialogue, templated, score), seen

    return make


def session(conversation, *lines: str) -> list[str]:
    """What is written when these lines are read, one after the other."""
    waiting, written = iter(lines), []

    def read():
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    converse(conversation, read, written.append)
    return written


def test_what_was_said_stays_in_the_prompt_until_reset(talk):
    conversation, seen = talk()
    session(conversation, "One?", "", "Two?", "/reset", "Three?", "/quit")
    said = [reply.strip() for _, reply in seen]
    assert [prompt for prompt, _ in seen] == [
        "\n\nHuman: One?\n\nAssistant:",
        f"\n\nHuman: One?\n\nAssistant: {said[0]}\n\nHuman: Two?\n\nAssistant:",
        "\n\nHuman: Three?\n\nAssistant:",
    ]


def test_every_line_can_be_a_prompt_of_its_own(talk):
    conversation, seen = talk(dialogue=False)
    session(conversation, "Once upon", "  a time  ")
    assert [prompt for prompt, _ in seen] == ["Once upon", "a time"]


def test_a_chat_template_renders_the_dialogue_where_training_had_it_so(talk):
    conversation, seen = talk(template=TEMPLATE)
    session(conversation, "One?")
    said = seen[0][1].strip()
    conversation.messages.append({"role": "user", "content": "Two?"})
    prompt, _ = conversation.format.prompt(conversation.example(), 0, 0, 100)
    tokenizer = conversation.format.tokenizer
    assert tokenizer.decode(prompt.token_ids) == f"<user>One?<assistant>{said}<user>Two?<me>"
    assert seen[0][0] == "\n\nHuman: One?\n\nAssistant: "  # with the space that only chats have
    plain, seen = talk(template=TEMPLATE, templated=False)
    session(plain, "One?")
    assert seen[0][0] == "\n\nHuman: One?\n\nAssistant:"


def test_replies_are_keyed_by_the_seed_and_the_turn(talk):
    lines = ["Hello", "/reset", "Hello"]

    def replies(*words: str) -> list[str]:
        conversation, seen = talk(*words)
        session(conversation, *lines)
        return [reply for _, reply in seen]

    first, again, other = replies(), replies(), replies("seed=1")
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]
    cold = replies("sampling.temperature=1e-3")
    assert cold[0] == cold[1]  # always the likeliest token, whatever the numbers


def test_stop_strings_and_lengths_are_those_of_sampling(talk):
    text = session(talk("sampling.max_new_tokens=40")[0], "Hello")[0]
    letter = next(char for char in text if char.isalpha())
    cut = session(talk("sampling.max_new_tokens=40", f"sampling.stop_strings=['{letter}']")[0], "Hello")[0]
    assert cut.splitlines()[0] == text.split(letter)[0].rstrip()
    short = session(talk("sampling.max_new_tokens=1")[0], "Hello")[0]
    assert len(short.splitlines()[0]) < len(text.splitlines()[0])


def test_scores_are_shown_where_they_are_asked_for(talk):
    conversation, seen = talk()
    written = session(conversation, "Hello", "Again")
    assert written[:2] == [f"{reply.strip()}\n[score {n}.000]" for n, (_, reply) in enumerate(seen, 1)]
    conversation, _ = talk()
    conversation.score = None
    assert session(conversation, "Hello", "/quit") == [written[0].rpartition("\n")[0]]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_it_ends_with_the_input_and_at_ctrl_c(end, talk):
    def read():
        raise end

    written = []
    converse(talk()[0], read, written.append)
    assert written == [""]


def test_an_unknown_command_is_not_said_to_the_model(talk):
    conversation, seen = talk()
    assert "/reset" in session(conversation, "/help", "/quit")[0] and not seen


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("Once upon a time", PromptKind.text),
        ("\n\nHuman: Hi\n\nAssistant:", PromptKind.dialogue),
        (chat_text([{"role": "user", "content": "Hi"}]), PromptKind.chat),
    ],
)
def test_the_kind_of_prompts_is_read_from_the_runs_samples(prompt, kind, tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    assert an_evaluated_prompt(tmp_path) == (prompt, kind)


def test_a_runs_kind_decides_and_a_word_overrules_it(run_train):
    run = run_train("iterations=0")  # story openings, which are no dialogues
    assert prompts_of(build(look([f"run={run}"]))) == (False, False)
    assert prompts_of(build(look([f"run={run}", "chat.dialogue=true"]))) == (True, False)
    assert prompts_of(build(compose(["model.path=x"]))) == (True, True)
    assert prompts_of(build(compose(["model.path=x", "chat.dialogue=false"]))) == (False, True)


@pytest.mark.slow
def test_through_a_pipe(run_train, small_words, tmp_path):
    run = run_train("iterations=1", "optimizer.lr=1e-2", "evaluation.every=0")
    code = "import sys; from apa_cli.cli.chat import main; sys.argv[0] = 'apa-chat'; main()"
    words = [f"run={run}", "chat.score=true", "sampling.max_new_tokens=20", small_words[-1]]
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], input="Once there was\n/quit\nnever read\n",
        cwd=tmp_path / "empty", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reply, score = done.stdout.rstrip("\n").rsplit("\n", 1)
    vowels = sum(map(reply.lower().count, "aeiou"))
    # The reward sees the reply with the white space in front, if there is any.
    scores = [vowels / (len(reply) + extra + 1) - 0.002 * (len(reply) + extra) for extra in range(4)]
    assert score in [f"[score {value:.3f}]" for value in scores]
    assert "every line is a prompt of its own" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "empty").iterdir())
