"""apa-chat: a dialogue with a policy, with prompts in the format that the policy was trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from io import TextIOWrapper

import torch
from transformers import PreTrainedModel

from apa_cli.datasets.dialogue import format_dialogue
from apa_cli.datasets.text_file import has_lone_surrogate
from apa_cli.errors import ConfigError, UserError
from apa_cli.inference.trained_policy import PromptKind, load_trained_policy, read_first_prompt
from apa_cli.models.loading import find_end_token_ids, load_tokenizer
from apa_cli.models.prompting import Messages, PromptFormat
from apa_cli.randomness import Stream
from apa_cli.rewards.base import CheckedScoreFunction
from apa_cli.rollout.collect import collect_rollout
from apa_cli.rollout.samplers import ModelSampler
from apa_cli.runs.formatting import strip_control_characters
from apa_cli.runs.records import RecordedRun
from apa_cli.settings import Config
from apa_cli.training.build import load_reward, make_placement, set_up_device
from apa_cli.training.models import check_model_limits
from apa_cli.types import POLICY, Example

CHAT_COMMANDS = "/reset starts a new dialogue, /quit ends the chat"


@dataclass
class Conversation:
    """The messages so far, and the policy that responds."""

    config: Config
    policy: PreTrainedModel
    prompt_format: PromptFormat
    end_tokens: frozenset[int]
    is_dialogue: bool
    """True: earlier turns stay in the prompt. False: every line is a prompt of its own."""
    uses_template: bool
    """True: the tokenizer's chat template may render the dialogue, as `PromptFormat` decides."""
    score: CheckedScoreFunction | None = None
    messages: Messages = field(default_factory=list)
    turn: int = 0
    """Number of responses so far, also before a reset; it keys the random numbers of the next response."""

    def respond(self, text: str) -> tuple[str, float | None]:
        """Sample the response to the user's next message; return it with its score, None without a reward."""
        self.messages.append({"role": "user", "content": text})
        example, longest = self.build_example(), self.config.sampling.max_prompt_tokens
        instructed = self.config.algo.instruct(example, None)
        prompt, _ = self.prompt_format.encode_instructed(example, instructed, self.turn, 0, longest)
        sampler = ModelSampler(self.policy, self.prompt_format.tokenizer, self.config.model.dtype)
        rollout = collect_rollout(
            {POLICY: sampler}, self.prompt_format.tokenizer, [prompt], self.config.sampling, self.end_tokens,
            self.config.run.seed, Stream.rollout, iteration=0,
        )  # fmt: skip
        self.turn += 1
        response = rollout.responses[0].strip()
        self.messages.append({"role": "assistant", "content": response})
        score = None if self.score is None else self.score(rollout.prompts, rollout.responses, rollout.columns)
        return response, None if score is None else score.values[0]

    def build_example(self) -> Example:
        """Return the messages so far as a row of a data set."""
        if not self.is_dialogue:
            return Example(self.messages[-1]["content"], None, None, {})
        return Example(format_dialogue(self.messages), None, None, {}, self.messages if self.uses_template else None)


def run_chat(config: Config, run: RecordedRun | None) -> None:
    """Chat with the policy of `run`, or with the model of `model.path`, until the input ends; write no file."""
    if config.chat.score and config.reward.needs_trained_model:
        raise ConfigError("chat.score: the reward has no model yet; give reward.path=…")
    device = set_up_device(config.launch)
    policy = load_trained_policy(config, run, device)
    tokenizer = load_tokenizer(config.model, config.model.resolved_path)
    check_model_limits(config, policy, tokenizer)
    prompt_format = PromptFormat(tokenizer, config.dataset.prompt_style)
    is_dialogue, uses_template = choose_prompt_form(config, run)
    score = load_reward(config, make_placement(config, device)) if config.chat.score else None
    conversation = Conversation(
        config, policy, prompt_format, find_end_token_ids(policy, tokenizer), is_dialogue, uses_template, score
    )
    mode = "earlier turns stay in the prompt" if is_dialogue else "every line is a prompt of its own"
    print(f"{config.run.run or config.model.path}: {CHAT_COMMANDS}; {mode}", file=sys.stderr)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode must not end the chat
    converse(conversation, read_line, lambda line: print(strip_control_characters(line), flush=True))


def read_line() -> str:
    """Return the next line of the input. Raise UserError if it is not UTF-8, EOFError at the end."""
    line = input("> " if sys.stdin.isatty() else "")
    if has_lone_surrogate(line):
        shown = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        raise UserError(f"chat: the input {shown[:80]!r} is not UTF-8; convert it, such as by iconv -f latin1 -t utf-8")
    return line


def choose_prompt_form(config: Config, run: RecordedRun | None) -> tuple[bool, bool]:
    """Return `is_dialogue` and `uses_template` of a conversation, from `chat.dialogue` and the run's prompts.

    Without a run, prompts are dialogues that a chat template may render.
    """
    kind = PromptKind.chat if run is None else read_first_prompt(run)[1]
    is_dialogue = kind is not PromptKind.text if config.chat.dialogue is None else config.chat.dialogue
    return is_dialogue, kind is PromptKind.chat


@torch.no_grad()
def converse(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Respond to one line after the other, until the input ends, /quit, or Ctrl-C."""
    try:
        while (line := read().strip()) != "/quit":
            if line == "/reset":
                conversation.messages.clear()
            elif line.startswith("/"):
                write(CHAT_COMMANDS)
            elif line:
                response, score = conversation.respond(line)
                write(response if score is None else f"{response}\n[score {score:.3f}]")
    except (EOFError, KeyboardInterrupt):
        write("")
