"""The loop: prompts → responses → scores → log-probs and values → advantages → update.

It never asks which algorithm runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.datasets.base import positions
from apa_cli.distributed.world import ALONE, ContactLost, World
from apa_cli.errors import UserError
from apa_cli.hardware.machine import peak_bytes
from apa_cli.hardware.oom import Halving
from apa_cli.models.forward import TrainingModel, compute_precision, response_logprobs
from apa_cli.models.loading import save_model
from apa_cli.models.lora import WithoutAdapter, save_adapter
from apa_cli.models.prompting import PromptFormat
from apa_cli.models.sharding import refresh
from apa_cli.randomness import Stream, generator
from apa_cli.report.curves import draw_curves
from apa_cli.rewards.base import Score
from apa_cli.rollout.collect import collect, concatenated
from apa_cli.rollout.engine import LENGTH
from apa_cli.rollout.statistics import rollout_statistics
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory, replace_text
from apa_cli.runs.records import records
from apa_cli.runs.resume import resume_words
from apa_cli.runs.stopping import Stopped, Stopping
from apa_cli.runs.tracking import Tracker
from apa_cli.settings import Config, GuardAction, NonFinite
from apa_cli.tensor_ops import masked_mean
from apa_cli.training import fault_dump as faults
from apa_cli.training.evaluator import Evaluator
from apa_cli.training.guard import Watch, signs, unreported
from apa_cli.training.mfu import UpdateMeter
from apa_cli.training.progress import Progress
from apa_cli.training.updater import UnusableUpdate, Updater, microbatch_rows
from apa_cli.types import Batch, Example, Prompt, Rollout, Tokens

MEASURED_BY = ("dataset", "reward", "sampling", "model")
"""Sections that the SFT model's held-out scores depend on, beside evaluation.seed."""

