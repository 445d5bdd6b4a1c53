"""Where a run's metrics go besides its own files: Weights & Biases, TensorBoard, or nowhere.

`make_tracker` picks one. All trackers share the interface of `Tracker`, which does nothing, so that the
trainer never asks whether there is one. Tracking is a courtesy: once a run has started, no failure of a
tracker stops it; the failure is said once and the run carries on without.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from apa_cli.errors import UserError
from apa_cli.network import answers

Say = Callable[[str], None]
"""Shows one line to the user."""

SAMPLE_KEYS = ("iteration", "samples", "prompt", "response", "score", "kl", "ending")
"""The columns of a row given to `Tracker.log_samples`; `kl` is in nats."""

INIT_TIMEOUT = 30
"""Seconds wandb may take to start a run online before the run goes offline."""
FINISH_TIMEOUT = 120
"""Seconds wandb may go on uploading after the run has ended; what is left stays on disk."""
REACH_TIMEOUT = 4
"""Seconds the wandb server has to answer before the run goes offline."""

PUBLIC_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
"""Two addresses of one public service: a key stored for either is good for both."""


class Tracker:
    """A tracker that does nothing, and the interface of those that do.

    `wandb_id` is the id under which a resumed run continues (None where there is no such thing); a
    checkpoint stores it and hands it back to `make_tracker`.
    """

    wandb_id: str | None = None

    def log(self, metrics: dict[str, float]) -> None:
        """Record one iteration. `metrics` contains "samples" (responses so far: the axis) and "iteration"."""

    def log_samples(self, rows: list[dict]) -> None:
        """Record the replies to the fixed evaluation prompts; the keys of a row are SAMPLE_KEYS."""

    def summarize(self, figures: dict[str, float]) -> None:
        """Record figures of the whole run, which belong to no iteration."""

    def finish(self, failed: bool = False) -> None:
        """Write what is left and close; `failed` marks the run as failed. Later calls do nothing."""


class _CarefulTracker(Tracker):
    """A tracker whose failures are said once and never reach the training loop."""

    def __init__(self, kind: str, say: Say):
        self._kind, self._say, self._broken = kind, say, False

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker does, the run goes on
            self._broken = True
            self._say(f"{self._kind} has stopped recording, the run goes on without it: {_one_line(error)}")


class WandbTracker(_CarefulTracker):
    """Records to a Weights & Biases run with `samples` as the axis of every metric."""

    def __init__(self, run, say: Say, rows: list[dict] | None = None):
        """`run` is a started wandb run; `rows` the sample rows of an earlier part of a resumed run."""
        super().__init__("wandb", say)
        self._run = run
        self._rows = list(rows or [])
        self.wandb_id = run.id
        self._attempt(self._use_samples_as_axis)

    def _use_samples_as_axis(self) -> None:
        self._run.define_metric("samples")
        self._run.define_metric("*", step_metric="samples")

    def log(self, metrics: dict[str, float]) -> None:
        # wandb drops a step that it has: what a resumed run repeats is there once.
        self._attempt(lambda: self._run.log(dict(metrics), step=int(metrics["iteration"])))

    def summarize(self, figures: dict[str, float]) -> None:
        self._attempt(lambda: self._run.summary.update(dict(figures)))

    def log_samples(self, rows: list[dict]) -> None:
        if rows:
            self._attempt(lambda: self._log_table(rows))

    def _log_table(self, rows: list[dict]) -> None:
        import wandb

        first = rows[0]["iteration"]  # what a resumed run repeats replaces what it had
        self._rows = [row for row in self._rows if row["iteration"] < first] + list(rows)
        # A new table each time: wandb ignores changes to a table that was logged before.
        table = wandb.Table(
            columns=list(SAMPLE_KEYS), data=[[row.get(key) for key in SAMPLE_KEYS] for row in self._rows]
        )
        row = {"samples": rows[-1]["samples"], "evaluation/replies": table}
        self._run.log(row, step=int(rows[-1]["iteration"]))

    def finish(self, failed: bool = False) -> None:
        self._attempt(lambda: self._run.finish(exit_code=1 if failed else 0))
        self._broken = True  # nothing more can be recorded, and nothing needs to be said about it


class TensorBoardTracker(_CarefulTracker):
    """Records TensorBoard event files in `directory`, with `samples` as the step."""

    def __init__(self, directory: Path, config: dict, say: Say):
        """Raises UserError where the tensorboard package is missing."""
        super().__init__("tensorboard", say)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("tracking=tensorboard needs the package tensorboard, which is not installed") from error
        self._writer_class, self._writer = SummaryWriter, None
        self._directory, self._config = directory, config

    def _writer_at(self, samples: int):
        """The writer, opened at its first use: then it is known where a resumed run continues.

        TensorBoard drops what an interrupted run had recorded from there on (`purge_step`).
        """
        if self._writer is None:
            self._writer = self._writer_class(str(self._directory), purge_step=samples)
            self._writer.add_text("config", _as_code(json.dumps(self._config, indent=2, default=str)), samples)
        return self._writer

    def log(self, metrics: dict[str, float]) -> None:
        self._attempt(lambda: self._log_scalars(metrics))

    def _log_scalars(self, metrics: dict[str, float]) -> None:
        samples = int(metrics["samples"])
        writer = self._writer_at(samples)
        for name, value in metrics.items():
            if name != "samples":
                writer.add_scalar(name, value, global_step=samples)
        writer.flush()

    def log_samples(self, rows: list[dict]) -> None:
        if rows:
            self._attempt(lambda: self._log_replies(rows))

    def _log_replies(self, rows: list[dict]) -> None:
        samples = int(rows[-1]["samples"])
        text = "\n\n".join(
            f"score {row['score']:.4g}, KL {row['kl']:.4g} nats, ended by {row['ending']}\n\n"
            + _as_code(f"{row['prompt']}\n--- reply ---\n{row['response']}")
            for row in rows
        )
        writer = self._writer_at(samples)
        writer.add_text("evaluation/replies", text, samples)
        writer.flush()

    def finish(self, failed: bool = False) -> None:
        self._attempt(lambda: self._close(failed))
        self._broken = True

    def _close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.add_text("ended", "failed" if failed else "finished")
            self._writer.close()


def make_tracker(
    kind: str,
    project: str,
    mode: str,
    run_dir: Path,
    name: str,
    group: str | None,
    config: dict,
    run_id: str | None,
    say: Say,
) -> Tracker:
    """The tracker a configuration asks for, started.

    `kind` is "none", "wandb" or "tensorboard". `mode` concerns wandb: "online", "offline", or "auto",
    which is online where there is an API key and the server answers within REACH_TIMEOUT seconds.
    What cannot be had online is recorded offline under `run_dir`, which `say` tells once. WANDB_MODE in
    the environment goes before `mode`. `group` joins the runs of a sweep; `run_id` is the `wandb_id`
    under which an interrupted run continues, else None. Raises UserError for an unknown kind or mode and
    for a package that is not installed; nothing else is raised, for no run should fail over its tracker.
    """
    if kind == "none":
        return Tracker()
    if kind == "tensorboard":
        return TensorBoardTracker(Path(run_dir) / "tensorboard", config, say)
    if kind != "wandb":
        raise UserError(f"tracking {kind!r} is unknown; there are none, wandb and tensorboard")
    if mode not in ("auto", "online", "offline"):
        raise UserError(f"tracking mode {mode!r} is unknown; there are auto, online and offline")
    return _make_wandb(project, mode, Path(run_dir), name, group, config, run_id, say)


def _make_wandb(
    project: str,
    mode: str,
    run_dir: Path,
    name: str,
    group: str | None,
    config: dict,
    run_id: str | None,
    say: Say,
) -> Tracker:
    """A started WandbTracker, or a tracker that does nothing where wandb is switched off or cannot start."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("tracking=wandb needs the package wandb, which is not installed") from error
    if os.environ.get("WANDB_MODE", "").lower() == "disabled":
        say("wandb is switched off by WANDB_MODE=disabled")
        return Tracker()

    def start(where: str):
        return wandb.init(
            project=project, dir=str(run_dir), name=name, group=group, config=config, id=run_id,
            resume="allow" if run_id else None, allow_val_change=True, mode=where, settings=_quiet_settings(),
        )  # fmt: skip

    try:
        service = wandb.setup(settings=wandb.Settings(silent=True))
        reason = _why_offline(mode, service.settings)
        if reason is None:
            try:
                run = start("online")
            except Exception as error:
                reason = f"it does not start online ({_one_line(error)})"
        if reason is not None:
            run = start("offline")
    except Exception as error:
        say(f"wandb does not start, the run goes on without it: {_one_line(error)}")
        return Tracker()
    say(f"wandb: {run.url}" if reason is None else _offline_message(reason, run))
    return WandbTracker(run, say, _recorded_rows(run_dir) if run_id else None)


