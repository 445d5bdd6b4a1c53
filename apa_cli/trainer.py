"""The loop: prompts → responses → scores → log-probs and values → advantages → update.

It never asks which algorithm runs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli import checkpoint as checkpoints
from apa_cli.console import Console
from apa_cli.datasets.base import positions
from apa_cli.evaluation import Evaluator
from apa_cli.models.forward import TrainingModel, compute_precision, response_logprobs
from apa_cli.models.loading import save_model
from apa_cli.models.lora import WithoutAdapter, save_adapter
from apa_cli.models.prompting import PromptFormat
from apa_cli.randomness import Stream, generator
from apa_cli.report.curves import draw_curves
from apa_cli.rewards.base import Score
from apa_cli.rollout.collect import collect
from apa_cli.rollout.sampler import LENGTH
from apa_cli.rollout.statistics import rollout_statistics
from apa_cli.run_directory import RunDirectory, records, replace_text
from apa_cli.settings import Config
from apa_cli.stopping import Stopped, Stopping
from apa_cli.tensor_ops import masked_mean
from apa_cli.tracking import Tracker
from apa_cli.types import Example, Prompt, Rollout, State, Tokens, UserError
from apa_cli.update import Updater, microbatch_rows

MEASURED_BY = ("dataset", "reward", "sampling", "model", "eval_seed")
"""Top-level keys that the SFT model's held-out scores depend on."""

REDRAW_SECONDS = 30
"""Seconds between two drawings of curves.png while a run goes on."""


@dataclass
class Progress:
    """What has happened so far; with the weights and the optimizer, all that a checkpoint holds."""

    iteration: int = 0
    samples: int = 0
    algorithm: State = field(default_factory=dict)
    sft_scores: dict[str, list[float]] = field(default_factory=dict)
    """The SFT model's scores on the held-out prompts by reward, see `Evaluator.evaluate`."""
    measured_by: str | None = None
    """A digest of the settings that `sft_scores` depend on."""
    best_iteration: int | None = None
    best_reward: float | None = None


