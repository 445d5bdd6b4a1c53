"""apa-eval: evaluation of a policy on held-out prompts, next to its SFT model and that model's best of n."""

from __future__ import annotations

from pathlib import Path

from apa_cli.cli.app import Job, run_command
from apa_cli.errors import ConfigError
from apa_cli.runs.records import is_run
from apa_cli.settings import Config


def evaluate(job: Job) -> None:
    """Write eval.json to the directory of the run, or for `model.path` to a new directory."""
    if job.run is None:
        check_rewards(job.config)
    from apa_cli.inference.eval_report import evaluate_model, evaluate_run

    if job.run is None:
        evaluate_model(job.config, job.directory)
    else:
        evaluate_run(job.config, job.run)


def check_rewards(config: Config) -> None:
    """Raise ConfigError if a reward has no model: evaluation of `model.path` alone trains none."""
    path = Path(str(config.model.path)).expanduser()
    is_of_run = is_run(path.parent) and path.name == "model"
    advice = f"run={path.parent} scores by that run's reward" if is_of_run else "apa-reward trains one"
    if config.reward.needs_trained_model:
        raise ConfigError(
            f"reward.path: apa-eval trains no reward model; give reward.path=FOLDER_OR_HUB_ID or another reward=; "
            f"{advice}"
        )
    for part in config.evaluation.rewards:
        if part.reward.needs_trained_model:
            raise ConfigError(f"evaluation.rewards: {part.name} has no model; give it {{…, path: FOLDER_OR_HUB_ID}}")


def main() -> None:
    """Run apa-eval."""
    run_command("apa-eval", evaluate, takes=("run", "model.path"))
