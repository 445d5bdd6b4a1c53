"""apa-eval: a policy's replies to held-out prompts beside the SFT model's, and the SFT model's best of n."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.inference.trained import last_iteration, load_trained, name_of
from apa_cli.kl import best_of_n_bound
from apa_cli.models.forward import compute_precision
from apa_cli.models.frozen_copy import frozen_copy
from apa_cli.models.loading import TORCH_DTYPES, end_tokens, load_policy, load_tokenizer
from apa_cli.models.prompting import PromptFormat
from apa_cli.randomness import Stream
from apa_cli.rollout.collect import collect
from apa_cli.rollout.engine import EOS, LENGTH, STOP
from apa_cli.rollout.statistics import distinct_n, mean_interval
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory, replace_text
from apa_cli.runs.environment import environment
from apa_cli.runs.records import located_run
from apa_cli.runs.tracking import make_tracker
from apa_cli.settings import Config, TrackerKind
from apa_cli.stages.cache import resolved
from apa_cli.tensor_ops import masked_mean
from apa_cli.training.build import (
    build_evaluator,
    check_lengths,
    halvings,
    launch,
    load_examples,
    load_reward,
    placement,
    stage_progress,
    with_further_rewards,
)
from apa_cli.training.evaluator import MAIN, Evaluator, Replies, wins
from apa_cli.types import Prompt

SFT = "_sft"
"""What ends the name of a figure of the SFT model."""

FIGURES = ("entropy", "distinct_1", "distinct_2", "distinct_3", "length", "eos_rate", "stop_rate", "truncated_rate")
"""What describes any model's replies; a data set may add figures of its own."""

BEST = (("reward_mean", "reward_ci"), ("gain", "gain_ci"))
"""Of best-of-n's figures those with an interval, and its name."""


def start_evaluation(config: Config, output: Path | None) -> None:
    """Evaluates what `run=` names and writes eval.json there; or `model.path`, in the new directory `output`."""
    if config.run.run is not None:
        directory, checkpoint = located_run(config.run.run)
        file = directory / name_of("eval", checkpoint, ".json")
        with Console(None, 0, live=False) as console:
            report = evaluated(config, console)
            kept(report, file)
            show(console, report, config)
            console.say(f"\nthe figures and all replies are in {file}")
            track(config, directory, report["metrics"], console)
        return
    claimed = RunDirectory(output)
    with claimed.held():
        claimed.claim(config.raw)
        try:
            with Console(output / "run.log", 0, live=False) as console:
                report = evaluated(config, console)
                kept(report, output / "eval.json")
                show(console, report, config)
                console.say(f"\nthe figures and all replies are in {output / 'eval.json'}")
        except BaseException:
            claimed.release()
            raise


def evaluated(config: Config, console: Console) -> dict[str, Any]:
    """What eval.json holds: loads the models and measures them."""
    device = launch(config.launch)
    train, held_out = load_examples(config, console.say)
    config = resolved(config, train, held_out, device, console.say, stage_progress(console, "stage"))
    config = with_further_rewards(config, train, held_out, device, console)
    tokenizer = load_tokenizer(config.model, config.model.path)
    policy = load_trained(config, device)
    check_lengths(config, policy, tokenizer)
    # Of model.path= alone there is nothing to compare with: it is its own reference.
    alone = config.run.run is None and config.evaluation.reference is None
    compared = config.evaluation.reference or config.model.path
    reference = policy if alone else load_reference(config, compared, device)
    place = placement(config, device)
    evaluator = build_evaluator(
        config, held_out, PromptFormat(tokenizer, config.dataset.prompt_form), reference,
        end_tokens(policy, tokenizer), load_reward(config, place), place,
        *halvings(config, console, fixed=False),
    )  # fmt: skip
    console.say(f"{len(evaluator.prompts)} held-out prompts, eval_seed {config.evaluation.seed}")
    mine = evaluator.replies(policy)
    theirs = None if alone else evaluator.replies(reference)
    metrics = measured(evaluator, mine, theirs)
    if config.evaluation.best_of:
        prompts = evaluator.prompts[: config.evaluation.best_of_prompts]
        console.say(
            f"best of {config.evaluation.best_of}: {max(config.evaluation.best_of)} replies to {len(prompts)} prompts"
        )
        scores = many_scores(evaluator, reference, prompts, max(config.evaluation.best_of))
        metrics |= best_of_figures(scores, config.evaluation.best_of, mine.scores[MAIN])
    return {
        "policy": config.run.run or config.model.path,
        "iteration": None if config.run.run is None else last_iteration(config),
        "reference": compared,
        "prompts": len(evaluator.prompts),
        "eval_seed": config.evaluation.seed,
        "environment": environment(),
        "metrics": metrics,
        "replies": reply_rows(mine, theirs),
    }


