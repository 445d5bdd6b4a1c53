"""apa-chat: a dialogue with a run's policy, or another model, in the terminal."""

from __future__ import annotations

from apa_cli.cli.app import Job, run_command
from apa_cli.config.from_run import is_true


def chat(job: Job) -> None:
    """Respond to the lines of the input until it ends; write no file."""
    from apa_cli.inference.chat import run_chat

    run_chat(job.config, job.run)


def main() -> None:
    """Run apa-chat."""
    run_command("apa-chat", chat, takes=("run", "model.path"), uses_reward=lambda cfg: is_true(cfg.chat.score))
