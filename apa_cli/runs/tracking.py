"""Trackers, which record a run's metrics besides its own files: Weights & Biases, TensorBoard, or none.

`make_tracker` returns one. All trackers share the interface of `Tracker`, which does nothing, so that the trainer
never asks if there is a tracker. Once a run has started, no failure of a tracker ends the run; the failure is reported
once and the run continues without the tracker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from apa_cli.errors import UserError, get_first_line
from apa_cli.runs.files import SAMPLES, read_rows
from apa_cli.runs.wandb_access import find_offline_reason

Say = Callable[[str], None]
"""Function that shows one line to the user."""

SAMPLE_KEYS = ("iteration", "samples", "prompt", "response", "score", "kl", "ending")
"""Columns of a row given to `Tracker.log_samples`; `kl` is in nats."""

KINDS = ("none", "wandb", "tensorboard")
WANDB_MODES = ("auto", "online", "offline")

WANDB_START_TIMEOUT = 30
"""Seconds that wandb may take to start a run online before the run goes offline."""
WANDB_FINISH_TIMEOUT = 120
"""Seconds that wandb may continue uploading after the run has ended; the rest stays on disk."""


class Tracker:
    """A tracker that does nothing, and the interface of the other trackers.

    `wandb_id` is the id under which a resumed run continues (None for other trackers); a checkpoint stores it, and a
    resume passes it to `make_tracker`.
    """

    wandb_id: str | None = None

    def log(self, metrics: dict[str, float]) -> None:
        """Record one iteration. `metrics` contains "samples" (responses so far: the axis) and "iteration"."""

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Record the responses to the fixed evaluation prompts; the keys of a row are SAMPLE_KEYS."""

    def summarize(self, figures: dict[str, float]) -> None:
        """Record figures of the whole run, which belong to no iteration."""

    def finish(self, failed: bool = False) -> None:
        """Write pending records and close; `failed` marks the run as failed. Later calls have no effect."""


class _SafeTracker(Tracker):
    """A tracker whose first failure is reported and ends the recording, but not the training loop."""

    def __init__(self, kind: str, say: Say):
        self._kind, self._say, self._closed = kind, say, False

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._closed:
            return
        try:
            action()
        except Exception as error:  # whatever fails, the run continues
            self._closed = True
            self._say(f"{self._kind}: recording has failed ({get_first_line(error)}); the run continues without it")


# --- Weights & Biases ---------------------------------------------------------------------------------------


class WandbTracker(_SafeTracker):
    """Tracker that records to a Weights & Biases run, with `samples` as the axis of every metric."""

    def __init__(self, run: Any, say: Say, rows: list[dict[str, Any]] | None = None):
        """Record to `run`, a started wandb run; `rows` are the sample rows of an earlier part of a resumed run."""
        super().__init__("wandb", say)
        self._run = run
        self._rows = list(rows or [])
        self.wandb_id = run.id
        self._attempt(self._use_samples_as_axis)

    def _use_samples_as_axis(self) -> None:
        self._run.define_metric("samples")
        self._run.define_metric("*", step_metric="samples")

    def log(self, metrics: dict[str, float]) -> None:
        # wandb drops a step that it already has, so iterations that a resumed run repeats are recorded once.
        self._attempt(lambda: self._run.log(dict(metrics), step=int(metrics["iteration"])))

    def summarize(self, figures: dict[str, float]) -> None:
        self._attempt(lambda: self._run.summary.update(dict(figures)))

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._attempt(lambda: self._log_table(rows))

    def _log_table(self, rows: list[dict[str, Any]]) -> None:
        import wandb

        first = rows[0]["iteration"]  # iterations that a resumed run repeats replace the recorded ones
        self._rows = [row for row in self._rows if row["iteration"] < first] + list(rows)
        # A new table each time: wandb ignores changes to a table that was logged before.
        table = wandb.Table(
            columns=list(SAMPLE_KEYS), data=[[row.get(key) for key in SAMPLE_KEYS] for row in self._rows]
        )
        row = {"samples": rows[-1]["samples"], "evaluation/replies": table}
        self._run.log(row, step=int(rows[-1]["iteration"]))

    def finish(self, failed: bool = False) -> None:
        self._attempt(lambda: self._run.finish(exit_code=1 if failed else 0))
        self._closed = True


