"""apa-eval's report on the screen: metrics as tables, and some of the responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apa_cli.inference.eval_metrics import SFT_SUFFIX
from apa_cli.runs.console import Console
from apa_cli.settings import Config
from apa_cli.training.evaluator import MAIN_REWARD, OTHER_METRIC_PREFIXES, RESPONSE_METRICS

METRIC_LABELS = {"entropy": "entropy, nats per token", "length": "length, tokens"}
"""Labels, with units, of metrics; the labels of other metrics are their names."""


def print_eval_report(console: Console, report: Mapping[str, Any], config: Config) -> None:
    """Print the metrics, one column per model and one for the difference; best of n; and responses side by side."""
    metrics = report["metrics"]
    is_alone = f"eval/reward_mean{SFT_SUFFIX}" not in metrics
    header = ["", "policy"] if is_alone else ["", "policy", "SFT model", "difference"]
    rewards = [MAIN_REWARD, *(part.name for part in config.evaluation.rewards)]
    is_truncated = bool(config.sampling.top_k) or config.sampling.top_p < 1
    rows = [*build_score_rows(metrics, rewards, is_truncated), *build_response_metric_rows(metrics)]
    console.show_table(
        "± is half the width of the 95 % interval.", header, [row[: len(header)] for row in rows if row[1]]
    )
    if config.evaluation.best_of:
        title = f"Best of n responses of {'the model' if is_alone else 'the SFT model'}"
        rows = build_best_of_n_rows(metrics, config.evaluation.best_of)
        console.show_table(title, ["n", "score", "gain of the policy", "KL bound, nats"], rows)
    if responses := label_responses(report["replies"][: config.evaluation.print_samples]):
        console.show_samples("Responses to the same prompts", responses)


def build_score_rows(
    metrics: Mapping[str, float], rewards: Sequence[str], is_truncated: bool = False
) -> list[list[str]]:
    """Return the rows of score and win rate for each reward, and of the KL, labeled if it is a truncated sampler's."""
    rows = []
    for name in rewards:
        suffix, label = (f"/{name}", f" ({name})") if name != MAIN_REWARD else ("", "")
        columns = [
            ("reward_mean", "reward_ci"),
            (f"reward_mean{SFT_SUFFIX}", f"reward_ci{SFT_SUFFIX}"),
            ("gain", "gain_ci"),
        ]
        scores = [format_metric(metrics, f"{mean}{suffix}", f"{half}{suffix}") for mean, half in columns]
        win_rate = format_metric(metrics, f"win_rate_sft{suffix}", f"win_rate_sft_ci{suffix}")
        rows += [[f"score{label}", *scores], [f"win rate{label}", win_rate, "", ""]]
    of = " of the truncated sampler" if is_truncated else ""
    rows.append([f"exact KL{of}, nats per response", format_metric(metrics, "kl_exact", "kl_exact_ci"), "", ""])
    rows.append([f"exact KL{of}, nats per token", format_metric(metrics, "kl_exact_token"), "", ""])
    return rows


def build_response_metric_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """Return the rows of `RESPONSE_METRICS`, then of the metrics that the data set adds."""
    names = [key.removeprefix("eval/") for key in metrics]
    added = [name for name in names if not name.startswith((*OTHER_METRIC_PREFIXES, *RESPONSE_METRICS))]
    return [
        [METRIC_LABELS.get(name, name), format_metric(metrics, name), format_metric(metrics, f"{name}{SFT_SUFFIX}"), ""]
        for name in [*RESPONSE_METRICS, *added]
        if not name.endswith(SFT_SUFFIX)
    ]


def build_best_of_n_rows(metrics: Mapping[str, float], sizes: Sequence[int]) -> list[list[str]]:
    """Return one row per n: the best score, the policy's gain over it, and the KL bound."""
    return [
        [
            str(n),
            format_metric(metrics, f"best_of_{n}/reward_mean", f"best_of_{n}/reward_ci"),
            format_metric(metrics, f"best_of_{n}/gain", f"best_of_{n}/gain_ci"),
            format_metric(metrics, f"best_of_{n}/kl_bound"),
        ]
        for n in sizes
    ]


def format_metric(metrics: Mapping[str, float], name: str, interval: str = "") -> str:
    """Return the metric eval/`name` with its interval, if there is one; "" if it was not measured."""
    if f"eval/{name}" not in metrics:
        return ""
    half = f" ± {metrics[f'eval/{interval}']:.2g}" if f"eval/{interval}" in metrics else ""
    return f"{metrics[f'eval/{name}']:.4g}{half}"


def label_responses(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a report as `Console.show_samples` takes them, the SFT model's response first."""
    labels = {"sft": "SFT model", "policy": "policy"}
    return [
        {"label": label, "prompt": row["prompt"], **row[model]}
        for row in rows
        for model, label in labels.items()
        if model in row
    ]
