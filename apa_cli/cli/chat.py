"""apa-chat: a dialogue with a run's policy, or another model, in the terminal."""

from __future__ import annotations

from apa_cli.cli.app import command, run_directory
from apa_cli.config.from_run import is_on
from apa_cli.settings import Config


def chat(config: Config) -> None:
    """Writes nothing."""
    from apa_cli.inference.chat import start_chat

    start_chat(config, None if config.run.run else run_directory(config))


def main() -> None:
    command("apa-chat", chat, takes=("run", "model.path"), scores=lambda cfg: is_on(cfg.chat.score))