REDRAW_SECONDS = 30
"""Seconds between two drawings of curves.png while a run goes on."""
SCORED = ("advantages", "returns", "log_normalizer")
"""What an algorithm makes of scores."""


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
    sampler: PreTrainedModel
    """What draws: the policy itself, or under fsdp a whole copy of it, refreshed after every update."""
    sampling_batch: Halving
    """Sequences drawn side by side."""
    update_meter: UpdateMeter
    world: World = ALONE
    moving_reference: PreTrainedModel | None = None
    """π_init of the loss where it is refreshed; kl/* stays measured against `reference`."""
    progress: Progress = field(default_factory=Progress)
    stopping: Stopping = field(default_factory=Stopping)
    drawn_at: float = 0.0

    def train(self) -> None:
        """Runs to the last iteration. Raises `Stopped`, with everything saved, where it is asked to end before."""
        run = self.config.run
        self.stopping.listen()
        if not self.progress.sft_scores:
            self.begin()
        if self.progress.unrecorded is not None:
            self.conclude(self.progress.unrecorded, time.monotonic())
        while not self.ended():
            iteration, begun = self.progress.iteration + 1, time.monotonic()
            metrics = self.iterate(iteration)
            self.progress.iteration, self.progress.samples = iteration, iteration * run.rollout_batch_size
            self.progress.kl = metrics["kl/sequence"]
            self.conclude(metrics, begun)
        if not self.world.from_main(self.evaluated):
            self.log(self.evaluate())
        self.finish()

    def evaluated(self) -> bool:
        """Whether the records have an evaluation of the policy as it is: a shortened run may end where none was due."""
        rows = records(self.directory.metrics)
        return any(row["iteration"] == self.progress.iteration and "eval/reward_mean" in row for row in rows)

    def ended(self) -> bool:
        """Whether all iterations are done, or the KL that the run may cost is spent."""
        run = self.config.run
        spent = run.stop_at_kl is not None and self.progress.kl >= run.stop_at_kl
        return spent or self.progress.iteration >= run.iterations

    def conclude(self, metrics: dict[str, float], begun: float) -> None:
        """What follows an iteration: an evaluation if one is due, the records, the guard, a checkpoint if one is due.

        UserError where the guard ends the run, `Stopped` where it was asked to end; its state is saved then.
        """
        run, iteration, last = self.config.run, self.progress.iteration, self.ended()
        every = self.config.evaluation.every
        if last or (every and iteration % every == 0):
            self.progress.unrecorded = metrics
            metrics = metrics | self.evaluate()
            self.progress.unrecorded = None
        found, watch = signs(self.config.guard, metrics, Watch(**self.progress.watch))
        new, watch = unreported(found, watch)
        self.progress.watch = asdict(watch)
        self.log(metrics)
        guarded = bool(found) and not last and self.config.guard.action is GuardAction.stop
        for text in () if guarded else new.values():
            self.console.warn(text)
        self.stopping.longest_iteration = max(self.stopping.longest_iteration, time.monotonic() - begun)
        reason = None if last else self.stop_reason()
        if last or guarded or reason or self.checkpoint_due():
            self.save_checkpoint()
        if guarded:
            self.world.meet(self.world.timeout)  # the others' end would end process 0 while it writes
            raise UserError(
                f"{'; '.join(found.values())}. Stopped by guard.action=stop; the state after iteration {iteration} is "
                f"saved; go on with {self.resume_words()} guard.action=warn"
            )
        if reason:
            why, status = reason
            raise Stopped(f"stopped by {why} after iteration {iteration} of {run.iterations}, saved", status)
        if last and iteration < run.iterations:
            self.console.say(
                f"kl/sequence is {self.progress.kl:.2f} nats, which is stop_at_kl {run.stop_at_kl:g} or more: the run "
                f"ends with iteration {iteration}"
            )

    def resume_words(self) -> str:
        return shlex.join(resume_words(self.config.raw, self.directory.path))

    def stop_reason(self) -> tuple[str, int] | None:
        """Why the run is to end after this iteration, and with which status; None where it goes on.

        Asked once per iteration; what one process has to say counts for all.
        """
        own = self.stopping.reason()
        reasons = self.world.gather(None if own is None else (own, self.stopping.status()))
        return next((reason for reason in reasons if reason), None)

    def checkpoint_due(self) -> bool:
        """Every `checkpoint.every` iterations, and when the policy is the best so far, if that is to be kept."""
        every, iteration = self.config.checkpoint.every, self.progress.iteration
        best = self.config.checkpoint.keep_best and self.progress.best_iteration == iteration
        return bool(every) and (iteration % every == 0 or best)

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Where a reward fails in here, the state after the last finished iteration is saved before the run ends.

        Nothing of that state may be changed between the iteration's end and the reward's answer.
        """
        try:
            yield
        except ContactLost:
            raise
        except UserError as error:
            if not self.progress.sft_scores:  # the run has not begun
                raise
            iteration = self.progress.iteration
            path = self.directory.checkpoints / checkpoints.NAME.format(iteration)
            if not self.world.from_main(path.exists):
                self.save_checkpoint()
            self.world.meet(self.world.timeout)  # the others' end would end process 0 while it writes
            raise UserError(
                f"{error}; the state after iteration {iteration} is saved; go on with {self.resume_words()}"
            ) from error

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
        with timed(seconds, "time/score_s"), self.state_kept():
            scores = self.world.together(lambda: self.score(rollout.prompts, rollout.responses, rollout.columns))
            rollout = rollout.with_(scores=torch.tensor(scores.values, dtype=torch.float32))
        with timed(seconds, "time/prepare_s"):
            rollout, parts = self.gathered(self.completed(rollout), scores.parts)
            self.check_finite(iteration, rollout)
            gap = sampler_gap(rollout)
            penalties = self.penalties(rollout)
            charged = rollout if penalties is None else rollout.with_(scores=rollout.scores - penalties)
            batch, self.progress.algorithm = self.config.algo.prepare(charged, self.progress.algorithm)
            self.check_finite(iteration, rollout, batch)
        skipped: list[UnusableUpdate] = []
        with timed(seconds, "time/update_s"):
            updates = self.updater.update(
                batch, iteration, lambda error: skipped.append(self.skippable(error, iteration, rollout, batch))
            )
            self.refresh_sampler()
            self.refresh_reference(iteration)
        total, tokens = sum(seconds.values()), int(rollout.mask.sum())
        return {
            **rollout_statistics(rollout),
            **{f"reward/mean/{name}": sum(part) / len(part) for name, part in parts.items()},
            **({} if penalties is None else {"reward/penalty": float(penalties.mean())}),
            "prompt/truncated_rate": cut,
            **batch.metrics,
            **updates,
            **({"guard/skipped_updates": len(skipped)} if self.config.guard.nonfinite is NonFinite.skip else {}),
            **gap,
            **seconds,
            "throughput/samples_per_s": len(rollout.endings) / total,
            "throughput/tokens_per_s": tokens / total,
            "throughput/mfu": self.update_meter.utilization(batch, seconds["time/update_s"]),
            "memory/peak_gib": max(self.world.gather(peak_bytes(self.device))) / 2**30,
        }

    def sample(self, iteration: int) -> tuple[Rollout, float]:
        """This process's part of an iteration's rollout, and the share of all its prompts that were cut on the left."""
        run, settings = self.config.run, self.config.sampling
        count = run.rollout_batch_size // run.samples_per_prompt
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
        own = [prompts[i] for i in self.world.share(len(prompts))]

        def drawn(microbatch: int) -> Rollout:
            with compute_precision(self.device, self.config.model.dtype):
                return collect(
                    {"policy": self.sampler}, self.tokenizer, own, replace(settings, microbatch_size=microbatch),
                    self.end_tokens, run.seed, Stream.rollout, iteration, plan,
                )  # fmt: skip

        return self.sampling_batch.run(drawn), cut / len(prompts)

    def gathered(self, rollout: Rollout, parts: Mapping[str, list[float]]) -> tuple[Rollout, Mapping[str, list[float]]]:
        """The whole rollout and the scores of a reward's parts, on every process."""
        if self.world.size == 1:
            return rollout, parts
        rollouts, scores = zip(*self.world.gather((rollout, parts)), strict=True)
        count = self.config.run.rollout_batch_size
        whole = {name: [value for own in scores for value in own[name]][:count] for name in parts}
        return concatenated(list(rollouts), self.tokenizer.pad_token_id, count), whole

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
        old, values = None, {}
        if needs.old_logprobs:
            old = self.per_token(rollout, lambda part: self.model(part, critics=()).logprobs)
        for name in needs.critics:
            values[name] = self.per_token(
                rollout, lambda part, name=name: self.model(part, with_policy=False, critics=(name,)).values[name]
            )
        return rollout.with_(init_logprobs=init, ref_logprobs=anchor, old_logprobs=old, values=values)

    def per_token(self, rollout: Rollout, compute: Callable[[Tokens], Tensor]) -> Tensor:
        """A [N, T] float32 result of a forward pass, computed `microbatch` sequences of similar length at a time."""
        tensors = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)

        def computed(microbatch: int) -> Tensor:
            result = torch.zeros(rollout.mask.shape)
            for rows in microbatch_rows(rollout, microbatch):
                with compute_precision(self.device, self.config.model.dtype):
                    part = Tokens(*(tensor[rows].to(self.device) for tensor in tensors))
                    result[rows] = compute(part).float().cpu()
            return result

        return self.updater.microbatch.run(computed)

    def refresh_sampler(self) -> None:
        """Where a copy samples, it becomes the current policy."""
        if self.sampler is not self.model.policy:
            refresh(self.sampler, self.model.policy)

    def check_finite(self, iteration: int, rollout: Rollout, batch: Batch | None = None) -> None:
        """UserError, the responses kept, for log-probs, values or (in the batch) advantages that are not finite.

        There is nothing to skip then: what is trained is broken, or a score beyond what the algorithm can take.
        """
        names = ("sampler_logprobs", "init_logprobs", "ref_logprobs", "old_logprobs", "values")
        found = faults.not_finite(rollout, names) if batch is None else faults.not_finite(batch, SCORED)
        if found is not None:
            what, rows = found
            what = f"iteration {iteration}: {what}"
            where = self.keep_fault(f"iteration_{iteration:06d}", what, rollout, batch, rows)
            raise UserError(f"{what}; nothing was changed by this iteration{where}")

    def skippable(self, error: UnusableUpdate, iteration: int, rollout: Rollout, batch: Batch) -> UnusableUpdate:
        """The same error, its responses kept and the user told. UserError where such an update ends the run."""
        name = f"iteration_{iteration:06d}_update_{error.number}"
        where = self.keep_fault(name, str(error), rollout, batch, error.rows)
        if self.config.guard.nonfinite is NonFinite.stop:
            raise UserError(f"{error}{where}") from error
        self.console.warn(f"{error}{where}; the next one follows (guard.nonfinite=skip)")
        return error

    def keep_fault(self, name: str, what: str, rollout: Rollout, batch: Batch | None, rows: Tensor) -> str:
        """Keeps the responses of a fault in faults/; says where, to be put behind what is wrong."""
        file = None
        if self.world.is_main:
            file = faults.keep(self.directory.path / "faults", name, what, rollout, batch, rows)
        self.world.meet(self.world.timeout)  # the others' end would end process 0 while it writes
        return "" if file is None else f"; the responses are in {file}"

    def refresh_reference(self, iteration: int) -> None:
        """Every `reference.refresh_every` iterations the loss's reference becomes the current policy."""
        every = self.config.reference.refresh_every
        if every and iteration % every == 0:
            refresh(self.moving_reference, self.model.policy)

    def evaluate(self) -> dict[str, float]:
        """Evaluates, records the sample table, and keeps the best score so far."""
        begun = time.perf_counter()
        if any(len(scores) != len(self.evaluator.prompts) for scores in self.progress.sft_scores.values()):
            # Resumed with other held-out prompts: what was measured on the old ones compares with nothing.
            self.measure_reference()
        with self.state_kept():
            metrics, rows, scores = self.evaluator.evaluate(self.sampler, self.progress.sft_scores)
        if wrong := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
            raise UserError(f"evaluation after iteration {self.progress.iteration}: {', '.join(wrong)}")
        self.progress.sft_scores = self.progress.sft_scores or scores
        where = {"iteration": self.progress.iteration, "samples": self.progress.samples}
        if self.world.is_main:
            rows = [{**where, **row} for row in rows]
            self.directory.record(self.directory.samples, rows)
            self.tracker.log_samples(rows)
        if self.progress.best_reward is None or metrics["eval/reward_mean"] > self.progress.best_reward:
            self.progress.best_reward = metrics["eval/reward_mean"]
            self.progress.best_iteration = self.progress.iteration
        return {**metrics, "time/evaluation_s": time.perf_counter() - begun}

    def measure_reference(self) -> None:
        """The SFT model's scores anew, and no best score so far: what is measured by has changed."""
        drawing = self.reference
        if hasattr(drawing, "unshard"):  # replies end at different steps, and a sharded model takes them together
            drawing.reshard()
            drawing = self.sampler
            refresh(drawing, self.reference)
        with self.state_kept():
            self.progress.sft_scores = self.evaluator.replies(drawing).scores
        self.refresh_sampler()
        self.progress.measured_by = measured_by(self.config.raw)
        self.progress.best_reward = self.progress.best_iteration = None

    def log(self, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the tracker, the console, and the curves when they are due."""
        if not self.world.is_main:
            return
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
        if not self.world.is_main:
            return
        path = checkpoints.save(self.directory.checkpoints, self.progress.iteration, tensors, state)
        self.prune_checkpoints()
        self.stopping.longest_save = max(self.stopping.longest_save or 0.0, time.monotonic() - begun)
        self.console.say(f"checkpoint: {path}")

    def prune_checkpoints(self) -> None:
        """Leaves those that `checkpoint` asks for."""
        settings = self.config.checkpoint
        best = self.progress.best_iteration if settings.keep_best else None
        checkpoints.prune(self.directory.checkpoints, settings.keep_last, best)

    def load_checkpoint(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Takes up where `save_checkpoint` left off."""
        checkpoints.load_module(self.model.policy, tensors["policy"], trained_only=True)
        self.refresh_sampler()
        checkpoints.load_module(self.model.critics, tensors["critics"], trained_only=True)
        checkpoints.load_optimizer(self.updater.optimizer, tensors["optimizer"])
        if self.moving_reference is not None and "moving_reference" in tensors:  # else it has not moved yet
            checkpoints.load_module(self.moving_reference, tensors["moving_reference"])
        state = {name: value for name, value in state.items() if name != "wandb_id"}
        algorithm = {**self.config.algo.initial_state(), **state["algorithm"], **tensors["algorithm"]}
        self.progress = Progress(**{**state, "algorithm": algorithm})
        if self.progress.measured_by != measured_by(self.config.raw):
            self.measure_reference()

    def finish(self) -> None:
        """Writes the trained models and the last curves, and tells what came out."""
        path = self.directory.path
        policy = self.model.policy if self.sampler is self.model.policy else self.gathered_policy()
        critics = checkpoints.module_tensors(self.model.critics)
        if not self.world.is_main:
            return
        self.prune_checkpoints()  # a run that was killed between its last save and this has not done it
        try:
            self.save_models(path, policy, critics)
        except checkpoints.WRITE_ERRORS as error:
            raise UserError(
                f"{path}: the trained models cannot be written ({checkpoints.reason(error)}); the checkpoint is intact"
            ) from error
        self.draw()
        self.report()

    def save_models(self, path: Path, policy: PreTrainedModel, critics: dict[str, Tensor]) -> None:
        """model/ and, where there are critics, critic/."""
        save_model(policy, self.tokenizer, path / "model")
        if critics:
            (path / "critic").mkdir(exist_ok=True)
            checkpoints.save_file(critics, path / "critic" / "model.safetensors")
        for name, critic in self.model.critics.items():
            if critic.adapter is not None:
                base = self.config.model.path
                save_adapter(policy, path / "critic" / f"{name}_adapter", base, critic.adapter)

    def gathered_policy(self) -> PreTrainedModel:
        """The sharded policy as a whole model in full precision: the copy that samples, which is needed no more."""
        refresh(self.sampler.float(), self.model.policy)
        return self.sampler

    def report(self) -> None:
        """Before and after replies to the same prompts, the final figures, and where everything lies."""
        rows = records(self.directory.samples)
        shown = [row["prompt"] for row in rows if row["iteration"] == 0][: self.config.evaluation.print_samples]
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
    settings = {"seed": raw["evaluation"]["seed"]} | {key: raw[key] for key in MEASURED_BY}
    text = json.dumps(settings, sort_keys=True, default=str)
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
