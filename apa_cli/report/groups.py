"""Run directories read back: config.yaml and metrics.jsonl; and runs grouped over their seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from apa_cli.runs.records import Run

LAMBDA_MEANING = {"apa": "temperature and pull", "awr": "step size", "ppo": "price of KL"}
"""What λ is, per algorithm. The same number means different things: never line algorithms up by it."""

NOT_RESULTS = (
    "name", "seed", "resume", "dry_run", "hydra", "launch", "tracking", "checkpoint", "evaluation.every",
    "microbatch_size", "stages.cache_dir", "evaluation.print_samples", "evaluation.reference", "evaluation.best_of",
    "evaluation.best_of_prompts", "run", "export", "chat",
)  # fmt: skip
"""Keys of a configuration that do not change a run's numbers, or that runs of one group may differ in."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, ordered by it.

    `varying` holds the settings in which the groups of one comparison differ, apart from algorithm and λ.
    """

    runs: list[Run]
    varying: dict[str, object] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        return self.runs[0].algorithm

    @property
    def lambda_(self) -> float | None:
        return self.runs[0].lambda_

    @property
    def seeds(self) -> list:
        return [run.seed for run in self.runs]

    @property
    def label(self) -> str:
        """The group in a few words, for a legend: "APA  λ = 0.1 (temperature and pull)  lr = 0.001"."""
        parts = [self.algorithm]
        if self.lambda_ is not None:
            parts.append(f"λ = {lambda_text(self.algorithm, self.lambda_)}")
        short = short_names(list(self.varying))
        parts += [f"{short[key]} = {value_text(value)}" for key, value in self.varying.items()]
        return "  ".join(parts)


def lambda_text(algorithm: str, value: float) -> str:
    """λ with its meaning, "0.1 (temperature and pull)"; the number alone for an algorithm unknown here."""
    meaning = LAMBDA_MEANING.get(algorithm.lower())
    return f"{value_text(value)} ({meaning})" if meaning else value_text(value)


def value_text(value: object) -> str:
    """A setting as a user would write it; "–" for one that a configuration does not have."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted keys that still tell them apart ("optimizer.lr" → "lr")."""

    def end(key: str, length: int) -> str:
        return ".".join(key.split(".")[-length:])

    short = {}
    for key in keys:
        others = [other for other in keys if other != key]
        lengths = range(1, key.count(".") + 2)
        short[key] = next((end(key, n) for n in lengths if end(key, n) not in {end(o, n) for o in others}), key)
    return short


def settings(run: Run) -> dict[str, object]:
    """What shaped a run's numbers: its configuration with dotted keys, without seed, name and the like."""
    flat = flatten(run.config)
    return {key: value for key, value in flat.items() if not _within(key, NOT_RESULTS)}


def flatten(section: dict, prefix: str = "") -> dict[str, object]:
    """Nested sections as one dict with dotted keys; lists stay values (as tuples)."""
    flat = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _frozen(value)
    return flat


def _frozen(value: object) -> object:
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return () if value == {} else value


def _identity(value: object) -> str:
    """A text that two settings share exactly when they are equal; 1 and 1.0 are."""
    return repr(float(value)) if _is_number(value) else repr(value)


def _within(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs joined over their seeds, ordered by algorithm, λ and what else varies."""
    joined: dict[str, list[Run]] = {}
    for run in runs:
        shape = {key: _identity(value) for key, value in settings(run).items()}
        joined.setdefault(repr(sorted(shape.items())), []).append(run)
    members = [sorted(group, key=_by_seed) for group in joined.values()]
    shaped_by = [settings(group[0]) for group in members]
    keys = _varying_keys([group[0] for group in members], shaped_by)
    groups = [
        Group(group, {key: shape.get(key) for key in keys}) for group, shape in zip(members, shaped_by, strict=True)
    ]
    return sorted(groups, key=_by_algorithm)


def _by_seed(run: Run) -> tuple:
    return (run.seed is None, run.seed or 0, str(run.directory))


def _by_algorithm(group: Group) -> tuple:
    """A key to sort by: numbers in their order, before words, before settings that are missing."""
    varying = [
        (value is None, not _is_number(value), value if _is_number(value) else 0, str(value))
        for value in group.varying.values()
    ]
    return (group.algorithm, group.lambda_ is None, group.lambda_ or 0, varying)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _varying_keys(runs: Sequence[Run], shaped_by: Sequence[dict[str, object]]) -> list[str]:
    """The settings in which runs differ beyond their algorithm and λ.

    A key of the section `algo` counts only where runs of the same algorithm differ in it, and not where it
    repeats λ. Of keys of one section that always change together (a model's dimensions) the first counts.
    """
    algorithms = [run.algorithm for run in runs]
    kept: dict[tuple, str] = {}
    for key in dict.fromkeys(key for shape in shaped_by for key in shape):
        values = [shape.get(key) for shape in shaped_by]
        own = key.startswith("algo.")
        if key == "lambda" or (own and values == [_lambda_where(key, run) for run in runs]):
            continue
        within = algorithms if own else [""] * len(runs)
        distinct = {(name, _identity(value)) for name, value in zip(within, values, strict=True)}
        if len(distinct) > len(set(within)):
            kept.setdefault((key.partition(".")[0], _partition(values)), key)
    return list(kept.values())


def _lambda_where(key: str, run: Run) -> object:
    """λ if the run's algorithm has the setting `key`, else None: what a key that repeats λ looks like."""
    return run.lambda_ if key.removeprefix("algo.") in (run.config.get("algo") or {}) else None


def _partition(values: Sequence[object]) -> tuple[int, ...]:
    """Which of `values` are equal, without what they are: (b, a, b) → (0, 1, 0)."""
    texts = [_identity(value) for value in values]
    return tuple(texts.index(text) for text in texts)