@dataclass
class Trainer:
    """One run. `assembly.build_trainer` makes it; `train` runs it from where `progress` stands."""

    config: Config
    directory: RunDirectory
    console: Console
    tracker: Tracker
    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    end_tokens: frozenset[int]
    examples: list[Example]
    score: Score
    model: TrainingModel
    reference: PreTrainedModel | WithoutAdapter
    updater: Updater
    evaluator: Evaluator
    device: torch.device
    moving_reference: PreTrainedModel | None = None
    """π_init of the loss where it is refreshed; kl/* stays measured against `reference`."""
    progress: Progress = field(default_factory=Progress)
    stopping: Stopping = field(default_factory=Stopping)
    drawn_at: float = 0.0

    def train(self) -> None:
        """Runs to the last iteration. Raises `Stopped`, with everything saved, where it is asked to end before."""
        run = self.config.run
        self.stopping.listen()
        if self.progress.iteration == 0:
            self.begin()
        while self.progress.iteration < run.iterations:
            iteration, begun = self.progress.iteration + 1, time.monotonic()
            metrics = self.iterate(iteration)
            self.progress.iteration, self.progress.samples = iteration, iteration * run.rollout_batch
            last = iteration == run.iterations
            if last or (run.eval_every and iteration % run.eval_every == 0):
                metrics |= self.evaluate()
            self.log(metrics)
            self.stopping.longest_iteration = max(self.stopping.longest_iteration, time.monotonic() - begun)
            reason = None if last else self.stop_reason()
            if last or reason or self.checkpoint_due():
                self.save_checkpoint()
            if reason:
                done = f"stopped by {reason} after iteration {iteration} of {run.iterations}, saved"
                raise Stopped(done, self.stopping.status())
        self.finish()

    def stop_reason(self) -> str | None:
        """Why the run is to end after this iteration; None where it goes on. Asked once per iteration."""
        return self.stopping.reason()

    def checkpoint_due(self) -> bool:
        """Every `checkpoint_every` iterations, and when the policy is the best so far, if that is to be kept."""
        every, iteration = self.config.run.checkpoint_every, self.progress.iteration
        best = self.config.checkpoint.keep_best and self.progress.best_iteration == iteration
        return bool(every) and (iteration % every == 0 or best)

    def begin(self) -> None:
        """The state before the first iteration, and the SFT model's evaluation."""
        self.progress.algorithm = self.config.algo.initial_state()
        self.progress.measured_by = measured_by(self.config.raw)
        self.log(self.evaluate())

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration, counted from 1: sample, score, prepare, update."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds: dict[str, float] = {}
        with timed(seconds, "time/rollout_s"):
            rollout, cut = self.sample(iteration)
        with timed(seconds, "time/score_s"):
            scores = self.score(rollout.prompts, rollout.responses, rollout.columns)
            rollout = rollout.with_(scores=torch.tensor(scores.values, dtype=torch.float32))
        with timed(seconds, "time/prepare_s"):
            rollout = self.completed(rollout)
            gap = sampler_gap(rollout)
            penalties = self.penalties(rollout)
            charged = rollout if penalties is None else rollout.with_(scores=rollout.scores - penalties)
            batch, self.progress.algorithm = self.config.algo.prepare(charged, self.progress.algorithm)
        with timed(seconds, "time/update_s"):
            updates = self.updater.update(batch, iteration)
            self.refresh_reference(iteration)
        total, tokens = sum(seconds.values()), int(rollout.mask.sum())
        return {
            **rollout_statistics(rollout),
            **{f"reward/mean/{name}": sum(part) / len(part) for name, part in scores.parts.items()},
            **({} if penalties is None else {"reward/penalty": float(penalties.mean())}),
            "prompt/truncated_rate": cut,
            **batch.metrics,
            **updates,
            **gap,
            **seconds,
            "throughput/samples_per_s": len(rollout.endings) / total,
            "throughput/tokens_per_s": tokens / total,
            "memory/peak_gib": peak_memory(self.device),
        }

    def sample(self, iteration: int) -> tuple[Rollout, float]:
        """The rollout of an iteration, and the share of its prompts that were cut on the left."""
        run, settings = self.config.run, self.config.sampling
        count = run.rollout_batch // run.samples_per_prompt
        rows = positions((iteration - 1) * count, count, len(self.examples), run.seed)
        prompts: list[Prompt] = []
        cut = 0
        for place, row in enumerate(rows):
            example = self.examples[row]
            for number in range(run.samples_per_prompt):
                prompt, was_cut = self.format.prompt(example, place, number, settings.max_prompt_tokens)
                prompts.append(prompt)
                cut += was_cut
        plan = self.config.algo.plan(iteration, generator(run.seed, Stream.plan, iteration))
        with compute_precision(self.device, self.config.model.dtype):
            rollout = collect(
                {"policy": self.model.policy}, self.tokenizer, prompts, settings, self.end_tokens,
                run.seed, Stream.rollout, iteration, plan,
            )  # fmt: skip
        return rollout, cut / len(prompts)

    def penalties(self, rollout: Rollout) -> Tensor | None:
        """[N] float32, what the algorithm's scores are less than the raw ones; None where no penalty is asked for."""
        settings = self.config.penalty
        if not settings.per_token and not settings.missing_eos:
            return None
        unfinished = torch.tensor([ending == LENGTH for ending in rollout.endings])
        return settings.per_token * rollout.mask.sum(-1) + settings.missing_eos * unfinished

    @torch.no_grad()
    def completed(self, rollout: Rollout) -> Rollout:
        """Adds what the algorithm needs: reference log-probs, values, old log-probs."""
        needs, temperature = self.config.algo.needs(), self.config.sampling.temperature
        init = self.per_token(rollout, lambda part: response_logprobs(self.reference, part, temperature))
        anchor = init
        if self.moving_reference is not None:
            anchor = self.per_token(rollout, lambda part: response_logprobs(self.moving_reference, part, temperature))
        old = None
        if needs.old_logprobs:
            old = self.per_token(rollout, lambda part: response_logprobs(self.model.policy, part, temperature))
        values = {
            name: self.per_token(rollout, lambda part, name=name: self.model.values(part)[name])
            for name in needs.critics
        }
        return rollout.with_(init_logprobs=init, ref_logprobs=anchor, old_logprobs=old, values=values)

    def per_token(self, rollout: Rollout, compute: Callable[[Tokens], Tensor]) -> Tensor:
        """A [N, T] float32 result of a forward pass, computed `microbatch` sequences of similar length at a time."""
        result = torch.zeros(rollout.mask.shape)
        tensors = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
        for rows in microbatch_rows(rollout, self.config.run.microbatch):
            with compute_precision(self.device, self.config.model.dtype):
                part = Tokens(*(tensor[rows].to(self.device) for tensor in tensors))
                result[rows] = compute(part).float().cpu()
        return result

    def refresh_reference(self, iteration: int) -> None:
        """Every `reference.refresh_every` iterations the loss's reference becomes the current policy."""
        every = self.config.reference.refresh_every
        if every and iteration % every == 0:
            with torch.no_grad():
                for moving, current in zip(
                    self.moving_reference.parameters(), self.model.policy.parameters(), strict=True
                ):
                    moving.copy_(current)

    def evaluate(self) -> dict[str, float]:
        """Evaluates, records the sample table, and keeps the best score so far."""
        begun = time.perf_counter()
        if any(len(scores) != len(self.evaluator.prompts) for scores in self.progress.sft_scores.values()):
            # Resumed with other held-out prompts: what was measured on the old ones compares with nothing.
            self.measure_reference()
        metrics, rows, scores = self.evaluator.evaluate(self.model.policy, self.progress.sft_scores)
        self.progress.sft_scores = self.progress.sft_scores or scores
        where = {"iteration": self.progress.iteration, "samples": self.progress.samples}
        rows = [{**where, **row} for row in rows]
        self.directory.record(self.directory.samples, rows)
        self.tracker.log_samples(rows)
        if self.progress.best_reward is None or metrics["eval/reward_mean"] > self.progress.best_reward:
            self.progress.best_reward = metrics["eval/reward_mean"]
            self.progress.best_iteration = self.progress.iteration
        return {**metrics, "time/evaluation_s": time.perf_counter() - begun}

    def measure_reference(self) -> None:
        """The SFT model's scores anew, and no best score so far: what is measured by has changed."""
        self.progress.sft_scores = self.evaluator.replies(self.reference).scores
        self.progress.measured_by = measured_by(self.config.raw)
        self.progress.best_reward = self.progress.best_iteration = None

    def log(self, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the tracker, the console, and the curves when they are due."""
        metrics = {"iteration": self.progress.iteration, "samples": self.progress.samples, **metrics}
        self.directory.record(self.directory.metrics, [metrics])
        self.tracker.log(metrics)
        self.console.iteration(metrics)
        if time.monotonic() - self.drawn_at > REDRAW_SECONDS and self.progress.iteration > 1:
            self.draw()
            self.drawn_at = time.monotonic()

    def draw(self) -> None:
        """curves.png; a run goes on without it."""
        try:
            draw_curves(self.directory.path)
        except OSError as error:
            self.console.warn(f"curves.png cannot be written ({error.strerror})")

    def save_checkpoint(self) -> None:
        """Everything that the run's future depends on, and before it the records of what led there."""
        begun = time.monotonic()
        for file in (self.directory.metrics, self.directory.samples):
            if file.exists():
                checkpoints.sync(file)
        tensors = {
            "policy": checkpoints.module_tensors(self.model.policy, trained_only=True),
            "critics": checkpoints.module_tensors(self.model.critics, trained_only=True),
            "optimizer": checkpoints.optimizer_tensors(self.updater.optimizer),
        }
        if self.moving_reference is not None:
            tensors["moving_reference"] = checkpoints.module_tensors(self.moving_reference)
        state = dict(vars(self.progress))
        algorithm = state.pop("algorithm")
        state["algorithm"] = {name: value for name, value in algorithm.items() if not isinstance(value, Tensor)}
        state["wandb_id"] = self.tracker.wandb_id
        tensors["algorithm"] = {name: value for name, value in algorithm.items() if isinstance(value, Tensor)}
        settings = self.config.checkpoint
        path = checkpoints.save(self.directory.checkpoints, self.progress.iteration, tensors, state)
        checkpoints.prune(
            self.directory.checkpoints,
            settings.keep_last,
            self.progress.best_iteration if settings.keep_best else None,
        )
        self.stopping.longest_save = max(self.stopping.longest_save or 0.0, time.monotonic() - begun)
        self.console.say(f"checkpoint: {path}")

    def load_checkpoint(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Takes up where `save_checkpoint` left off."""
        checkpoints.load_module(self.model.policy, tensors["policy"], trained_only=True)
        checkpoints.load_module(self.model.critics, tensors["critics"], trained_only=True)
        checkpoints.load_optimizer(self.updater.optimizer, tensors["optimizer"])
        if self.moving_reference is not None:
            checkpoints.load_module(self.moving_reference, tensors["moving_reference"])
        state = {name: value for name, value in state.items() if name != "wandb_id"}
        self.progress = Progress(**{**state, "algorithm": {**state["algorithm"], **tensors["algorithm"]}})
        if self.progress.measured_by != measured_by(self.config.raw):
            self.measure_reference()

    def finish(self) -> None:
        """Writes the trained models and the last curves, and tells what came out."""
        path = self.directory.path
        try:
            self.save_models(path)
        except checkpoints.WRITE_ERRORS as error:
            raise UserError(
                f"{path}: the trained models cannot be written ({checkpoints.reason(error)}); the checkpoint is intact"
            ) from error
        self.draw()
        self.report()

    def save_models(self, path: Path) -> None:
        """model/ and, where there are critics, critic/."""
        save_model(self.model.policy, self.tokenizer, path / "model")
        if len(self.model.critics):
            (path / "critic").mkdir(exist_ok=True)
            checkpoints.save_file(checkpoints.module_tensors(self.model.critics), path / "critic" / "model.safetensors")
        for name, critic in self.model.critics.items():
            if critic.adapter is not None:
                base = self.config.model.path
                save_adapter(self.model.policy, path / "critic" / f"{name}_adapter", base, critic.adapter)

    def report(self) -> None:
        """Before and after replies to the same prompts, the final figures, and where everything lies."""
        rows = records(self.directory.samples)
        shown = [row["prompt"] for row in rows if row["iteration"] == 0][: self.config.evaluation.shown]
        ends = (0, self.progress.iteration)
        chosen = [row for prompt in shown for row in rows if row["prompt"] == prompt and row["iteration"] in ends]
        self.console.samples("Replies to the same prompts, before and after", chosen)
        final = next(line for line in reversed(records(self.directory.metrics)) if "eval/reward_mean" in line)
        gain = final["eval/reward_mean"] - final["eval/reward_mean_sft"]
        self.console.say(
            f"held-out reward {final['eval/reward_mean']:.3f} ± {final['eval/reward_ci']:.3f} (SFT model "
            f"{final['eval/reward_mean_sft']:.3f}, gain {gain:+.3f}); exact KL {final['eval/kl_exact']:.2f} nats per "
            f"reply; win rate against the SFT model {final['eval/win_rate_sft']:.2f}"
        )
        path = self.directory.path
        self.console.say(
            f"everything is in {path}: model/ (the trained policy), curves.png, metrics.jsonl, samples.jsonl, "
            "checkpoints/"
        )
        # The last file of a run: with it the run has finished.
        figures = {name: value for name, value in final.items() if name.startswith("eval/")}
        done = {"iteration": self.progress.iteration, "samples": self.progress.samples}
        replace_text(self.directory.result, json.dumps({**done, **figures}, indent=2) + "\n")


def measured_by(raw: dict[str, Any]) -> str:
    """A digest of the settings that the SFT model's held-out scores depend on."""
    text = json.dumps({key: raw[key] for key in MEASURED_BY}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sampler_gap(rollout: Rollout) -> dict[str, float]:
    """policy/sampler_gap, where the training forward's log-probs of the whole rollout are there anyway."""
    if rollout.old_logprobs is None:
        return {}
    gap = (rollout.sampler_logprobs - rollout.old_logprobs).abs()
    return {"policy/sampler_gap": float(masked_mean(gap, rollout.mask))}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Puts the seconds that the block took into `seconds[name]`, a GPU's pending work included."""
    begun = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - begun


def peak_memory(device: torch.device) -> float:
    """GiB: the most the GPU held in this iteration, or the most the process ever held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def frozen_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy that is not trained, in the compute dtype."""
    return copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
