"""apa-eval: evaluates a policy on held-out prompts, beside its SFT model and best-of-n."""

from __future__ import annotations

from apa_cli.cli.app import command, run_directory
from apa_cli.settings import Config


def evaluate(config: Config) -> None:
    """Writes eval.json to the directory of the run, or for model.path= to one of its own."""
    from apa_cli.inference.eval_report import start_evaluation

    start_evaluation(config, None if config.run.run else run_directory(config))


def main() -> None:
    command("apa-eval", evaluate, takes=("run", "model.path"))
