"""apa-train: online RL of a language model."""

from __future__ import annotations

from apa_cli.cli.app import Job, run_command


def train(job: Job) -> None:
    """Run the job in its directory, or continue the run that it names."""
    from apa_cli.training.launch import start_training

    start_training(job.config, job.directory, job.sweep)


def main() -> None:
    """Run apa-train."""
    run_command("apa-train", train)