def _quiet_settings():
    """Settings that keep wandb off the console and bound how long it may hold a run up."""
    import wandb

    wanted = {
        "silent": True,
        "console": "off",  # leave stdout and stderr alone: the live display writes there
        "reinit": "finish_previous",  # the jobs of a sweep share one process
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,  # newer versions of wandb only
    }
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})


def _why_offline(mode: str, settings) -> str | None:
    """Why this run is recorded offline, in words; None if it should go online."""
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("offline", "dryrun"):
        return f"WANDB_MODE is {asked}"
    if mode == "offline":
        return "as configured"
    if not _has_key(settings.base_url, settings.api_key):
        return "no API key (`wandb login` stores one)"
    if mode == "auto" and asked != "online" and not answers(settings.base_url, REACH_TIMEOUT):
        return f"no answer from {settings.base_url}"
    return None


def _offline_message(reason: str, run) -> str:
    folder = os.path.relpath(run.settings.sync_dir)
    return f"wandb works offline: {reason}; `wandb sync {folder}` uploads this run later"


def _has_key(base_url: str, settings_key: str | None) -> bool:
    """Whether wandb would find credentials for its server without asking anybody."""
    import netrc
    from urllib.parse import urlsplit

    if settings_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).netloc
    hosts = PUBLIC_HOSTS if host in PUBLIC_HOSTS else {host}
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for name in names:
        try:
            stored = netrc.netrc(Path(name).expanduser()).hosts
        except (OSError, netrc.NetrcParseError, RuntimeError):  # no file, no sense in it, no home folder
            continue
        if hosts & set(stored):
            return True
    return False


def _recorded_rows(run_dir: Path) -> list[dict]:
    """The sample rows that an interrupted run has left in its samples.jsonl, as far as they can be read."""
    rows = []
    try:
        text = (run_dir / "samples.jsonl").read_text(encoding="utf-8")
        for line in filter(None, text.split("\n")):  # not splitlines: a reply may hold other line ends
            row = json.loads(line)
            if isinstance(row, dict) and "iteration" in row:
                rows.append(row)
    except (OSError, ValueError):
        pass  # no file, or a last line cut short
    return rows


def _as_code(text: str) -> str:
    """`text` as Markdown that shows it unchanged: each line indented by four spaces."""
    return "\n".join("    " + line for line in text.splitlines())


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