def load_reference(config: Config, path: str, device: torch.device) -> PreTrainedModel:
    """The model to compare with as apa-train holds its reference: LoRA's base, or a frozen copy in compute dtype."""
    lora = config.lora.rank > 0
    model = load_policy(config.model, path, frozen_base=lora)
    if not lora:
        model = frozen_copy(model, TORCH_DTYPES[config.model.dtype])
    return model.requires_grad_(False).to(device)


# --- figures ------------------------------------------------------------------------------------------------


def measured(evaluator: Evaluator, mine: Replies, theirs: Replies | None) -> dict[str, float]:
    """What training logs, and beside it intervals, the SFT model's figures and the paired difference.

    Every interval is half the width of the normal one at 95 %; differences are taken prompt by prompt.
    """
    sft = mine if theirs is None else theirs
    metrics = evaluator.metrics(mine, sft.scores)
    metrics["eval/kl_exact_ci"] = mean_interval(mine.kl.sum(-1))
    metrics |= {f"eval/{name}": value for name, value in figures(evaluator, mine).items()}
    for name in evaluator.scores:
        end = f"/{name}" if name != MAIN else ""
        metrics |= {f"eval/{key}{end}": value for key, value in mean_and_interval(mine.scores[name]).items()}
        if theirs is not None:
            compared = compare(mine.scores[name], theirs.scores[name])
            metrics |= {f"eval/{key}{end}": value for key, value in compared.items()}
    if theirs is None:
        return {key: value for key, value in metrics.items() if not key.split("/")[1].endswith(SFT)}
    return metrics | {f"eval/{name}{SFT}": value for name, value in figures(evaluator, theirs).items()}


def figures(evaluator: Evaluator, replies: Replies) -> dict[str, float]:
    """What describes one model's replies, whatever they are compared with."""
    rollout, n = replies.rollout, len(replies.rollout.endings)
    return {
        "entropy": float(masked_mean(replies.entropy, rollout.mask)),
        **{f"distinct_{k}": distinct_n(rollout.response_ids, rollout.mask, k) for k in (1, 2, 3)},
        "length": float(rollout.mask.sum(-1).float().mean()),
        "eos_rate": rollout.endings.count(EOS) / n,
        "stop_rate": rollout.endings.count(STOP) / n,
        "truncated_rate": rollout.endings.count(LENGTH) / n,
        **evaluator.describe(evaluator.sources, rollout.responses),
    }


def mean_and_interval(scores: list[float]) -> dict[str, float]:
    values = torch.tensor(scores)
    return {"reward_mean": float(values.mean()), "reward_ci": mean_interval(values)}


def compare(scores: list[float], others: list[float]) -> dict[str, float]:
    """The policy's scores against the SFT model's on the same prompts: the gain and the win rate."""
    won, difference = wins(scores, others), torch.tensor(scores) - torch.tensor(others)
    return {
        **{f"{key}{SFT}": value for key, value in mean_and_interval(others).items()},
        "gain": float(difference.mean()),
        "gain_ci": mean_interval(difference),
        "win_rate_sft": float(won.mean()),
        "win_rate_sft_ci": mean_interval(won),
    }


# --- best of n ----------------------------------------------------------------------------------------------


def many_scores(evaluator: Evaluator, model: PreTrainedModel, prompts: list[Prompt], count: int) -> Tensor:
    """[P, count]: the scores of so many replies of the model to each prompt, drawn from a stream of their own."""
    many = [Prompt(p.text, p.token_ids, p.place, number, p.columns) for p in prompts for number in range(count)]
    with compute_precision(model.device, evaluator.dtype):
        rollout = collect(
            {"policy": model}, evaluator.tokenizer, many, evaluator.sampling, evaluator.end_tokens,
            evaluator.eval_seed, Stream.best_of_n, iteration=0,
        )  # fmt: skip
    scores = evaluator.scores[MAIN](rollout.prompts, rollout.responses, rollout.columns).values
    return torch.tensor(scores).view(len(prompts), count)


def best_of_figures(scores: Tensor, sizes: list[int], policy_scores: list[float]) -> dict[str, float]:
    """For each n of `sizes` the mean of the best of each prompt's first n scores [P, N], and what it costs in KL.

    gain is the mean by which the policy's own replies to these prompts, the first P, score higher than that best.
    """
    found: dict[str, float] = {}
    for n in sizes:
        best = scores[:, :n].max(dim=1).values
        above = torch.tensor(policy_scores[: len(best)]) - best
        found |= {
            f"eval/best_of_{n}/reward_mean": float(best.mean()),
            f"eval/best_of_{n}/reward_ci": mean_interval(best),
            f"eval/best_of_{n}/kl_bound": best_of_n_bound(n),
            f"eval/best_of_{n}/gain": float(above.mean()),
            f"eval/best_of_{n}/gain_ci": mean_interval(above),
        }
    return found


