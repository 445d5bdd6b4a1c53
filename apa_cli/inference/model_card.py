"""README.md of an exported model: base model, training, and results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apa_cli.datasets.dialogue import parse_dialogue
from apa_cli.inference.trained_policy import PromptKind, get_output_path, read_first_prompt
from apa_cli.report.formatting import format_lambda, format_value
from apa_cli.report.groups import flatten_settings
from apa_cli.runs.records import RecordedRun
from apa_cli.types import EscapedText

TRAINING_EVALUATION = {
    "eval/reward_mean": "score",
    "eval/kl_exact": "exact KL to the SFT model, nats per response",
    "eval/win_rate_sft": "win rate against the SFT model",
    "eval/entropy": "entropy, nats per token",
    "eval/distinct_2": "distinct token pairs",
    "eval/length": "length, tokens",
    "eval/eos_rate": "share ended by EOS",
}
"""Metrics of the run's own evaluation that are shown, with labels; scores by further rewards follow."""

EVAL_REPORT = (
    ("eval/reward_mean", "eval/reward_ci", "score"),
    ("eval/reward_mean_sft", "eval/reward_ci_sft", "score of the SFT model"),
    ("eval/gain", "eval/gain_ci", "gain, prompt by prompt"),
    ("eval/win_rate_sft", "eval/win_rate_sft_ci", "win rate against the SFT model"),
    ("eval/kl_exact", "eval/kl_exact_ci", "exact KL to the SFT model, nats per response"),
)
"""Metrics of apa-eval's report that are shown: key, key of the interval, label."""

SHOWN_SETTINGS = (
    "rollout_batch_size", "minibatch_size", "samples_per_prompt", "update_epochs", "optimizer.lr",
    "optimizer.critic_lr", "lora.rank", "sampling.max_prompt_tokens", "sampling.max_new_tokens",
    "sampling.temperature", "sampling.stop_strings", "model.dtype",
)  # fmt: skip
"""Settings shown after the algorithm's own."""


def format_model_card(run: RecordedRun, dtype: torch.dtype) -> str:
    """Return the card, in Markdown, of the policy of a run or of its checkpoint, stored in `dtype`."""
    config, iteration = run.config, run.iteration
    samples = next(row["samples"] for row in run.metrics if row["iteration"] == iteration)
    lambda_ = "" if run.lambda_ is None else f", λ = {format_lambda(run.lambda_, run.lambda_meaning)}"
    parts = [
        format_front_matter(config["model"]["path"], run.label),
        f"# {run.name}",
        f"A language model fine-tuned by online RLHF with {run.label}{lambda_}, by `apa-cli`.",
        format_markdown_table(
            ("", ""),
            [
                ("trained from", format_path(config["model"]["path"])),
                ("prompts", format_source(config["dataset"])),
                ("reward", format_source(config["reward"])),
                ("iterations", f"{iteration} of {config['iterations']}"),
                ("responses sampled", samples),
                ("seed", run.seed),
                ("precision of the weights", str(dtype).removeprefix("torch.")),
            ],
        ),
        "## Held-out result",
        format_training_evaluation(run),
        format_eval_report(run),
        "## Use",
        "Sampling with the run's settings, from one of its held-out prompts:",
        format_example(config["sampling"], *read_first_prompt(run)),
        "## Settings",
        format_settings(config),
        "## Made with",
        f"    {shlex.join(run.environment['command'])}",
        format_versions(run.environment),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- sections -----------------------------------------------------------------------------------------------


def format_front_matter(base: str, algorithm: str) -> str:
    """Return the metadata for model hubs; a base model in a local folder is left out."""
    lines = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(['rlhf', algorithm.lower(), 'apa-cli'], ensure_ascii=False)}",
    ]
    if not Path(base).expanduser().is_dir():
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "---"])


def format_training_evaluation(run: RecordedRun) -> str:
    """Return the run's last evaluation up to the policy's iteration, next to the SFT model's."""
    evaluations = [row for row in run.evaluations if row["iteration"] <= run.iteration]
    if not evaluations:
        return "There was no evaluation."
    before, after = run.sft or {}, evaluations[-1]
    further = {key: f"score ({key.rpartition('/')[2]})" for key in after if key.startswith("eval/reward_mean/")}
    rows = [
        (label, format_number(before.get(key)), format_number(after.get(key)))
        for key, label in {**TRAINING_EVALUATION, **further}.items()
        if key in after
    ]
    prompts = sum(row["iteration"] == after["iteration"] for row in run.samples)
    interval = after.get("eval/reward_ci")
    ending = "." if interval is None else f"; the score's 95 % interval is ± {interval:.3g}."
    intro = f"After iteration {after['iteration']}, on {prompts} held-out prompts{ending}"
    return f"{intro}\n\n{format_markdown_table(('', 'SFT model', 'this model'), rows)}"


