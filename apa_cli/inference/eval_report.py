"""apa-eval: a policy's responses to held-out prompts against the SFT model's, and the SFT model's best of n."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from apa_cli.inference.eval_metrics import compute_best_of_n, compute_eval_metrics, score_many_responses
from apa_cli.inference.eval_tables import print_eval_report
from apa_cli.inference.trained_policy import get_output_path, load_trained_policy
from apa_cli.models.loading import TORCH_DTYPES, load_policy, load_tokenizer
from apa_cli.models.structure import make_frozen_copy, move_to_device
from apa_cli.rollout.samplers import ModelSampler
from apa_cli.rollout.sampling_probe import check_sampling
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory, replace_text
from apa_cli.runs.environment import collect_environment
from apa_cli.runs.records import RecordedRun
from apa_cli.runs.resume import find_changed_inputs, format_changed_inputs
from apa_cli.runs.tracking import make_tracker
from apa_cli.settings import Config, TrackerKind
from apa_cli.training.build import (
    build_batch_sizes,
    build_evaluator,
    load_inputs,
    run_missing_stages,
    set_up_device,
)
from apa_cli.training.evaluator import MAIN_REWARD, Evaluator, ScoredResponses
from apa_cli.training.examples import load_examples
from apa_cli.training.input_digests import digest_inputs
from apa_cli.training.models import check_model_limits
from apa_cli.types import Example


def evaluate_run(config: Config, run: RecordedRun) -> None:
    """Evaluate a run's policy, or a checkpoint's; write or replace eval.json in the run's directory."""
    with Console(None, 0, live=False) as console:
        report = write_report(config, run, get_output_path(run, "eval", ".json"), console)
        log_to_wandb(config, run, report["metrics"], console)


def evaluate_model(config: Config, output: Path) -> None:
    """Evaluate the model of `model.path`; write eval.json to the new directory `output`."""
    directory = RunDirectory(output)
    with directory.lock():
        directory.claim(config.raw)
        with Console(output / "run.log", 0, live=False) as console, directory.record_failure(console):
            write_report(config, None, output / "eval.json", console)