def _start_wandb(
    project: str,
    mode: str,
    run_dir: Path,
    name: str,
    group: str | None,
    config: dict[str, Any],
    run_id: str | None,
    say: Say,
) -> Tracker:
    """Return a WandbTracker of a started run, or a plain Tracker if wandb is disabled or cannot start."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("tracking=wandb: the package wandb is not installed; pip install wandb") from error
    if os.environ.get("WANDB_MODE", "").lower() == "disabled":
        say("wandb: disabled by WANDB_MODE=disabled")
        return Tracker()

    def start(wandb_mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=project, dir=str(run_dir), name=name, group=group, config=config, id=run_id,
            resume="allow" if run_id else None, allow_val_change=True, mode=wandb_mode, settings=_make_settings(),
        )  # fmt: skip

    try:
        settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
        reason = find_offline_reason(mode, settings.base_url, settings.api_key)
        if reason is None:
            try:
                run = start("online")
            except Exception as error:
                reason = f"cannot start online ({get_first_line(error)})"
        if reason is not None:
            run = start("offline")
    except Exception as error:
        say(f"wandb: cannot start ({get_first_line(error)}); the run continues without it")
        return Tracker()
    say(f"wandb: {run.url}" if reason is None else _describe_offline(reason, run))
    return WandbTracker(run, say, _read_recorded_samples(run_dir) if run_id else None)


def _make_settings() -> Any:
    """Return wandb settings without console output and with bounds on the time that wandb may delay a run."""
    import wandb

    values: dict[str, Any] = {
        "silent": True,
        "console": "off",  # no capture of stdout and stderr, where the live display writes
        "reinit": "finish_previous",  # the jobs of a sweep share one process
        "init_timeout": WANDB_START_TIMEOUT,
        "finish_timeout": WANDB_FINISH_TIMEOUT,  # newer versions of wandb only
    }
    return wandb.Settings(**{key: value for key, value in values.items() if key in wandb.Settings.model_fields})


def _describe_offline(reason: str, run: Any) -> str:
    folder = os.path.relpath(run.settings.sync_dir)
    return f"wandb: offline, {reason}; `wandb sync {folder}` uploads this run later"


def _read_recorded_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Return the sample rows that an interrupted run has left; none if they cannot be read."""
    try:
        return read_rows(run_dir / SAMPLES)
    except UserError:
        return []


# --- TensorBoard --------------------------------------------------------------------------------------------


class TensorBoardTracker(_SafeTracker):
    """Tracker that writes TensorBoard event files to `directory`, with `samples` as the step."""

    def __init__(self, directory: Path, config: dict[str, Any], say: Say):
        """Prepare a writer, opened at its first use. Raise UserError if the package tensorboard is missing."""
        super().__init__("tensorboard", say)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tracking=tensorboard: the package tensorboard is not installed; pip install tensorboard"
            ) from error
        self._writer_class: Any = SummaryWriter
        self._writer: Any = None
        self._directory, self._config = directory, config

    def _open_writer(self, samples: int) -> Any:
        """Return the writer, opened at its first use, when the step from which a resumed run continues is known.

        TensorBoard drops what an interrupted run had recorded from that step on (`purge_step`).
        """
        if self._writer is None:
            self._writer = self._writer_class(str(self._directory), purge_step=samples)
            self._writer.add_text("config", _indent_code(json.dumps(self._config, indent=2, default=str)), samples)
        return self._writer

    def log(self, metrics: dict[str, float]) -> None:
        self._attempt(lambda: self._log_scalars(metrics))

    def _log_scalars(self, metrics: dict[str, float]) -> None:
        samples = int(metrics["samples"])
        writer = self._open_writer(samples)
        for name, value in metrics.items():
            if name != "samples":
                writer.add_scalar(name, value, global_step=samples)
        writer.flush()

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._attempt(lambda: self._log_responses(rows))

    def _log_responses(self, rows: list[dict[str, Any]]) -> None:
        samples = int(rows[-1]["samples"])
        text = "\n\n".join(
            f"score {row['score']:.4g}, KL {row['kl']:.4g} nats, ended by {row['ending']}\n\n"
            + _indent_code(f"{row['prompt']}\n--- response ---\n{row['response']}")
            for row in rows
        )
        writer = self._open_writer(samples)
        writer.add_text("evaluation/replies", text, samples)
        writer.flush()

    def finish(self, failed: bool = False) -> None:
        self._attempt(lambda: self._close(failed))
        self._closed = True

    def _close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.add_text("ended", "failed" if failed else "finished")
            self._writer.close()


def _indent_code(text: str) -> str:
    """Return `text` as Markdown that shows it unchanged: each line indented by four spaces."""
    return "\n".join("    " + line for line in text.splitlines())


# --- choice -------------------------------------------------------------------------------------------------


def make_tracker(
    kind: str,
    project: str,
    mode: str,
    run_dir: Path,
    name: str,
    group: str | None,
    config: dict[str, Any],
    run_id: str | None,
    say: Say,
) -> Tracker:
    """Return a started tracker.

    `kind` is one of KINDS. `mode`, one of WANDB_MODES, concerns wandb only: "auto" is online if there is an API key
    and the server responds in time. A run that cannot go online is recorded offline under `run_dir`, which `say`
    reports once. WANDB_MODE in the environment takes precedence over `mode`. `group` joins the runs of a sweep;
    `run_id` is the `wandb_id` under which an interrupted run continues, else None. Raise UserError for an unknown kind
    or mode and for a package that is not installed, and nothing else, since a tracker must not end a run.
    """
    if kind not in KINDS:
        raise UserError(f"tracking.kind: {kind!r} is unknown; give one of {', '.join(KINDS)}")
    if mode not in WANDB_MODES:
        raise UserError(f"tracking.mode: {mode!r} is unknown; give one of {', '.join(WANDB_MODES)}")
    if kind == "none":
        return Tracker()
    if kind == "tensorboard":
        return TensorBoardTracker(Path(run_dir) / "tensorboard", config, say)
    return _start_wandb(project, mode, Path(run_dir), name, group, config, run_id, say)
