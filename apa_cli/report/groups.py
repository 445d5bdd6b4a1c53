"""Groups of runs that differ only in their seed, and the settings in which the groups differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from apa_cli.report.formatting import format_lambda, format_value, shorten_keys
from apa_cli.runs.records import RecordedRun
from apa_cli.runs.resume import is_within

IGNORED_KEYS = (
    "name", "seed", "resume", "dry_run", "hydra", "launch", "tracking", "checkpoint", "evaluation.every",
    "microbatch_size", "stages.cache_dir", "evaluation.print_samples", "evaluation.reference", "evaluation.best_of",
    "evaluation.best_of_prompts", "reference.log_kl", "run", "export", "chat",
)  # fmt: skip
"""Keys of a configuration that do not change a run's numbers, or in which the runs of one group may differ."""


TRUNCATION_MARK = "†"
"""Mark of the runs whose KL and entropy are those of a truncated sampler."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, ordered by seed.

    `varying` holds the settings in which the groups of one comparison differ, apart from algorithm and λ.
    """

    runs: list[RecordedRun]
    varying: dict[str, object] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        """The label of the algorithm, as its runs record it."""
        return self.runs[0].label

    @property
    def lambda_(self) -> float | None:
        return self.runs[0].lambda_

    @property
    def lambda_meaning(self) -> str | None:
        """The algorithm's meaning of λ; None if no run records one."""
        return next((run.lambda_meaning for run in self.runs if run.lambda_meaning), None)

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]

    @property
    def truncation(self) -> str:
        """Truncation of the sampling distribution, such as "top-k 50"; "" without one."""
        return describe_truncation(self.runs[0].config_yaml)

    @property
    def label(self) -> str:
        """Short description for a legend: "APA  λ = 0.1 (temperature and pull)  lr = 0.001  † top-k 50"."""
        parts = [self.algorithm]
        if self.lambda_ is not None:
            parts.append(f"λ = {format_lambda(self.lambda_, self.lambda_meaning)}")
        short = shorten_keys(list(self.varying))
        parts += [f"{short[key]} = {format_value(value)}" for key, value in self.varying.items()]
        return "  ".join([*parts, f"{TRUNCATION_MARK} {self.truncation}"] if self.truncation else parts)


def describe_truncation(config: Mapping[str, Any]) -> str:
    """Return the truncation of a run's sampling distribution, "top-k 50, top-p 0.9"; "" without one."""
    sampling = config.get("sampling") or {}
    top_k, top_p = sampling.get("top_k") or 0, sampling.get("top_p", 1.0)
    parts = [f"top-k {top_k}"] * bool(top_k) + [f"top-p {format_value(top_p)}"] * (top_p < 1)
    return ", ".join(parts)


def group_runs(runs: Sequence[RecordedRun]) -> list[Group]:
    """Return the runs joined over their seeds, ordered by algorithm, λ and the other settings that vary."""
    joined: dict[str, list[RecordedRun]] = {}
    for run in runs:
        shape = {key: _canonical_text(value) for key, value in select_settings(run).items()}
        joined.setdefault(repr(sorted(shape.items())), []).append(run)
    members = [sorted(group, key=_seed_sort_key) for group in joined.values()]
    settings = [select_settings(group[0]) for group in members]
    keys = _find_varying_keys([group[0] for group in members], settings)
    groups = [Group(group, {key: own.get(key) for key in keys}) for group, own in zip(members, settings, strict=True)]
    return sorted(groups, key=_group_sort_key)


def select_settings(run: RecordedRun) -> dict[str, object]:
    """Return the settings that determine a run's numbers except the seed, with dotted keys; see `IGNORED_KEYS`."""
    settings = flatten_settings(run.config_yaml)
    return {key: value for key, value in settings.items() if not any(is_within(key, part) for part in IGNORED_KEYS)}


def flatten_settings(section: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Return nested sections as one dict with dotted keys; a list becomes a tuple."""
    flat: dict[str, object] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _make_hashable(value)
    return flat


def _make_hashable(value: object) -> object:
    if isinstance(value, list):
        return tuple(_make_hashable(item) for item in value)
    return () if value == {} else value


def _canonical_text(value: object) -> str:
    """Return a text that is the same for equal settings only, such as 1 and 1.0."""
    return repr(float(value)) if _is_number(value) else repr(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seed_sort_key(run: RecordedRun) -> tuple:
    return (run.seed is None, run.seed or 0, str(run.directory))


def _group_sort_key(group: Group) -> tuple:
    """Return a key that sorts numbers by value, then texts, then missing settings."""
    varying = [
        (value is None, not _is_number(value), value if _is_number(value) else 0, str(value))
        for value in group.varying.values()
    ]
    return (group.algorithm, group.lambda_ is None, group.lambda_ or 0, varying)


def _find_varying_keys(runs: Sequence[RecordedRun], settings: Sequence[dict[str, object]]) -> list[str]:
    """Return the keys in which runs, one per group, differ apart from algorithm and λ.

    A key of the section `algo` counts only if runs of the same algorithm differ in it, and not if it repeats λ. Of
    several keys of one section that always change together, such as a model's dimensions, only the first counts.
    """
    algorithms = [run.label for run in runs]
    varying: dict[tuple, str] = {}
    for key in dict.fromkeys(key for own in settings for key in own):
        values = [own.get(key) for own in settings]
        of_algorithm = key.startswith("algo.")
        if key == "lambda" or (of_algorithm and _repeats_lambda(key, values, runs)):
            continue
        families = algorithms if of_algorithm else [""] * len(runs)
        distinct = {(family, _canonical_text(value)) for family, value in zip(families, values, strict=True)}
        if len(distinct) > len(set(families)):
            varying.setdefault((key.partition(".")[0], _equality_pattern(values)), key)
    return list(varying.values())


def _repeats_lambda(key: str, values: Sequence[object], runs: Sequence[RecordedRun]) -> bool:
    """Return True if an algorithm's setting equals λ in each run whose algorithm has it."""
    name = key.removeprefix("algo.")
    return list(values) == [run.lambda_ if name in (run.config_yaml.get("algo") or {}) else None for run in runs]


def _equality_pattern(values: Sequence[object]) -> tuple[int, ...]:
    """Return for each value the index of the first one equal to it: (b, a, b) → (0, 1, 0)."""
    texts = [_canonical_text(value) for value in values]
    return tuple(texts.index(text) for text in texts)
