"""README.md of an exported model: what it was trained from, how, and what came out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apa_cli.datasets.dialogue import parse_dialogue
from apa_cli.inference.trained import PromptKind, an_evaluated_prompt, name_of
from apa_cli.report.groups import flatten, lambda_text, value_text
from apa_cli.runs.records import Run, read_run, recorded_config

RESULTS = {
    "eval/reward_mean": "score",
    "eval/kl_exact": "exact KL to the SFT model, nats per reply",
    "eval/win_rate_sft": "win rate against the SFT model",
    "eval/entropy": "entropy, nats per token",
    "eval/distinct_2": "distinct token pairs",
    "eval/length": "length, tokens",
    "eval/eos_rate": "share ended by EOS",
}
"""What is shown of an evaluation; scores of further rewards come after it."""

EVALUATED = (
    ("eval/reward_mean", "eval/reward_ci", "score"),
    ("eval/reward_mean_sft", "eval/reward_ci_sft", "score of the SFT model"),
    ("eval/gain", "eval/gain_ci", "gain, prompt by prompt"),
    ("eval/win_rate_sft", "eval/win_rate_sft_ci", "win rate against the SFT model"),
    ("eval/kl_exact", "eval/kl_exact_ci", "exact KL to the SFT model, nats per reply"),
)
"""What is shown of apa-eval's report: key, that of its interval, words."""

SHAPED_BY = (
    "rollout_batch_size", "minibatch_size", "samples_per_prompt", "update_epochs", "optimizer.lr", "optimizer.critic_lr", "lora.rank",
    "sampling.max_prompt_tokens", "sampling.max_new_tokens", "sampling.temperature", "sampling.stop_strings",
    "model.dtype",
)  # fmt: skip
"""Settings beside the algorithm's own that are shown."""


def model_card(directory: Path, checkpoint: Path | None, iteration: int, dtype: torch.dtype) -> str:
    """The card of the policy of a run, or of a checkpoint of it, after `iteration`, stored in `dtype`."""
    run, config = read_run(directory), recorded_config(directory)
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    samples = next(line["samples"] for line in run.metrics if line["iteration"] == iteration)
    lambda_ = "" if run.lambda_ is None else f", λ = {lambda_text(run.algorithm, run.lambda_)}"
    settings = {key: value for key, value in flatten(config["algo"]).items() if key != "_target_"}
    flat = flatten(config)
    settings |= {key: flat[key] for key in SHAPED_BY if key in flat}
    stored = str(dtype).removeprefix("torch.")
    parts = [
        front_matter(config["model"]["path"], run.algorithm),
        f"# {run.name}",
        f"A language model fine-tuned by online RLHF with {run.algorithm}{lambda_}, by `apa-cli`.",
        table(
            ("", ""),
            [
                ("trained from", named(config["model"]["path"])),
                ("prompts", described(config["dataset"])),
                ("reward", described(config["reward"])),
                ("iterations", f"{iteration} of {config['iterations']}"),
                ("responses sampled", samples),
                ("seed", run.seed),
                ("precision of the weights", stored),
            ],
        ),
        "## Held-out result",
        held_out_result(run, iteration),
        last_evaluation(directory / name_of("eval", checkpoint, ".json"), iteration),
        "## Use",
        "Sampling as the run did, from one of its held-out prompts:",
        use(config["sampling"], *an_evaluated_prompt(directory)),
        "## Settings",
        table(("key", "value"), [(f"`{key}`", code(value)) for key, value in settings.items()]),
        "## Made with",
        f"    {shlex.join(environment['command'])}",
        ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
        + f", Python {environment['python']}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def use(sampling: Mapping[str, Any], prompt: str, kind: PromptKind) -> str:
    """Python that loads the folder and answers a prompt, in a fenced block."""
    if kind is PromptKind.chat:
        inputs = [
            f"messages = {parse_dialogue(prompt.removesuffix(' '))!r}",
            'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
            "inputs = tokenizer.apply_chat_template(messages, **options)",
        ]
    else:
        inputs = [f"prompt = {prompt!r}", 'inputs = tokenizer(prompt, return_tensors="pt")']
    stops = [f"    stop_strings={sampling['stop_strings']!r}, tokenizer=tokenizer,"] if sampling["stop_strings"] else []
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this one',
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


def front_matter(base: str, algorithm: str) -> str:
    """What model hubs read; the base model only where it is a hub's."""
    lines = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [rlhf, {algorithm.lower()}, apa-cli]",
    ]
    if not Path(base).expanduser().is_dir():
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "---"])


def named(path: str) -> str:
    """A hub id, or a path from where the run was started, as it is; of any other path the last part."""
    place = Path(path).expanduser()
    return f"`{place.name}` (local)" if place.is_absolute() else f"`{path}`"


def described(section: Mapping[str, Any]) -> str:
    """A data set or reward in a few words: its class, and its keys that say where it comes from."""
    kind = str(section.get("_target_", "?")).rpartition(".")[2]
    places = [named(str(section[key])) for key in ("path", "target") if section.get(key)]
    return " ".join([kind, *places])


def held_out_result(run: Run, iteration: int) -> str:
    """The run's last evaluation up to then, beside the SFT model's."""
    evaluations = [line for line in run.evaluations if line["iteration"] <= iteration]
    if not evaluations:
        return "There was no evaluation."
    before, after = run.sft or {}, evaluations[-1]
    further = {key: f"score ({key.rpartition('/')[2]})" for key in after if key.startswith("eval/reward_mean/")}
    rows = [
        (words, number(before.get(key)), number(after.get(key)))
        for key, words in {**RESULTS, **further}.items()
        if key in after
    ]
    with (run.directory / "samples.jsonl").open(encoding="utf-8") as lines:
        prompts = sum(json.loads(line)["iteration"] == after["iteration"] for line in lines)
    when = f"After iteration {after['iteration']}, on {prompts} held-out prompts"
    interval = after.get("eval/reward_ci")
    ends = "." if interval is None else f"; the score's 95 % interval is ± {interval:.3g}."
    return f"{when}{ends}\n\n" + table(("", "SFT model", "this model"), rows)


def last_evaluation(file: Path, iteration: int) -> str:
    """The main figures that apa-eval found of the policy after `iteration`, if it was run, with their intervals."""
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if report.get("iteration") != iteration:
        return ""
    found = report["metrics"]
    rows = [(words, with_interval(found, key, half)) for key, half, words in EVALUATED if key in found]
    for key in found:
        if key.startswith("eval/gain/"):
            rows.append(
                (f"gain in {key.rpartition('/')[2]}", with_interval(found, key, key.replace("gain", "gain_ci", 1)))
            )
        elif key.startswith("eval/best_of_") and key.endswith("/reward_mean"):
            n = key.split("/")[1].removeprefix("best_of_")
            half = key.replace("reward_mean", "reward_ci")
            rows.append((f"score of the SFT model's best of {n} replies", with_interval(found, key, half)))
    return f"`apa-eval` on {report['prompts']} held-out prompts, with 95 % intervals:\n\n" + table(("", ""), rows)


def with_interval(found: Mapping[str, float], key: str, half: str) -> str:
    return f"{number(found[key])} ± {found[half]:.2g}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def code(value: Any) -> str:
    """A setting as a user would write it."""
    return f"`{json.dumps(list(value))}`" if isinstance(value, tuple) else value_text(value)
