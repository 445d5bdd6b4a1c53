"""Seconds of an iteration's phases, and the model FLOPs utilization (MFU, 2204.02311) of its updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch

from apa_cli.hardware.machine import measure_matrix_rate, synchronize
from apa_cli.hardware.roofline import ModelCost, Work, estimate_update_work
from apa_cli.models.flops import measure_training_cost
from apa_cli.models.forward import TrainingModel
from apa_cli.models.loading import TORCH_DTYPES
from apa_cli.settings import Config, DType, RunSettings
from apa_cli.types import Batch, Rollout

PhaseHook = Callable[[str], AbstractContextManager[object]]
"""Hook of an iteration: a context manager `phase(name)` is entered for the duration of that phase. Phases may nest."""


@dataclass
class Stopwatch:
    """Phase hook that adds up the seconds of each phase, including the device's pending work."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start_time = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_time


@dataclass(frozen=True)
class UpdateMeter:
    """Work of an iteration's updates, and the machine's matrix rate to compare it with."""

    cost: ModelCost
    trained: int
    """Trained parameters, of policy and critics."""
    run: RunSettings
    itemsize: int
    """Bytes of a number at the run's precision."""
    recomputed: bool
    """True if the backward pass recomputes activations, which counts as work."""
    matrix_rate: float
    """FLOP/s of all processes together."""

    @classmethod
    def from_model(cls, model: TrainingModel, config: Config, rate: float) -> UpdateMeter:
        """Build the meter for the models of a run and a matrix rate in FLOP/s."""
        return cls(
            cost=measure_training_cost(model),
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            run=config.run,
            itemsize=TORCH_DTYPES[config.model.dtype].itemsize,
            recomputed=config.model.gradient_checkpointing,
            matrix_rate=rate,
        )

    def count_work(self, batch: Batch | Rollout) -> Work:
        """Return the work of all updates on this rollout batch."""
        run = self.run
        return estimate_update_work(
            self.cost,
            self.trained,
            *count_tokens(batch),
            epochs=run.update_epochs,
            steps=run.update_epochs * run.rollout_batch_size // run.minibatch_size,
            passes=run.update_epochs * run.rollout_batch_size // run.microbatch_size,
            itemsize=self.itemsize,
            recomputed=self.recomputed,
        )

    def compute_utilization(self, batch: Batch, seconds: float) -> float:
        """Return the achieved FLOP/s of the updates over the matrix rate; padding does not count as achieved."""
        return self.count_work(batch).flops / seconds / self.matrix_rate


def measure_run_matrix_rate(device: torch.device, precision: DType) -> float:
    """Return FLOP/s of matrix products at a run's precision, measured once per process and number of threads.

    A measurement takes a fifth of a second.
    """
    return _cached_matrix_rate(device, TORCH_DTYPES[precision], torch.get_num_threads())


@cache
def _cached_matrix_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    return measure_matrix_rate(device, dtype)


def count_tokens(batch: Batch | Rollout) -> tuple[list[int], list[int]]:
    """Return the number of tokens of each prompt and of each response, related sequences included."""
    parts = (batch, *batch.related.values())
    return (
        [count for part in parts for count in part.prompt_mask.sum(-1).tolist()],
        [count for part in parts for count in part.mask.sum(-1).tolist()],
    )
