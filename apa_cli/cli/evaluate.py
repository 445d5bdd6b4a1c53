"""apa-eval: evaluation of a policy on held-out prompts, next to its SFT model and that model's best of n."""

from __future__ import annotations

from apa_cli.cli.app import Job, run_command


def evaluate(job: Job) -> None:
    """Write eval.json to the directory of the run, or for `model.path` to a new directory."""
    from apa_cli.inference.eval_report import evaluate_model, evaluate_run

    if job.run is None:
        evaluate_model(job.config, job.directory)
    else:
        evaluate_run(job.config, job.run)


def main() -> None:
    """Run apa-eval."""
    run_command("apa-eval", evaluate, takes=("run", "model.path"))
