"""apa-train: composes conf/, checks it, and hands it to the trainer."""

from __future__ import annotations

from apa_cli.cli.app import command, run_directory, sweep_name
from apa_cli.settings import Config


def train(config: Config) -> None:
    """One run: a fresh one in its own directory, or one that continues."""
    from apa_cli.training.launch import start

    start(config, run_directory(config), sweep_name())


def main() -> None:
    command("apa-train", train)
