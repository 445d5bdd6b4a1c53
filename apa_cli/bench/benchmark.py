"""apa-bench: the passes of a run's iteration, each timed against the roofline.

The iteration is apa-train's own, `Trainer.run_phases`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from apa_cli.bench.synthetic import Subject, build_subject, check_memory, describe_memory, estimate_memory
from apa_cli.errors import ConfigError
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.hardware.machine import (
    measure_copy_rate,
    measure_matrix_rate,
    read_free_memory,
    read_peak_memory,
    reset_peak_memory,
)
from apa_cli.hardware.roofline import (
    ModelCost,
    Work,
    count_input_positions,
    estimate_forward_work,
    estimate_sampling_work,
)
from apa_cli.models.flops import measure_classifier_cost, measure_critic_cost, measure_policy_cost
from apa_cli.models.loading import TORCH_DTYPES, load_model_config
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.environment import collect_environment
from apa_cli.settings import Config, MatmulLibrary, Quantization
from apa_cli.training.build import set_up_device
from apa_cli.training.launch import release_memory, remove_if_empty
from apa_cli.training.mfu import Stopwatch, UpdateMeter, count_tokens
from apa_cli.training.models import check_training_options
from apa_cli.training.trainer import IterationResult, Trainer
from apa_cli.types import Rollout


def start_bench(config: Config, path: Path) -> None:
    """Run apa-bench and write bench.json into `path`, a new run's directory; dry_run=true prints the memory only."""
    if config.model.quantization is not Quantization.none:
        remove_if_empty(path)
        raise ConfigError("model.quantization: apa-bench cannot quantize its random weights; leave it none")
    check_training_options(config)
    device = set_up_device(config.launch)
    architecture = load_model_config(config.model, config.model.path)
    memory = estimate_memory(config, architecture)
    if config.run.dry_run:
        print(describe_memory(memory))
        remove_if_empty(path)
        return
    directory = RunDirectory(path)
    with ExitStack() as stack:
        stack.enter_context(directory.lock())
        directory.claim(config.raw)
        console = stack.enter_context(Console(path / "run.log", 0))
        stack.enter_context(directory.record_failure(console))
        console.say(describe_memory(memory))
        check_memory(memory, read_free_memory(device), device)
        report = measure_phases(build_subject(config, architecture, directory, console, device))
        report |= {"memory_estimate": memory, "environment": collect_environment()}
        (path / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
        print_report(report, console)
        console.say(f"written to {path / 'bench.json'}")
    release_memory()


@dataclass
class PhaseObserver:
    """Phase hook that records peak memory and the positions that enter the models; recording takes time.

    Positions are inputs of the models' embeddings, padding included.
    """

    embeddings: list[nn.Module]
    device: torch.device
    counts: dict[str, int] = field(default_factory=dict)
    """Positions of each phase."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Peak bytes of each phase; for a phase that contains others, only after the last of them."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.counts.setdefault(name, 0)
        reset_peak_memory(self.device)

        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.counts[name] += inputs[0].numel()

        handles = [embedding.register_forward_pre_hook(count) for embedding in self.embeddings]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.peaks[name] = max(self.peaks.get(name, 0), read_peak_memory(self.device))


def measure_phases(subject: Subject) -> dict[str, Any]:
    """Return the table of phases and the machine's rates, as bench.json has them.

    Warm-up iterations come first, then timed iterations, then one under the observer, which would disturb the timing.
    """
    trainer = subject.trainer
    config, device, settings = trainer.config, trainer.device, trainer.config.bench
    costs = measure_phase_costs(subject)
    for number in range(1, settings.warmup + 1):
        trainer.run_phases(number)
    matrix, copy = measure_matrix_rate(device, TORCH_DTYPES[config.model.dtype]), measure_copy_rate(device)
    update = UpdateMeter.from_model(trainer.models.model, config, matrix)
    runs: list[tuple[Stopwatch, dict[str, Work]]] = []
    times: list[float] = []
    first = settings.warmup + 1
    for number in range(first, first + settings.iterations):
        stopwatch, start_time = Stopwatch(device), time.perf_counter()
        result = trainer.run_phases(number, stopwatch)
        times.append(time.perf_counter() - start_time)
        work = count_phase_work(subject, costs, result)
        runs.append((stopwatch, {**work, "update": update.count_work(result.batch or result.rollout)}))
    observer = PhaseObserver(list_embeddings(subject), device)
    observed = trainer.run_phases(first + settings.iterations, observer)
    # The trainer's other phases are not passes through a model, or are the sum of several.
    names = [name for name in runs[0][0].seconds if name in runs[0][1]]
    needed = count_needed_positions(subject, observed)
    padding = compute_padding_shares({name: observer.counts[name] for name in names}, needed)
    rows = [
        describe_phase(name, runs, padding[name], matrix, copy) | {"peak_bytes": observer.peaks[name]} for name in names
    ]
    seconds, floor = statistics.median_low(times), sum(row["floor_s"] for row in rows)
    return {
        "machine": describe_machine(trainer, matrix, copy),
        "work": {
            "iterations": settings.iterations,
            "rollout_batch_size": config.run.rollout_batch_size,
            "prompt_tokens": int(observed.sampled.prompt_mask.sum()),
            "response_tokens": int(observed.sampled.mask.sum()),
        },
        "phases": rows,
        "seconds": seconds,
        "samples_per_s": config.run.rollout_batch_size / seconds,
        "floor_s": floor,
        "floor_share": floor / seconds,
        "peak_bytes": max(row["peak_bytes"] for row in rows),
    }


def describe_machine(trainer: Trainer, matrix: float, copy: float) -> dict[str, Any]:
    """Return device, threads, matmul library and precision with the rates `matrix` (FLOP/s) and `copy` (bytes/s)."""
    device = trainer.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "matmul": matmul.get_active_matmul().value,
        "dtype": trainer.config.model.dtype.value,
        "matrix_flops_per_s": matrix,
        "copy_bytes_per_s": copy,
    }


def measure_phase_costs(subject: Subject) -> dict[str, ModelCost]:
    """Return the cost of a pass in each phase that an iteration may have, except the update."""
    models, needs = subject.trainer.models, subject.trainer.config.needs
    policy = measure_policy_cost(models.policy)
    costs = {"sampling": policy, "reference": measure_policy_cost(models.reference), "old log-probs": policy}
    if models.moving_reference is not None:
        costs["moving reference"] = measure_policy_cost(models.moving_reference)
    if models.guide is not None:
        costs["guide"] = measure_policy_cost(models.guide)
    costs |= {f"critic {critic.name}": measure_critic_cost(models.model, critic.name) for critic in needs.critics}
    if subject.reward is not None:
        costs["reward"] = measure_classifier_cost(subject.reward)
    return costs


def count_phase_work(subject: Subject, costs: dict[str, ModelCost], result: IterationResult) -> dict[str, Work]:
    """Return the work of each phase of an iteration, except the update."""
    trainer = subject.trainer
    config = trainer.config
    prompts, responses = count_tokens(result.rollout)
    itemsize = TORCH_DTYPES[config.model.dtype].itemsize
    tokens, positions = sum(responses), count_input_positions(prompts, responses)
    work = {
        name: estimate_forward_work(cost, positions, tokens, config.run.microbatch_size, itemsize)
        for name, cost in costs.items()
    }
    rows = config.sampling.microbatch_size
    work["sampling"] = estimate_sampling_work(costs["sampling"], *count_tokens(result.sampled), rows, itemsize)
    if subject.reward is not None:
        texts = count_reward_tokens(subject, result.sampled)
        work["reward"] = estimate_forward_work(costs["reward"], texts, 0, subject.reward_rows, itemsize)
    return work


def count_reward_tokens(subject: Subject, rollout: Rollout) -> list[int]:
    """Return the number of tokens of each scored text."""
    tokenizer = subject.trainer.rollout_builder.prompt_format.tokenizer
    pairs = zip(rollout.prompts, rollout.responses, strict=True)
    return [len(tokenizer(prompt + response)["input_ids"]) for prompt, response in pairs]


def list_embeddings(subject: Subject) -> list[nn.Module]:
    """Return the input embedding of every model that has its own."""
    models = subject.trainer.models
    candidates = [models.policy, models.reference, models.moving_reference, models.guide, subject.reward]
    networks = [model for model in candidates if isinstance(model, PreTrainedModel)]
    networks += models.model.critic_backbones()
    return [network.get_input_embeddings() for network in networks]


def count_needed_positions(subject: Subject, result: IterationResult) -> dict[str, int]:
    """Return the number of positions of each phase that are not padding."""
    trainer = subject.trainer
    once = sum(count_input_positions(*count_tokens(result.rollout)))
    trunks = 1 + sum(not critic.is_on_trunk for critic in trainer.models.critics.values())
    other = {
        "sampling": sum(count_input_positions(*count_tokens(result.sampled))),
        "reward": sum(count_reward_tokens(subject, result.sampled)),
        "update": trainer.config.run.update_epochs * trunks * once,
    }
    return {name: other.get(name, once) for name in (*measure_phase_costs(subject), *other)}


def compute_padding_shares(counts: dict[str, int], needed: dict[str, int]) -> dict[str, float | None]:
    """Return the share of each phase's positions that are padding or follow a response's end.

    A share is None if fewer positions were counted than are needed, because the pass bypassed the observer's hook.
    """
    return {name: 1 - needed[name] / count if count >= needed[name] else None for name, count in counts.items()}


def describe_phase(
    name: str,
    runs: list[tuple[Stopwatch, dict[str, Work]]],
    padding: float | None,
    matrix: float,
    copy: float,
) -> dict[str, Any]:
    """Return a phase's row of the table, from the iteration in which the phase took its median time.

    `matrix` is in FLOP/s, `copy` in bytes per second.
    """
    times = [stopwatch.seconds[name] for stopwatch, _ in runs]
    seconds = statistics.median_low(times)
    work = runs[times.index(seconds)][1][name]
    floor = work.min_seconds(matrix, copy)
    return {
        "name": name,
        "seconds": seconds,
        **asdict(work),
        "tokens_per_s": work.tokens / seconds,
        "flops_per_s": work.flops / seconds,
        "bytes_per_s": work.bytes / seconds,
        "floor_s": floor,
        "floor_share": floor / seconds,
        "padding_share": padding,
    }


HEADER = ("", "seconds", "tokens/s", "TFLOP/s", "GB/s", "floor s", "share of floor", "padding", "peak GiB")


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the machine's rates and the table of phases."""
    machine = report["machine"]
    is_onednn = (machine["device"], machine["dtype"], machine["matmul"]) == (
        "cpu",
        "float32",
        MatmulLibrary.onednn.value,
    )
    by = " by oneDNN" if is_onednn else ""
    console.say(
        f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}: matrix products{by} at "
        f"{machine['matrix_flops_per_s'] / 1e12:.4g} TFLOP/s, copies at {machine['copy_bytes_per_s'] / 1e9:.4g} GB/s"
    )
    rows = [
        (
            row["name"], row["seconds"], row["tokens_per_s"], row["flops_per_s"] / 1e12, row["bytes_per_s"] / 1e9,
            row["floor_s"], row["floor_share"], row["padding_share"], row["peak_bytes"] / 2**30,
        )
        for row in report["phases"]
    ]  # fmt: skip
    total = ("iteration", report["seconds"], None, None, None, report["floor_s"], report["floor_share"], None)
    console.show_table("", HEADER, [*rows, (*total, report["peak_bytes"] / 2**30)])
    console.say(f"{report['samples_per_s']:.4g} samples/s")
