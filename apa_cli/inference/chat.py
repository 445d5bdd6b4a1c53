"""apa-chat: a dialogue with a policy, its prompts made as those that it was trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from apa_cli.datasets.dialogue import dialogue_text
from apa_cli.errors import ConfigError
from apa_cli.inference.trained import PromptKind, an_evaluated_prompt, load_trained
from apa_cli.models.forward import compute_precision
from apa_cli.models.loading import end_tokens, load_tokenizer
from apa_cli.models.prompting import Messages, PromptFormat
from apa_cli.randomness import Stream
from apa_cli.rewards.base import CheckedScore
from apa_cli.rollout.collect import collect
from apa_cli.runs.console import printable
from apa_cli.runs.records import located_run
from apa_cli.settings import Config
from apa_cli.training.build import check_lengths, launch, load_reward, placement
from apa_cli.types import Example

COMMANDS = "/reset begins anew, /quit ends"


@dataclass
class Conversation:
    """What has been said, and what answers."""

    config: Config
    policy: PreTrainedModel
    format: PromptFormat
    ends: frozenset[int]
    dialogue: bool
    """Whether what was said stays in the prompt; else every line is a prompt of its own."""
    templated: bool
    """Whether the tokenizer's chat template may render the dialogue, as `PromptFormat` decides."""
    score: CheckedScore | None = None
    messages: Messages = field(default_factory=list)
    turn: int = 0
    """Counts all replies, and keys their random numbers."""

    def reply(self, text: str) -> tuple[str, float | None]:
        """The reply to what the user says next, and its score."""
        self.messages.append({"role": "user", "content": text})
        prompt, _ = self.format.prompt(self.example(), self.turn, 0, self.config.sampling.max_prompt_tokens)
        with compute_precision(self.policy.device, self.config.model.dtype):
            rollout = collect(
                {"policy": self.policy}, self.format.tokenizer, [prompt], self.config.sampling, self.ends,
                self.config.run.seed, Stream.rollout, iteration=0,
            )  # fmt: skip
        self.turn += 1
        said = rollout.responses[0]
        self.messages.append({"role": "assistant", "content": said.strip()})
        score = None if self.score is None else self.score(rollout.prompts, rollout.responses, rollout.columns)
        return said.strip(), None if score is None else score.values[0]

    def example(self) -> Example:
        """What has been said as a row of a data set."""
        if not self.dialogue:
            return Example(self.messages[-1]["content"], None, None, {})
        return Example(dialogue_text(self.messages), None, None, {}, self.messages if self.templated else None)


def start_chat(config: Config, made: Path | None) -> None:
    """Talks until the input ends; `made` is a directory that was made for a run and is not needed."""
    if made is not None and made.is_dir() and not any(made.iterdir()):
        made.rmdir()
    if config.chat.score and config.reward.lacks_model:
        raise ConfigError("chat.score: the reward has no model; give reward.path=…")
    device = launch(config.launch)
    policy, tokenizer = load_trained(config, device), load_tokenizer(config.model, config.model.path)
    check_lengths(config, policy, tokenizer)
    form = PromptFormat(tokenizer, config.dataset.prompt_form)
    dialogue, templated = prompts_of(config)
    score = load_reward(config, placement(config, device)) if config.chat.score else None
    conversation = Conversation(config, policy, form, end_tokens(policy, tokenizer), dialogue, templated, score)
    print(f"{config.run.run or config.model.path}: {COMMANDS}; {kept_words(dialogue)}", file=sys.stderr)
    asks = "> " if sys.stdin.isatty() else ""
    converse(conversation, lambda: input(asks), lambda line: print(printable(line), flush=True))


def prompts_of(config: Config) -> tuple[bool, bool]:
    """Whether prompts are dialogues, and whether a chat template may render them: as the run's were."""
    kind = PromptKind.chat
    if config.run.run is not None:
        _, kind = an_evaluated_prompt(located_run(config.run.run)[0])
    dialogue = kind is not PromptKind.text if config.chat.dialogue is None else config.chat.dialogue
    return dialogue, kind is PromptKind.chat


def kept_words(dialogue: bool) -> str:
    return "what is said is kept" if dialogue else "every line is a prompt of its own"


@torch.no_grad()
def converse(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answers one line after the other; ends at the end of the input, /quit, or Ctrl-C."""
    try:
        while (line := read().strip()) != "/quit":
            if line == "/reset":
                conversation.messages.clear()
            elif line.startswith("/"):
                write(COMMANDS)
            elif line:
                said, score = conversation.reply(line)
                write(said if score is None else f"{said}\n[score {score:.3f}]")
    except (EOFError, KeyboardInterrupt):
        write("")
