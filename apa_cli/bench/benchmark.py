"""What apa-bench does: the passes of a run, timed one by one against their floors.

What is timed is what apa-train does: `Trainer.sample`, `Trainer.per_token`, `Updater.update`.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apa_cli.bench.synthetic import Subject, build_subject, check_memory, memory_estimate, memory_lines
from apa_cli.errors import ConfigError
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.hardware.machine import copy_rate, free_memory, matrix_rate, peak_bytes, reset_peak, wait
from apa_cli.hardware.roofline import Cost, Work, forward_work, inputs, sampling_work
from apa_cli.models.flops import classifier_cost, policy_cost, values_cost
from apa_cli.models.forward import response_logprobs
from apa_cli.models.loading import TORCH_DTYPES, load_config
from apa_cli.models.lora import WithoutAdapter
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.environment import environment
from apa_cli.settings import Config, Matmul, Quantization
from apa_cli.training.build import check_training, launch
from apa_cli.training.launch import remove_if_empty
from apa_cli.training.mfu import UpdateMeter, lengths
from apa_cli.types import Batch, Rollout

PhaseTimer = Callable[[str], AbstractContextManager[None]]
"""phase(name) is entered for the time of that phase of an iteration."""


def start_bench(config: Config, path: Path) -> None:
    """Measures, and writes bench.json into `path`, a fresh run's directory."""
    if config.model.quantization is not Quantization.none:
        remove_if_empty(path)
        raise ConfigError("model.quantization: apa-bench makes random weights, and cannot quantize them; leave it none")
    check_training(config)
    device = launch(config.launch)
    architecture = load_config(config.model, config.model.path)
    memory = memory_estimate(config, architecture)
    if config.run.dry_run:
        print("\n".join(memory_lines(memory)))
        remove_if_empty(path)
        return
    directory = RunDirectory(path)
    directory.claim(config.raw)
    try:
        with Console(path / "run.log", 0) as console:
            for line in memory_lines(memory):
                console.say(line)
            check_memory(memory, free_memory(device), device)
            result = measured(build_subject(config, architecture, directory, console, device))
            result |= {"memory_estimate": memory, "environment": environment()}
            (path / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
            show(result, console)
            console.say(f"written to {path / 'bench.json'}")
    except BaseException:
        directory.release()
        raise
    # The next job of a sweep runs in this process: leave it nothing.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Stopwatch:
    """Seconds of each phase."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wait(self.device)
        begun = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[name] = time.perf_counter() - begun


@dataclass
class Observer:
    """What would disturb the clock: each phase's peak memory, and the positions that go into the models in it.

    Positions are those that the models' embeddings are given, padding included.
    """

    networks: list[nn.Module]
    device: torch.device
    counts: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.counts[name] = 0
        reset_peak(self.device)

        def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            self.counts[name] += given[0].numel()

        handles = [network.get_input_embeddings().register_forward_pre_hook(note) for network in self.networks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.peaks[name] = peak_bytes(self.device)


def iterate(subject: Subject, number: int, phase: PhaseTimer) -> tuple[Rollout, Batch]:
    """One iteration, counted from 1: `Trainer.iterate`, each pass a phase of its own."""
    trainer = subject.trainer
    config, needs, policy = trainer.config, trainer.config.algo.needs(), trainer.model.policy

    def logprobs(model: Any) -> torch.Tensor:
        return trainer.per_token(rollout, lambda part: response_logprobs(model, part, config.sampling.temperature))

    with phase("sampling"):
        rollout, _ = trainer.sample(number)
    if subject.reward is None:
        scores = trainer.score(rollout.prompts, rollout.responses, rollout.columns)
    else:
        with phase("reward"):
            scores = trainer.score(rollout.prompts, rollout.responses, rollout.columns)
    with torch.no_grad():
        with phase("reference"):
            init = logprobs(trainer.reference)
        anchor = init
        if trainer.moving_reference is not None:
            with phase("moving reference"):
                anchor = logprobs(trainer.moving_reference)
        old = None
        if needs.old_logprobs:
            with phase("old log-probs"):
                old = logprobs(policy)
        values = {}
        for name in needs.critics:
            with phase(f"critic {name}"):
                values[name] = trainer.per_token(
                    rollout,
                    lambda part, name=name: trainer.model(part, with_policy=False, critics=(name,)).values[name],
                )
    rollout = rollout.with_(
        scores=torch.tensor(scores.values), init_logprobs=init, ref_logprobs=anchor, old_logprobs=old, values=values
    )
    batch, trainer.progress.algorithm = config.algo.prepare(rollout, trainer.progress.algorithm)
    with phase("update"):
        trainer.updater.update(batch, number)
    return rollout, batch


def measured(subject: Subject) -> dict[str, Any]:
    """The table of phases, with what it was measured against."""
    trainer = subject.trainer
    config, device, settings = trainer.config, trainer.device, trainer.config.bench
    costs = phase_costs(subject)
    for number in range(1, settings.warmup + 1):
        iterate(subject, number, Stopwatch(device))
    matrix, copy = matrix_rate(device, TORCH_DTYPES[config.model.dtype]), copy_rate(device)
    update = UpdateMeter.of(trainer.model, config, matrix)
    runs: list[tuple[Stopwatch, dict[str, Work]]] = []
    times: list[float] = []
    first = settings.warmup + 1
    for number in range(first, first + settings.iterations):
        watch, begun = Stopwatch(device), time.perf_counter()
        rollout, batch = iterate(subject, number, watch)
        times.append(time.perf_counter() - begun)
        runs.append((watch, {**phase_work(subject, costs, rollout), "update": update.work(batch)}))
    observer = Observer(networks(subject), device)
    rollout, batch = iterate(subject, first + settings.iterations, observer)
    padding = padding_shares(observer.counts, needed_positions(subject, rollout))
    rows = [
        phase_row(name, runs, padding[name], matrix, copy) | {"peak_bytes": observer.peaks[name]}
        for name in runs[0][0].seconds
    ]
    seconds, floor = statistics.median_low(times), sum(row["floor_s"] for row in rows)
    return {
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "matmul": matmul.used().value,
            "dtype": config.model.dtype.value,
            "matrix_flops_per_s": matrix,
            "copy_bytes_per_s": copy,
        },
        "work": {
            "iterations": settings.iterations,
            "rollout_batch_size": config.run.rollout_batch_size,
            "prompt_tokens": int(rollout.prompt_mask.sum()),
            "response_tokens": int(rollout.mask.sum()),
        },
        "phases": rows,
        "seconds": seconds,
        "samples_per_s": config.run.rollout_batch_size / seconds,
        "floor_s": floor,
        "floor_share": floor / seconds,
        "peak_bytes": max(row["peak_bytes"] for row in rows),
    }


def phase_costs(subject: Subject) -> dict[str, Cost]:
    """What one pass of each phase costs, the update excepted."""
    trainer = subject.trainer
    needs = trainer.config.algo.needs()
    policy = policy_cost(trainer.model.policy)
    costs = {"sampling": policy, "reference": policy_cost(trainer.reference), "old log-probs": policy}
    if trainer.moving_reference is not None:
        costs["moving reference"] = policy_cost(trainer.moving_reference)
    costs |= {f"critic {name}": values_cost(trainer.model, name) for name in needs.critics}
    if subject.reward is not None:
        costs["reward"] = classifier_cost(subject.reward)
    return costs


def phase_work(subject: Subject, costs: dict[str, Cost], rollout: Rollout) -> dict[str, Work]:
    """What each phase of an iteration had to do, the update excepted."""
    trainer = subject.trainer
    config = trainer.config
    prompts, responses = lengths(rollout)
    itemsize = TORCH_DTYPES[config.model.dtype].itemsize
    drawn, computed = sum(responses), inputs(prompts, responses)
    work = {
        name: forward_work(cost, computed, drawn, config.run.microbatch_size, itemsize) for name, cost in costs.items()
    }
    rows = config.sampling.microbatch_size
    work["sampling"] = sampling_work(costs["sampling"], prompts, responses, rows, itemsize)
    if subject.reward is not None:
        texts = reward_lengths(subject, rollout)
        work["reward"] = forward_work(costs["reward"], texts, 0, subject.reward_rows, itemsize)
    return work


def reward_lengths(subject: Subject, rollout: Rollout) -> list[int]:
    """Tokens of each text that is scored."""
    pairs = zip(rollout.prompts, rollout.responses, strict=True)
    return [len(subject.trainer.tokenizer(prompt + response)["input_ids"]) for prompt, response in pairs]


def networks(subject: Subject) -> list[nn.Module]:
    """Every model with an embedding of its own."""
    trainer = subject.trainer
    backbones = [critic.backbone for critic in trainer.model.critics.values()]
    found = [trainer.model.policy, trainer.reference, trainer.moving_reference, subject.reward, *backbones]
    return [model for model in found if model is not None and not isinstance(model, WithoutAdapter)]


def needed_positions(subject: Subject, rollout: Rollout) -> dict[str, int]:
    """The positions of each phase that are not padding."""
    trainer = subject.trainer
    once = sum(inputs(*lengths(rollout)))
    trunks = 1 + sum(not critic.on_trunk for critic in trainer.model.critics.values())
    other = {
        "reward": sum(reward_lengths(subject, rollout)),
        "update": trainer.config.run.update_epochs * trunks * once,
    }
    return {name: other.get(name, once) for name in (*phase_costs(subject), *other)}


def padding_shares(counts: dict[str, int], needed: dict[str, int]) -> dict[str, float | None]:
    """Share of the computed positions that were padding or came after a response's end; None where a pass hid them."""
    return {name: 1 - needed[name] / count if count >= needed[name] else None for name, count in counts.items()}


def phase_row(
    name: str,
    runs: list[tuple[Stopwatch, dict[str, Work]]],
    padding: float | None,
    matrix: float,
    copy: float,
) -> dict[str, Any]:
    """One phase, of the iteration in which it took the median of its times."""
    times = [watch.seconds[name] for watch, _ in runs]
    seconds = statistics.median_low(times)
    work = runs[times.index(seconds)][1][name]
    floor = work.seconds(matrix, copy)
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


def show(result: dict[str, Any], console: Console) -> None:
    """The table of phases on the screen."""
    machine = result["machine"]
    known = (machine["device"], machine["dtype"], machine["matmul"])
    by = " by oneDNN" if known == ("cpu", "float32", Matmul.onednn.value) else ""
    console.say(
        f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}: matrix products{by} at "
        f"{machine['matrix_flops_per_s'] / 1e12:.4g} TFLOP/s, copies at {machine['copy_bytes_per_s'] / 1e9:.4g} GB/s"
    )
    rows = [
        (
            row["name"], row["seconds"], row["tokens_per_s"], row["flops_per_s"] / 1e12, row["bytes_per_s"] / 1e9,
            row["floor_s"], row["floor_share"], row["padding_share"], row["peak_bytes"] / 2**30,
        )
        for row in result["phases"]
    ]  # fmt: skip
    whole = ("iteration", result["seconds"], None, None, None, result["floor_s"], result["floor_share"], None)
    console.table("", HEADER, [*rows, (*whole, result["peak_bytes"] / 2**30)])
    console.say(f"{result['samples_per_s']:.4g} samples/s")
