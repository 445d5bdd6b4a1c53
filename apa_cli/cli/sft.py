"""apa-sft: supervised fine-tuning on the chosen replies of a data set."""

from __future__ import annotations

from apa_cli.cli.app import command, run_directory
from apa_cli.settings import Config


def sft(config: Config) -> None:
    """Writes the fine-tuned model to the run's directory, under model/."""
    from apa_cli.training.launch import start_sft

    start_sft(config, run_directory(config))


def main() -> None:
    command("apa-sft", sft)