def format_eval_report(run: RecordedRun) -> str:
    """Return the main metrics of apa-eval's report with their intervals; "" without a report on this iteration."""
    file = get_output_path(run, "eval", ".json")
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if report.get("iteration") != run.iteration:
        return ""
    metrics = report["metrics"]
    rows = [(label, format_interval(metrics, key, half)) for key, half, label in EVAL_REPORT if key in metrics]
    for key in metrics:
        if key.startswith("eval/gain/"):
            label = f"gain in {key.rpartition('/')[2]}"
            rows.append((label, format_interval(metrics, key, key.replace("gain", "gain_ci", 1))))
        elif key.startswith("eval/best_of_") and key.endswith("/reward_mean"):
            n = key.split("/")[1].removeprefix("best_of_")
            label = f"score of the SFT model's best of {n} responses"
            rows.append((label, format_interval(metrics, key, key.replace("reward_mean", "reward_ci"))))
    intro = f"`apa-eval` on {report['prompts']} held-out prompts, with 95 % intervals:"
    return f"{intro}\n\n{format_markdown_table(('', ''), rows)}"


def format_example(sampling: Mapping[str, Any], prompt: str, kind: PromptKind) -> str:
    """Return a Python program, in a fenced block, that loads the folder and responds to a prompt."""
    if kind is PromptKind.chat:
        inputs = [
            f"messages = {parse_dialogue(prompt.removesuffix(' '))!r}",
            'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
            "inputs = tokenizer.apply_chat_template(messages, **options)",
        ]
    else:
        inputs = [f"prompt = {prompt!r}", 'inputs = tokenizer(prompt, return_tensors="pt")']
    strings = [EscapedText.read(string) for string in sampling["stop_strings"]]
    stops = [f"    stop_strings={strings!r}, tokenizer=tokenizer,"] if strings else []
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # the folder of this file',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        *inputs,
        "output = model.generate(",
        "    **inputs, do_sample=True, pad_token_id=tokenizer.pad_token_id,",
        f"    temperature={sampling['temperature']}, top_k={sampling['top_k']}, top_p={sampling['top_p']},",
        f"    max_new_tokens={sampling['max_new_tokens']},",
        *stops,
        ")",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(["```python", *lines, "```"])


def format_settings(config: Mapping[str, Any]) -> str:
    """Return a table of the algorithm's settings and of `SHOWN_SETTINGS`."""
    settings = {key: value for key, value in flatten_settings(config["algo"]).items() if key != "_target_"}
    flat = flatten_settings(config)
    settings |= {key: flat[key] for key in SHOWN_SETTINGS if key in flat}
    return format_markdown_table(
        ("key", "value"), [(f"`{key}`", format_setting(value)) for key, value in settings.items()]
    )


def format_versions(environment: Mapping[str, Any]) -> str:
    """Return the versions of the packages and of Python, as environment.json records them."""
    packages = [f"{name} {version}" for name, version in environment["packages"].items() if version]
    return ", ".join([*packages, f"Python {environment['python']}"])


# --- cells --------------------------------------------------------------------------------------------------


def format_markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def format_path(path: str) -> str:
    """Return a hub id or a relative path unchanged, an absolute path as its last part."""
    absolute = Path(path).expanduser()
    return f"`{absolute.name}` (local)" if absolute.is_absolute() else f"`{path}`"


def format_source(section: Mapping[str, Any]) -> str:
    """Return a data set's or a reward's class, and its source."""
    kind = str(section.get("_target_", "?")).rpartition(".")[2]
    sources = [format_path(str(section[key])) for key in ("path", "target") if section.get(key)]
    return " ".join([kind, *sources])


def format_interval(metrics: Mapping[str, float], key: str, half: str) -> str:
    """Return a metric with the half width of its interval, the metric `half`, if there is one."""
    return format_number(metrics[key]) + (f" ± {metrics[half]:.2g}" if half in metrics else "")


def format_number(value: float | None) -> str:
    """Return a number with four significant digits; "" for None."""
    return "" if value is None else f"{value:.4g}"


def format_setting(value: Any) -> str:
    """Return a setting as a user would write it; a list in a code span."""
    return f"`{json.dumps(list(value))}`" if isinstance(value, tuple) else format_value(value)
