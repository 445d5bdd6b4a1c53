"""apa-reward: a reward model from pairs of chosen and rejected replies."""

from __future__ import annotations

from apa_cli.cli.app import command, run_directory
from apa_cli.settings import Config


def reward(config: Config) -> None:
    """Writes the reward model to the run's directory, under model/."""
    from apa_cli.training.launch import start_reward

    start_reward(config, run_directory(config))


def main() -> None:
    command("apa-reward", reward)
