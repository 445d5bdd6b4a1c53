"""apa-export: a run's policy as a plain `transformers` folder with a model card."""

from __future__ import annotations

from apa_cli.cli.app import Job, run_command


def export(job: Job) -> None:
    """Write the folder, or nothing if the log-probs of the reloaded model are not the policy's."""
    from apa_cli.inference.export import export_policy

    assert job.run is not None, "run_command refuses a command line without run="
    export_policy(job.config, job.run)


def main() -> None:
    """Run apa-export."""
    run_command("apa-export", export, takes=("run",), uses_reward=lambda cfg: False)