def write_report(config: Config, run: RecordedRun | None, file: Path, console: Console) -> dict[str, Any]:
    """Evaluate, write the report to `file`, print it, and return it."""
    report = build_report(config, run, console)
    replace_text(file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print_eval_report(console, report, config)
    console.say(f"\nmetrics and all responses are in {file}")
    return report


def build_report(config: Config, run: RecordedRun | None, console: Console) -> dict[str, Any]:
    """Load the models, sample and score their responses, and return the content of eval.json."""
    device = set_up_device(config.launch)
    train, held_out = load_examples(config, console.say)
    config = run_missing_stages(config, train, held_out, device, console)
    tokenizer = load_tokenizer(config.model, config.model.resolved_path)
    policy = load_trained_policy(config, run, device)
    check_model_limits(config, policy, tokenizer)
    # With model.path= alone there is no model to compare with, so the policy is its own reference.
    is_alone = run is None and config.evaluation.reference is None
    reference_path = config.evaluation.reference or config.model.resolved_path
    reference = policy if is_alone else load_reference(config, reference_path, device)
    inputs = load_inputs(config, train, held_out, policy, tokenizer, device)
    warn_of_changed_inputs(config, run, train, held_out, console)
    evaluator = build_evaluator(config, inputs, reference, *build_batch_sizes(config, console))
    console.say(f"{len(evaluator.prompts)} held-out prompts, evaluation.seed={config.evaluation.seed}")
    policy_responses = sample_and_score(evaluator, policy)
    sft_responses = None if is_alone else sample_and_score(evaluator, reference)
    metrics = compute_eval_metrics(evaluator, policy_responses, sft_responses)
    metrics |= evaluate_best_of_n(config, evaluator, reference, policy_responses.scores[MAIN_REWARD], console)
    return {
        "policy": config.run.run or config.model.path,
        "iteration": None if run is None else run.iteration,
        "reference": reference_path,
        "prompts": len(evaluator.prompts),
        "eval_seed": config.evaluation.seed,
        "environment": collect_environment(),
        "metrics": metrics,
        "replies": build_response_rows(policy_responses, sft_responses),
    }


def warn_of_changed_inputs(
    config: Config, run: RecordedRun | None, train: list[Example], held_out: list[Example], console: Console
) -> None:
    """Warn if data, models or code are no longer those that the run's last checkpoint records."""
    recorded = None if run is None else run.inputs
    if recorded and (changed := find_changed_inputs(recorded, digest_inputs(config, train, held_out))):
        console.warn(f"the content of inputs differs from the run's: {format_changed_inputs(changed)}")


def sample_and_score(evaluator: Evaluator, model: PreTrainedModel) -> ScoredResponses:
    """Sample a model's own responses to the prompts, score them, and measure its KL and entropy on them."""
    return evaluator.sample_and_score(ModelSampler(model, evaluator.tokenizer, evaluator.dtype), model)


def load_reference(config: Config, path: str, device: torch.device) -> PreTrainedModel:
    """Load the model to compare with as apa-train loads its reference: LoRA's base, or frozen in the compute dtype."""
    has_adapter = config.lora.rank > 0
    model = load_policy(config.model, path, frozen_base=has_adapter)
    if not has_adapter:
        model = make_frozen_copy(model, TORCH_DTYPES[config.model.dtype])
    move_to_device(model.requires_grad_(False), device)
    check_sampling(model, config.model.dtype, "evaluation.reference")
    return model


def evaluate_best_of_n(
    config: Config, evaluator: Evaluator, model: PreTrainedModel, policy_scores: list[float], console: Console
) -> dict[str, float]:
    """Return the metrics of the model's best of n for each n of `evaluation.best_of`."""
    sizes = config.evaluation.best_of
    if not sizes:
        return {}
    prompts = evaluator.prompts[: config.evaluation.best_of_prompts]
    console.say(f"best of {sizes}: {max(sizes)} responses to {len(prompts)} prompts")
    return compute_best_of_n(score_many_responses(evaluator, model, prompts, max(sizes)), sizes, policy_scores)


def build_response_rows(
    policy_responses: ScoredResponses, sft_responses: ScoredResponses | None
) -> list[dict[str, Any]]:
    """Return one row per prompt with the policy's response and, if there is one, the SFT model's."""
    rows = []
    for i, prompt in enumerate(policy_responses.rollout.prompts):
        row = {"prompt": prompt, "policy": build_response_row(policy_responses, i)}
        rows.append(row if sft_responses is None else {**row, "sft": build_response_row(sft_responses, i)})
    return rows


def build_response_row(responses: ScoredResponses, i: int) -> dict[str, Any]:
    """Return response `i`: text, score by each reward, KL in nats, and ending."""
    further = {f"score/{name}": scores[i] for name, scores in responses.scores.items() if name != MAIN_REWARD}
    return {
        "response": responses.rollout.responses[i],
        "score": responses.scores[MAIN_REWARD][i],
        **further,
        "kl": float(responses.kl[i].sum()),
        "ending": responses.rollout.endings[i],
    }


def log_to_wandb(config: Config, run: RecordedRun, metrics: Mapping[str, float], console: Console) -> None:
    """Add the metrics, under evaluate/, to the summary of the run's wandb run, if there is one."""
    tracking = config.tracking
    if tracking.kind is not TrackerKind.wandb or run.wandb_id is None:
        return
    tracker = make_tracker(
        tracking.kind.value, tracking.project, tracking.mode.value, run.directory, run.directory.name, tracking.group,
        run.config_yaml, run.wandb_id, console.say,
    )  # fmt: skip
    tracker.summarize({f"evaluate/{name.removeprefix('eval/')}": value for name, value in metrics.items()})
    tracker.finish()
