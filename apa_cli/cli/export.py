"""apa-export: writes a run's policy as a plain `transformers` folder with a model card."""

from __future__ import annotations

from apa_cli.cli.app import command
from apa_cli.settings import Config


def export(config: Config) -> None:
    """Nothing is kept of what does not give the policy's own log-probs when it is loaded again."""
    from apa_cli.inference.export import start_export

    start_export(config)


def main() -> None:
    command("apa-export", export, takes=("run",), scores=lambda cfg: False)
