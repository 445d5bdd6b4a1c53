"""Training loop: prompts → responses → scores → log-probs and values → advantages → update.

The loop does not depend on which algorithm runs.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.distributed.world import SINGLE_PROCESS, RankLost, World
from apa_cli.errors import UserError
from apa_cli.hardware.machine import read_peak_memory
from apa_cli.randomness import Stream, make_generator
from apa_cli.rewards.base import CheckedScoreFunction
from apa_cli.rollout.samplers import ModelSampler
from apa_cli.rollout.statistics import compute_kl_metrics, compute_sampler_gap, compute_sampling_metrics
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.files import read_rows
from apa_cli.runs.resume import INPUTS, build_resume_overrides, find_changed_inputs
from apa_cli.runs.stopping import GracefulStop, RunStopped
from apa_cli.runs.tracking import Tracker
from apa_cli.settings import Config, GuardAction, NonFiniteAction
from apa_cli.training.evaluator import Evaluator
from apa_cli.training.fault_dump import FaultDump
from apa_cli.training.forward_passes import ForwardPasses
from apa_cli.training.guard import (
    GuardState,
    check_metrics,
    check_sampler_gap,
    drop_nonfinite,
    find_remarks,
    select_new_warnings,
)
from apa_cli.training.hooks import check_batch, check_masks, check_pair, check_result
from apa_cli.training.mfu import PhaseHook, Stopwatch, UpdateMeter
from apa_cli.training.models import RunModels
from apa_cli.training.progress import (
    Progress,
    check_state,
    collect_state,
    digest_kept_settings,
    digest_sft_settings,
    restore_state,
    save_pools,
    select_sft_inputs,
)
from apa_cli.training.responses_per_prompt import ResponsesPerPrompt
from apa_cli.training.results import plot_run, report_results, save_models
from apa_cli.training.rollout_builder import RolloutBuilder, compute_penalties, subtract_penalties
from apa_cli.training.updater import NonFiniteUpdate, Updater
from apa_cli.types import Batch, Rollout

PLOT_SECONDS = 30
"""Seconds between two plots of curves.png during a run."""


@dataclass(frozen=True)
class IterationResult:
    """Data of a finished iteration, and its metrics except those of time and memory."""

    sampled: Rollout
    """The responses of the iteration as sampled and scored, before penalties and `process_rollout`."""
    rollout: Rollout
    """The rows to train on, with what was computed for them before the update."""
    batch: Batch | None
    """None if there was no row to train on."""
    metrics: dict[str, float]


@dataclass
class Trainer:
    """Trainer of one run: built by `build_trainer`, continued by `train` from `progress` on."""

    config: Config
    directory: RunDirectory
    console: Console
    tracker: Tracker
    models: RunModels
    rollout_builder: RolloutBuilder
    forward_passes: ForwardPasses
    score: CheckedScoreFunction
    updater: Updater
    evaluator: Evaluator
    update_meter: UpdateMeter
    device: torch.device
    world: World = SINGLE_PROCESS
    inputs: dict[str, str] = field(default_factory=dict)
    """Digest of each input by its key, see `digest_inputs`."""
    progress: Progress = field(default_factory=Progress)
    stopping: GracefulStop = field(default_factory=GracefulStop)
    last_plot_time: float = 0.0
    """Time of the last plot, in seconds of `time.monotonic`."""

    @property
    def faults(self) -> FaultDump:
        """Writer of the dumps in the run's faults/."""
        return FaultDump(self.directory.path / "faults", self.world)

    # --- the loop -------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last iteration and write the results.

        Raise `RunStopped`, with the state saved, if a signal or `stop_after` ends the run earlier.
        """
        self.stopping.listen()
        if not self.progress.sft_scores:
            state = check_result(self.config.algo, "initial_state", self.config.algo.initial_state(), dict)
            self.set_progress(replace(self.progress, algorithm=state))
            check_state(self.progress.algorithm)
            self.progress.measured_by = digest_sft_settings(self.config.raw)
            if self.rollout_builder.policy_sampler.decoding is not nullcontext:
                self.rescore_sft_model()  # the decoded policy is not the SFT model, even before the first update
            self.log(self.evaluate())
            if stop_reason := None if self.is_finished() else self.gather_stop_reason():
                self.save_checkpoint()
                self.raise_stopped(*stop_reason)
        if self.progress.unrecorded is not None:
            self.finish_iteration(self.progress.unrecorded, time.monotonic())
        while not self.is_finished():
            start_time = time.monotonic()
            metrics = self.run_iteration(self.progress.iteration + 1)
            if self.rollout_builder.policy_sampler.decoding is nullcontext:  # critics change the logits on purpose
                check_sampler_gap(metrics, self.config.model.dtype)
            self.progress.iteration += 1
            self.progress.optimizer_steps = self.updater.steps
            self.progress.kl = metrics.get("kl/sequence", self.progress.kl)
            self.finish_iteration(metrics, start_time)
        if not self.world.broadcast_from_main(self.has_current_evaluation):
            self.log(self.evaluate())
        self.finish()

    def is_finished(self) -> bool:
        """Return True if all iterations are done, or if the last one reached `stop_at_kl`."""
        run = self.config.run
        at_kl_limit = run.stop_at_kl is not None and self.progress.kl >= run.stop_at_kl
        return at_kl_limit or self.progress.iteration >= run.iterations

    def has_current_evaluation(self) -> bool:
        """Return True if metrics.jsonl has an evaluation of the current policy.

        A run that is resumed with fewer iterations may end after an iteration without an evaluation.
        """
        rows = read_rows(self.directory.metrics)
        return any(row["iteration"] == self.progress.iteration and "eval/reward_mean" in row for row in rows)

    def run_iteration(self, iteration: int) -> dict[str, float]:
        """Run one iteration, counted from 1, and return its metrics."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stopwatch = Stopwatch(self.device)
        result = self.run_phases(iteration, stopwatch)
        seconds = stopwatch.seconds
        times = {
            "time/rollout_s": seconds["sampling"],
            "time/score_s": seconds["reward"],
            "time/prepare_s": seconds["prepare"],
            "time/update_s": seconds["update"] + seconds["refresh"],
        }
        total, batch = sum(times.values()), result.batch
        utilization = 0.0 if batch is None else self.update_meter.compute_utilization(batch, times["time/update_s"])
        return {
            **result.metrics,
            **times,
            "throughput/samples_per_s": len(result.sampled) / total,
            "throughput/tokens_per_s": int(result.sampled.mask.sum()) / total,
            "throughput/mfu": utilization,
            "memory/peak_gib": max(self.world.all_gather(read_peak_memory(self.device))) / 2**30,
        }

    def run_phases(self, iteration: int, phase: PhaseHook = nullcontext) -> IterationResult:
        """Run the phases of an iteration, each inside `phase(name)`.

        The phases are "sampling", "reward", "prepare", "update" and "refresh"; within "prepare" each forward pass is a
        phase too, see `ForwardPasses.run`.
        """
        with phase("sampling"):
            shard, truncated_rate = self.rollout_builder.sample(iteration, self.progress.algorithm)
        with phase("reward"), self.save_on_reward_failure():
            scores = self.world.run_on_all_ranks(lambda: self.rollout_builder.score(shard.rollout, self.score))
        with phase("prepare"):
            sampled, parts = self.rollout_builder.gather(shard, scores)
            rollout, penalties = self.process_rollout(iteration, sampled)
            rollout = self.forward_passes.run(rollout, phase)
            self.faults.check_rollout(iteration, rollout)
            batch = self.prepare(iteration, rollout)
            check_state(self.progress.algorithm)
        with phase("update"):
            update_metrics = {} if batch is None else self.update(iteration, rollout, batch)
        with phase("refresh"):
            self.refresh_samplers()
            if is_due(self.config.reference.refresh_every, iteration):
                self.models.refresh_moving_reference()
        rows = find_iteration_rows(sampled)
        metrics = {
            **compute_sampling_metrics(sampled.select_rows(rows)),
            **(compute_kl_metrics(rollout) if self.config.reference.log_kl else {}),
            **{f"reward/mean/{name}": sum(part[i] for i in rows.tolist()) / len(rows) for name, part in parts.items()},
            **({} if penalties is None else {"reward/penalty": float(penalties[rows].mean())}),
            "prompt/truncated_rate": truncated_rate,
            **({} if batch is None else batch.metrics),
            **update_metrics,
            **compute_sampler_gap(rollout),
        }
        self.progress.samples += len(sampled)
        return IterationResult(sampled, rollout, batch, metrics)

    def process_rollout(self, iteration: int, sampled: Rollout) -> tuple[Rollout, Tensor | None]:
        """Return the rows to train on, as the algorithm makes them of the scored responses, and the penalties [N]."""
        algorithm, seed = self.config.algo, self.config.run.seed
        penalties = compute_penalties(sampled, self.config.penalty)
        rollout = self.rollout_builder.complete(iteration, subtract_penalties(sampled, penalties))
        rng = make_generator(seed, Stream.process_rollout, iteration)
        result = algorithm.process_rollout(rollout, self.progress.algorithm, rng, self.rollout_builder.encoder)
        rollout, self.progress.algorithm = check_pair(algorithm, "process_rollout", result, Rollout)
        check_masks(algorithm, "process_rollout", rollout.masks, rollout)
        return rollout, penalties

    def prepare(self, iteration: int, rollout: Rollout) -> Batch | None:
        """Return the batch to train on; None if there is no row."""
        if not len(rollout):
            return None
        algorithm = self.config.algo
        result = algorithm.prepare(rollout, self.progress.algorithm)
        batch, self.progress.algorithm = check_pair(algorithm, "prepare", result, Batch)
        batch = check_batch(algorithm, "prepare", batch)
        self.faults.check_batch(iteration, rollout, batch)
        return batch

    def refresh_samplers(self) -> None:
        """Let the samplers that depend on the model under training follow it."""
        for sampler in self.rollout_builder.samplers.values():
            sampler.refresh(self.models.model)

    def update(self, iteration: int, rollout: Rollout, batch: Batch) -> dict[str, float]:
        """Run the updates of an iteration and return their metrics.

        If a loss or gradient is not finite, the responses are dumped; then guard.nonfinite=stop raises UserError, and
        guard.nonfinite=skip leaves the update out and counts it.
        """
        guard, skipped = self.config.guard.nonfinite, []

        def handle_fault(error: NonFiniteUpdate) -> None:
            name = f"iteration_{iteration:06d}_update_{error.number}"
            dump = self.faults.write(name, str(error), rollout, batch, error.rows)
            if guard is NonFiniteAction.stop:
                raise UserError(f"{error}{dump}") from error
            self.console.warn(f"{error}{dump}; the next update follows (guard.nonfinite=skip)")
            skipped.append(error.number)

        metrics = self.updater.update(batch, iteration, handle_fault)
        return {**metrics, "guard/skipped_updates": len(skipped)} if guard is NonFiniteAction.skip else metrics

    def finish_iteration(self, metrics: dict[str, float], start_time: float) -> None:
        """Evaluate if an evaluation is due, log, and save a checkpoint if one is due or the run ends here.

        Raise UserError if the guard ends the run, `RunStopped` if a signal or `stop_after` does; the state is saved.
        """
        is_last = self.is_finished()
        if is_last or is_due(self.config.evaluation.every, self.progress.iteration):
            self.progress.unrecorded = metrics  # the state that is saved if a reward fails in the evaluation
            metrics = metrics | self.evaluate()
            self.progress.unrecorded = None
        warnings, new_warnings = self.check_divergence(metrics)
        self.log(metrics)
        ends_by_guard = bool(warnings) and not is_last and self.config.guard.action is GuardAction.stop
        for text in () if ends_by_guard else new_warnings:
            self.console.warn(text)
        self.stopping.longest_iteration = max(self.stopping.longest_iteration, time.monotonic() - start_time)
        stop_reason = None if is_last else self.gather_stop_reason()
        if is_last or ends_by_guard or stop_reason or self.is_checkpoint_due():
            self.save_checkpoint()
        if ends_by_guard:
            self.raise_guard_error(warnings)
        if stop_reason:
            self.raise_stopped(*stop_reason)
        if is_last:
            self.report_kl_limit()

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Evaluate the policy on the held-out prompts, record its responses, and return the metrics."""
        start_time = time.perf_counter()
        if any(len(scores) != len(self.evaluator.prompts) for scores in self.progress.sft_scores.values()):
            self.rescore_sft_model()
        with self.save_on_reward_failure():
            sampler = self.rollout_builder.policy_sampler
            metrics, rows, scores = self.evaluator.evaluate(
                sampler, sampler.model, self.progress.sft_scores, sampler.decoding, self.progress.sft_responses
            )
        if faults := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
            raise UserError(f"evaluation after iteration {self.progress.iteration}: {', '.join(faults)}")
        if not self.progress.sft_scores:
            self.progress.sft_scores, self.progress.sft_responses = scores, [row["response"] for row in rows]
        if self.world.is_main:
            counts = {"iteration": self.progress.iteration, "samples": self.progress.samples}
            rows = [{**counts, **row} for row in rows]
            self.directory.append_rows(self.directory.samples, rows)
            self.tracker.log_samples(rows)
        self.progress.update_best(metrics["eval/reward_mean"])
        return {**metrics, "time/evaluation_s": time.perf_counter() - start_time}

    def rescore_sft_model(self) -> None:
        """Score the SFT model again and forget the best score, after a resume with settings that change scores."""
        with self.save_on_reward_failure():
            reference = self.models.borrow_reference_sampler()
            tokenizer = self.rollout_builder.prompt_format.tokenizer
            sampler = ModelSampler(cast(PreTrainedModel, reference), tokenizer, self.config.model.dtype)
            responses = self.evaluator.sample_and_score(sampler, reference)
            self.progress.sft_scores, self.progress.sft_responses = responses.scores, responses.rollout.responses
        self.models.refresh_sampler()
        self.progress.measured_by = digest_sft_settings(self.config.raw)
        self.progress.forget_best()

    @contextmanager
    def save_on_reward_failure(self) -> Iterator[None]:
        """Save the state after the last finished iteration if the reward fails in the block, which ends the run.

        The block must not change that state before the reward returns. Raise UserError with the overrides that continue
        the run.
        """
        try:
            yield
        except RankLost:
            raise
        except UserError as error:
            if not self.progress.sft_scores:  # the run has no state to save yet
                raise
            iteration = self.progress.iteration
            path = self.directory.checkpoints / checkpoints.CHECKPOINT_NAME.format(iteration)
            if not self.world.broadcast_from_main(path.exists):
                self.save_checkpoint()
            self.world.barrier()  # other ranks that end now would end rank 0 while it writes
            overrides = self.format_resume_overrides()
            raise UserError(
                f"{error}; the state after iteration {iteration} is saved; continue with {overrides}"
            ) from error

    # --- logging and early ends -----------------------------------------------------------------------------

    def log(self, metrics: dict[str, float]) -> None:
        """Record one line of metrics, print it, and plot the curves every `PLOT_SECONDS`."""
        if not self.world.is_main:
            return
        counts = {"iteration": self.progress.iteration, "samples": self.progress.samples}
        metrics = {**counts, **drop_nonfinite(metrics)}
        self.directory.append_rows(self.directory.metrics, [metrics])
        self.tracker.log(metrics)
        self.console.show_iteration(metrics)
        if time.monotonic() - self.last_plot_time > PLOT_SECONDS and self.progress.iteration > 1:
            plot_run(self.directory, self.console)
            self.last_plot_time = time.monotonic()

    def check_divergence(self, metrics: dict[str, float]) -> tuple[list[str], list[str]]:
        """Return the divergence guard's warnings about an iteration, and those and the remarks that are new."""
        warnings, state = check_metrics(self.config.guard, metrics, GuardState(**self.progress.watch))
        remarks, state = find_remarks(metrics, state, self.config.needs.least_samples > 1)
        new_warnings, state = select_new_warnings({**warnings, **remarks}, state)
        self.progress.watch = asdict(state)
        return list(warnings.values()), list(new_warnings.values())

    def gather_stop_reason(self) -> tuple[str, int] | None:
        """Return the reason to end the run after this iteration, and the exit status; None if the run continues.

        A reason on any rank ends the run on all ranks.
        """
        reason = self.stopping.reason
        reasons = self.world.all_gather(None if reason is None else (reason, self.stopping.exit_status))
        return next((reason for reason in reasons if reason), None)

    def raise_stopped(self, reason: str, status: int) -> NoReturn:
        """Raise the RunStopped of a run whose state is saved."""
        done, total = self.progress.iteration, self.config.run.iterations
        raise RunStopped(f"stopped by {reason} after iteration {done} of {total}, saved", status)

    def raise_guard_error(self, warnings: list[str]) -> None:
        """Raise the UserError of guard.action=stop once every rank is ready to end."""
        self.world.barrier()  # other ranks that end now would end rank 0 while it writes
        raise UserError(
            f"{'; '.join(warnings)}. Stopped by guard.action=stop; the state after iteration "
            f"{self.progress.iteration} is saved; continue with {self.format_resume_overrides()} guard.action=warn"
        )

    def report_kl_limit(self) -> None:
        """Print the KL if `stop_at_kl` has ended the run."""
        run, iteration = self.config.run, self.progress.iteration
        if iteration < run.iterations:
            self.console.say(
                f"stop_at_kl: kl/sequence reached {self.progress.kl:.2f} nats, the limit is {run.stop_at_kl:g}; the "
                f"run ends after iteration {iteration}"
            )

    def format_resume_overrides(self) -> str:
        """Return the overrides that continue this run."""
        return shlex.join(build_resume_overrides(self.config.raw, self.directory.path))

    def set_progress(self, progress: Progress) -> None:
        """Set the progress of the run, in the parts of the trainer that share its state too."""
        self.progress = progress
        self.updater.steps = progress.optimizer_steps
        settings = digest_kept_settings(self.config.raw, self.inputs)
        self.rollout_builder.kept = ResponsesPerPrompt(progress.kept, settings)

    # --- checkpoints and results ----------------------------------------------------------------------------

    def is_checkpoint_due(self) -> bool:
        """Return True every `checkpoint.every` iterations, and with `keep_best` if the policy is the best so far."""
        settings, iteration = self.config.checkpoint, self.progress.iteration
        is_best = settings.keep_best and self.progress.best_iteration == iteration
        return is_due(settings.every, iteration) or bool(settings.every and is_best)

    def save_checkpoint(self) -> None:
        """Save the state of the run, after the records that led to it are on disk."""
        start_time = time.monotonic()
        for file in (self.directory.metrics, self.directory.samples):
            if file.exists():
                checkpoints.fsync_path(file)
        tensors, values = collect_state(
            self.progress, self.models.model, self.updater.optimizer, self.models.moving_reference
        )
        if not self.world.is_main:
            return
        save_pools(self.progress, self.directory.pools)
        values |= {"wandb_id": self.tracker.wandb_id, INPUTS: self.inputs}
        path = checkpoints.save_checkpoint(self.directory.checkpoints, self.progress.iteration, tensors, values)
        self.prune_checkpoints()
        self.stopping.longest_save = max(self.stopping.longest_save or 0.0, time.monotonic() - start_time)
        self.console.say(f"checkpoint: {path}")

    def prune_checkpoints(self) -> None:
        """Delete the checkpoints that `checkpoint.keep_last` and `checkpoint.keep_best` do not keep."""
        settings = self.config.checkpoint
        best = self.progress.best_iteration if settings.keep_best else None
        checkpoints.prune_checkpoints(self.directory.checkpoints, settings.keep_last, best)

    def restore_checkpoint(
        self, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any], directory: RunDirectory
    ) -> None:
        """Restore the state that `save_checkpoint` saved in the run of `directory`, of which this run may be a fork."""
        recorded = values.get(INPUTS) or {}
        values = {name: value for name, value in values.items() if name not in ("wandb_id", INPUTS)}
        progress = restore_state(
            tensors, values, self.config.algo.initial_state(), self.models.model, self.updater.optimizer,
            self.models.moving_reference, directory.pools,
        )  # fmt: skip
        self.set_progress(progress)
        self.refresh_samplers()
        has_changed = bool(find_changed_inputs(select_sft_inputs(recorded), self.inputs))
        if has_changed or self.progress.measured_by != digest_sft_settings(self.config.raw):
            self.rescore_sft_model()

    def finish(self) -> None:
        """Write the trained models, the last curves and result.json, and print the results."""
        policy = self.models.gather_policy()
        critics = checkpoints.gather_module_tensors(self.models.critics)
        if not self.world.is_main:
            return
        self.prune_checkpoints()  # a run that was killed right after its last save has not pruned
        tokenizer = self.rollout_builder.prompt_format.tokenizer
        save_models(self.directory.path, policy, critics, self.models.model, tokenizer, self.config.model.resolved_path)
        plot_run(self.directory, self.console)
        report_results(self.directory, self.console, self.progress, self.config.evaluation.print_samples)


def find_iteration_rows(rollout: Rollout) -> Tensor:
    """Return the rows, int64 [n], of responses for this iteration alone, without those that are kept for later ones."""
    is_kept = torch.tensor([plan.once_per_prompt for plan in rollout.plans])[rollout.plan_index]
    return (~is_kept).nonzero().squeeze(-1)


def is_due(every: int, iteration: int) -> bool:
    """Return True every `every` iterations; 0 means never."""
    return bool(every) and iteration % every == 0
