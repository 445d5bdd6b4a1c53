"""apa-reward: a reward model trained on pairs of chosen and rejected replies."""

from __future__ import annotations

from apa_cli.cli.app import Job, run_command


def fit_reward_model(job: Job) -> None:
    """Write the reward model to model/ in the job's directory."""
    from apa_cli.training.launch import start_reward

    start_reward(job.config, job.directory)


def main() -> None:
    """Run apa-reward."""
    run_command("apa-reward", fit_reward_model)
