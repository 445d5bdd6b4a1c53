"""Rows of a run: loaded, held-out prompts apart from those to train on, counted."""

from __future__ import annotations

from collections.abc import Callable

from apa_cli.datasets.base import make_prompt_key
from apa_cli.errors import UserError
from apa_cli.runs.formatting import quote_text
from apa_cli.settings import Config
from apa_cli.training.row_encoder import get_example_text
from apa_cli.types import Example


def load_examples(config: Config, say: Callable[[str], None]) -> tuple[list[Example], list[Example]]:
    """Return the data set's train and held-out rows; held-out prompts are left out of the train rows.

    Report how many rows are left out and why. Raise UserError if either split is empty or cannot be read.
    """
    try:
        train, held_out = config.dataset.load("train"), config.dataset.load("test")
    except ValueError as error:
        raise UserError(f"dataset: {error}") from error
    for split, rows in (("train", train), ("test", held_out)):
        if dropped := getattr(rows, "drop_counts", {}):
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            say(f"dataset: {len(rows)} {split} rows; left out: {reasons}")
    prompts = {make_prompt_key(example.prompt) for example in held_out}
    shared = {make_prompt_key(example.prompt) for example in train} & prompts
    if shared:
        train = [example for example in train if make_prompt_key(example.prompt) not in prompts]
        example = quote_text(min(shared))
        say(f"dataset: {len(shared)} held-out prompts are also in train and are left out of it, such as {example}")
    if not train or not held_out:
        raise UserError(f"dataset: {len(train)} rows to train on, {len(held_out)} held out; both splits are needed")
    columns = sorted({name for example in train for name in example.columns})
    further = f"; further columns: {', '.join(columns)}" if columns else ""
    say(f"dataset: {count_rows(train)} to train on, {count_rows(held_out)} held out{further}")
    return train, held_out


def count_rows(examples: list[Example]) -> str:
    """Return the number of rows, and of their distinct prompts if some prompt has several rows."""
    distinct = len({make_prompt_key(example.prompt) for example in examples})
    return f"{len(examples)} rows" + (f" of {distinct} prompts" if distinct < len(examples) else "")


def select_training_rows(config: Config, train: list[Example]) -> list[Example]:
    """Return the rows that the plan trains on. Raise UserError if no row has a text that the algorithm needs."""
    train = config.plan.examples(train)
    for name in config.needs.texts:
        if not any(get_example_text(example, name) for example in train):
            raise UserError(f"dataset: no row has {name!r}, which the algorithm needs")
    return train
