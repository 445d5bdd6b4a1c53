"""Digests of a run's inputs, which its checkpoints record, and their comparison when a run continues."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from apa_cli import user_code
from apa_cli.errors import ConfigError
from apa_cli.hashing import hash_chat_template, hash_examples, hash_path, hash_source, hash_target, hash_tokenizer
from apa_cli.runs.resume import find_changed_inputs, format_changed_inputs, is_within, may_change
from apa_cli.settings import Config
from apa_cli.types import Example

STAGE_SECTIONS = ("dataset", "model")
"""Sections whose inputs a stage reads."""
PATH_FIELDS, CODE_FIELD = ("path", "paths"), "target"
"""Fields that name models or files, and the field that names a function."""
CODE_SECTIONS = ("algo", "plan", "reward")
"""Sections whose class may be the user's; the class of `dataset` is known by the rows that it returns."""


def digest_inputs(
    config: Config, train: list[Example], held_out: list[Example], sections: tuple[str, ...] | None = None
) -> dict[str, str]:
    """Return the digest of each input of a run by its key, such as "dataset.test", "model.path" or "reward.target".

    The paths of the stages' models must be filled in, and hub ids be loaded. `sections` selects the inputs of these
    sections (None: of all).
    """
    model = config.model
    source = model.tokenizer or model.path
    digests: dict[str, str | None] = {
        "dataset.train": hash_examples(train),
        "dataset.test": hash_examples(held_out),
        "model.path": model.path and hash_path(model.path),
        "model.tokenizer": source and hash_tokenizer(source),
        "model.tokenizer.chat_template": source and hash_chat_template(source),
        "guide.path": config.guide.path and hash_path(config.guide.path),
    }
    for section in CODE_SECTIONS:
        digests |= dict(_digest_fields(getattr(config, section), section))
    for part in config.evaluation.rewards:
        digests |= dict(_digest_fields(part.reward, f"evaluation.rewards.{part.name}"))
    chosen = digests if sections is None else [key for key in digests if key.partition(".")[0] in sections]
    return {key: value for key in chosen if (value := digests[key])}


def _digest_fields(settings: Any, key: str) -> Iterator[tuple[str, str | None]]:
    """Yield the key and digest of the user's class, and of every file, model and function that its fields name."""
    module = type(settings).__module__
    if module.startswith(user_code.__name__) or module.partition(".")[0] != __name__.partition(".")[0]:
        file = inspect.getsourcefile(type(settings))
        yield f"{key}._target_", file and hash_source(Path(file))
    for field in fields(settings):
        yield from _digest_value(getattr(settings, field.name), f"{key}.{field.name}", field.name)


def _digest_value(value: Any, key: str, name: str) -> Iterator[tuple[str, str | None]]:
    """Yield the digests of one value; `name` is the name of its field."""
    if isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            part = getattr(entry, "name", None) or str(number)
            yield from _digest_value(entry, f"{key}.{part}", name)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _digest_fields(getattr(value, "reward", value), key)
    elif isinstance(value, str) and name == CODE_FIELD:
        yield key, hash_target(value)
    elif isinstance(value, str) and (name in PATH_FIELDS or ("/" in value and Path(value).expanduser().exists())):
        yield key, hash_path(value)


def compare_inputs(
    recorded: dict[str, str] | None,
    present: dict[str, str],
    allowed: list[str],
    is_fork: bool,
    say: Callable[[str], None],
) -> None:
    """Report the inputs that differ from those that a checkpoint records.

    Raise ConfigError for a resume if one of them is not among the keys and sections `allowed`; a fork may differ in
    all. `recorded` is None for a checkpoint of an earlier version.
    """
    if recorded is None:
        say("resume: the checkpoint is of an earlier version, which recorded no digests of its data, models and code; "
            "that they are the same is not checked")  # fmt: skip
        return
    changed = find_changed_inputs(recorded, present)
    refused = [key for key in changed if not may_change(key, allowed)]
    if refused and not is_fork:
        keys = ",".join(dict.fromkeys("dataset" if is_within(key, "dataset") else key for key in refused))
        raise ConfigError(
            f"resume: the content of inputs differs from the run's: {format_changed_inputs(refused)}; restore it, or "
            f"give 'resume_changed=[{keys}]' to continue with it, or fork= for a run of its own"
        )
    if changed:
        say(f"{'fork' if is_fork else 'resume'}: the content of inputs has changed: {format_changed_inputs(changed)}")
