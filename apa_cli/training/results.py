"""Results of a run: trained models, curves.png, the final report and result.json."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.errors import UserError
from apa_cli.file_modes import apply_umask
from apa_cli.models.forward import TrainingModel
from apa_cli.models.loading import save_model
from apa_cli.models.lora import save_adapter
from apa_cli.report.curves import plot_curves
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory, replace_text
from apa_cli.runs.files import read_rows
from apa_cli.training.progress import Progress


def save_models(
    path: Path,
    policy: PreTrainedModel,
    critics: dict[str, Tensor],
    model: TrainingModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
) -> None:
    """Write model/ and, if there are critics, critic/ into the run's directory `path`.

    `policy` and `critics` are whole, not sharded; `base` is the model that LoRA adapters were trained on. Raise
    UserError if a file cannot be written.
    """
    try:
        save_model(policy, tokenizer, path / "model")
        if critics:
            (path / "critic").mkdir(exist_ok=True)
            checkpoints.save_file(critics, path / "critic" / "model.safetensors")
        for name, critic in model.critics.items():
            if critic.adapter is not None:
                save_adapter(policy, path / "critic" / f"{name}_adapter", base, critic.adapter)
        if (path / "critic").is_dir():
            apply_umask(path / "critic")
    except checkpoints.WRITE_ERRORS as error:
        reason = checkpoints.describe_write_error(error)
        raise UserError(f"{path}: the trained models cannot be written ({reason}); the checkpoint is intact") from error


def plot_run(directory: RunDirectory, console: Console) -> None:
    """Write curves.png; warn if it cannot be written."""
    try:
        plot_curves(directory.path)
    except OSError as error:
        console.warn(f"curves.png: cannot be written ({error.strerror})")


def report_results(directory: RunDirectory, console: Console, progress: Progress, print_samples: int) -> None:
    """Print responses before and after training, the final figures and the files, and write result.json.

    result.json is written last: a run with this file has finished.
    """
    print_before_and_after(directory, console, progress.iteration, print_samples)
    final = next(line for line in reversed(read_rows(directory.metrics)) if "eval/reward_mean" in line)
    gain = final["eval/reward_mean"] - final["eval/reward_mean_sft"]
    count = len(next(iter(progress.sft_scores.values())))
    interval = (
        f" ± {final['eval/reward_ci']:.3f} (95 % interval over {count} prompts)" if "eval/reward_ci" in final else ""
    )
    console.say(
        f"held-out reward {final['eval/reward_mean']:z.3f}{interval}; SFT model "
        f"{final['eval/reward_mean_sft']:z.3f}, gain {gain:+.3f}; exact KL {final['eval/kl_exact']:z.2f} nats per "
        f"response; win rate against the SFT model {final['eval/win_rate_sft']:.2f}"
    )
    console.say(
        f"files in {directory.path}: model/ (the trained policy), curves.png, metrics.jsonl, samples.jsonl, "
        "checkpoints/"
    )
    figures = {name: value for name, value in final.items() if name.startswith("eval/")}
    counts = {"iteration": progress.iteration, "samples": progress.samples}
    replace_text(directory.result, json.dumps({**counts, **figures}, indent=2) + "\n")


def print_before_and_after(directory: RunDirectory, console: Console, last_iteration: int, count: int) -> None:
    """Print the responses to the first `count` held-out prompts before training and after `last_iteration`."""
    rows = read_rows(directory.samples)
    prompts = [row["prompt"] for row in rows if row["iteration"] == 0][:count]
    ends = (0, last_iteration)
    pairs = [row for prompt in prompts for row in rows if row["prompt"] == prompt and row["iteration"] in ends]
    console.show_samples("Responses to the same prompts, before and after training", pairs)