# --- what is shown and kept ---------------------------------------------------------------------------------


def reply_rows(mine: Replies, theirs: Replies | None) -> list[dict[str, Any]]:
    """One row per prompt: the policy's reply, and the SFT model's."""
    rows = []
    for i, prompt in enumerate(mine.rollout.prompts):
        row = {"prompt": prompt, "policy": one_reply(mine, i)}
        rows.append(row if theirs is None else {**row, "sft": one_reply(theirs, i)})
    return rows


def one_reply(replies: Replies, i: int) -> dict[str, Any]:
    """Its text, its score by each reward, its KL and how it ended."""
    further = {f"score/{name}": scores[i] for name, scores in replies.scores.items() if name != MAIN}
    return {
        "response": replies.rollout.responses[i],
        "score": replies.scores[MAIN][i],
        **further,
        "kl": float(replies.kl[i].sum()),
        "ending": replies.rollout.endings[i],
    }


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as `Console.samples` takes them, the SFT model's reply first."""
    labels = {"sft": "SFT model", "policy": "policy"}
    return [
        {"label": label, "prompt": row["prompt"], **row[who]}
        for row in rows
        for who, label in labels.items()
        if who in row
    ]


def show(console: Console, report: dict[str, Any], config: Config) -> None:
    """The figures as tables, one column per model and the difference, and some of the replies."""
    metrics = report["metrics"]

    def cell(name: str, interval: str = "") -> str:
        if f"eval/{name}" not in metrics:
            return ""
        half = f" ± {metrics[f'eval/{interval}']:.2g}" if interval else ""
        return f"{metrics[f'eval/{name}']:.4g}{half}"

    rows = []
    for name in (MAIN, *(part.name for part in config.evaluation.rewards)):
        end, words = (f"/{name}", f" ({name})") if name != MAIN else ("", "")
        columns = [("reward_mean", "reward_ci"), (f"reward_mean{SFT}", f"reward_ci{SFT}"), ("gain", "gain_ci")]
        rows.append([f"score{words}", *(cell(mean + end, half + end) for mean, half in columns)])
        rows.append([f"win rate{words}", cell(f"win_rate_sft{end}", f"win_rate_sft_ci{end}"), "", ""])
    rows.append(["exact KL, nats per reply", cell("kl_exact", "kl_exact_ci"), "", ""])
    rows.append(["exact KL, nats per token", cell("kl_exact_token"), "", ""])
    units = {"entropy": "entropy, nats per token", "length": "length, tokens"}
    own = ("reward_", "win_rate_", "gain", "kl_exact", "best_of_", *FIGURES)
    described = [key for key in (key.removeprefix("eval/") for key in metrics) if not key.startswith(own)]
    for name in [*FIGURES, *described]:
        if not name.endswith(SFT):
            rows.append([units.get(name, name), cell(name), cell(f"{name}{SFT}"), ""])
    alone = not any(row[2] for row in rows)
    header = ["", "policy"] if alone else ["", "policy", "SFT model", "difference"]
    table = [row[: len(header)] for row in rows if row[1]]
    console.table("± is half the width of the 95 % interval.", header, table)
    best = []
    for n in config.evaluation.best_of:
        measures = [cell(f"best_of_{n}/{key}", f"best_of_{n}/{half}") for key, half in BEST]
        best.append([str(n), *measures, cell(f"best_of_{n}/kl_bound")])
    if best:
        title = f"Best of n replies of {'the model' if alone else 'the SFT model'}"
        console.table(title, ["n", "score", "policy's score less this", "KL at most, nats"], best)
    if shown := labelled(report["replies"][: config.evaluation.print_samples]):
        console.samples("Replies to the same prompts", shown)


def kept(report: dict[str, Any], file: Path) -> None:
    """Writes eval.json, in place of an earlier one."""
    replace_text(file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def track(config: Config, directory: Path, metrics: Mapping[str, float], console: Console) -> None:
    """Puts the figures into the summary of the run's own wandb run, under evaluate/, if it has one."""
    tracking, found = config.tracking, checkpoints.all_in(directory / "checkpoints")
    run_id = json.loads((found[-1] / "state.json").read_text())["wandb_id"] if found else None
    if tracking.kind is not TrackerKind.wandb or run_id is None:
        return
    tracker = make_tracker(
        tracking.kind.value, tracking.project, tracking.mode.value, directory, directory.name, tracking.group,
        yaml.safe_load((directory / "config.yaml").read_text()), run_id, console.say,
    )  # fmt: skip
    tracker.summarize({f"evaluate/{name.removeprefix('eval/')}": value for name, value in metrics.items()})
    tracker.finish()
