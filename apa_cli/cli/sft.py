"""apa-sft: supervised fine-tuning on the chosen replies of a data set."""

from __future__ import annotations

from apa_cli.cli.app import Job, run_command


def fine_tune(job: Job) -> None:
    """Write the fine-tuned model to model/ in the job's directory."""
    from apa_cli.training.launch import start_sft

    start_sft(job.config, job.directory)


def main() -> None:
    """Run apa-sft."""
    run_command("apa-sft", fine_tune)
