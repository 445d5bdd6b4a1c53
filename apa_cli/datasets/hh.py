"""dataset=hh: Anthropic's dialogues with a preferred and a rejected last reply, or others in their form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

from apa_cli.datasets.base import Dataset, PromptForm
from apa_cli.datasets.dialogue import HUMAN, parse_dialogue, spaced, split_reply
from apa_cli.datasets.source import Source, text, usable
from apa_cli.errors import UserError
from apa_cli.types import AtLeastOne, Example, Examples

SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
FORMS = {"prompt": ("prompt", "chosen", "rejected"), "dialogue": ("chosen", "rejected")}


@dataclass(frozen=True)
class HH(Dataset):
    """Pairs of dialogues that differ in the last reply: whole ones in folders, one to a subset, as in
    Anthropic/hh-rlhf, or with the prompt in a column of its own, as in Dahoas/rm-static.

    Rows keep their order; those of several subsets take turns, so that the first ones are of all subsets.
    """

    path: str
    subsets: list[str] | None
    format: PromptForm
    train_rows: Annotated[int | None, AtLeastOne]
    test_rows: Annotated[int | None, AtLeastOne]
    stop_strings: list[str]

    @property
    def prompt_form(self) -> PromptForm:
        return self.format

    def load(self, split: str) -> Examples:
        parts = [self._candidates(split, subset) for subset in self._subsets()]
        return usable(in_turns(parts), self.test_rows if split == "test" else self.train_rows)

    def _subsets(self) -> list[str] | list[None]:
        if self.subsets is None:
            return [None]
        local = Path(self.path).expanduser()
        known = [subset for subset in SUBSETS if not local.is_dir() or (local / subset).is_dir()]
        if not self.subsets and not known:
            raise UserError(f"dataset.path: none of the folders {', '.join(SUBSETS)} is in {self.path}")
        return list(dict.fromkeys(self.subsets)) or known

    def _candidates(self, split: str, subset: str | None) -> Iterator[Example | str]:
        form, rows = Source(self.path, subset).rows(split, FORMS)
        columns = {} if subset is None else {"subset": subset}
        for row in rows:
            prompt = text(row, "prompt") if form == "prompt" else ""
            yield pair(prompt + text(row, "chosen"), prompt + text(row, "rejected"), columns)


def pair(chosen: str, rejected: str, columns: dict[str, str]) -> Example | str:
    """Two whole dialogues as an example, or why they are none."""
    (prompt, better), (other_prompt, worse) = split_reply(chosen), split_reply(rejected)
    if chosen == rejected:
        return "identical pairs"
    if HUMAN in better or HUMAN in worse:
        return "pairs that end on the human's turn"
    if HUMAN not in prompt or HUMAN not in other_prompt:
        return "pairs that are no dialogues"
    if not better.strip() or not worse.strip():
        return "pairs with an empty reply"
    if prompt != other_prompt:
        return "pairs with different prompts"
    return Example(prompt, spaced(better), spaced(worse), dict(columns), parse_dialogue(prompt))


def in_turns(parts: list[Iterator[Example | str]]) -> Iterable[Example | str]:
    """The first of each part, then the second of each, …; parts that have ended are passed over."""
    return (item for items in zip_longest(*parts) for item in items if item is not None)
