"""How much of the machine's rate of matrix products an iteration's updates reach (MFU)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from apa_cli.hardware.machine import matrix_rate
from apa_cli.hardware.roofline import Cost, Work, update_work
from apa_cli.models.flops import training_cost
from apa_cli.models.forward import TrainingModel
from apa_cli.models.loading import TORCH_DTYPES
from apa_cli.settings import Config, DType, RunSettings
from apa_cli.types import Batch, Rollout


@dataclass(frozen=True)
class UpdateMeter:
    """The work of an iteration's updates, and the machine's rate to compare it with."""

    cost: Cost
    trained: int
    """Trained parameters, of policy and critics."""
    run: RunSettings
    itemsize: int
    """Bytes of a number at the run's precision."""
    recomputed: bool
    """Whether activations are computed again in the backward pass; that is counted as work."""
    matrix_rate: float
    """FLOP/s."""

    @classmethod
    def of(cls, model: TrainingModel, config: Config, rate: float) -> UpdateMeter:
        """For the models of a run, and a rate in FLOP/s."""
        return cls(
            cost=training_cost(model),
            trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            run=config.run,
            itemsize=TORCH_DTYPES[config.model.dtype].itemsize,
            recomputed=config.model.gradient_checkpointing,
            matrix_rate=rate,
        )

    def work(self, batch: Batch | Rollout) -> Work:
        """All updates on this rollout batch."""
        run = self.run
        return update_work(
            self.cost,
            self.trained,
            *lengths(batch),
            epochs=run.update_epochs,
            steps=run.update_epochs * run.rollout_batch_size // run.minibatch_size,
            passes=run.update_epochs * run.rollout_batch_size // run.microbatch_size,
            itemsize=self.itemsize,
            recomputed=self.recomputed,
        )

    def utilization(self, batch: Batch, seconds: float) -> float:
        """Achieved FLOP/s of the updates over the matrix rate; padding does not count as achieved."""
        return self.work(batch).flops / seconds / self.matrix_rate


def run_matrix_rate(device: torch.device, precision: DType) -> float:
    """FLOP/s at a run's precision; measured, in a fifth of a second, once per process and number of threads."""
    return known_matrix_rate(device, TORCH_DTYPES[precision], torch.get_num_threads())


@cache
def known_matrix_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    return matrix_rate(device, dtype)


def lengths(batch: Batch | Rollout) -> tuple[list[int], list[int]]:
    """Tokens of each prompt and of each response."""
    return batch.prompt_mask.sum(-1).tolist(), batch.mask.sum(-1).tolist()
