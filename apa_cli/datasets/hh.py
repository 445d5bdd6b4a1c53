"""dataset=hh: Anthropic's dialogues with a preferred and a rejected last reply, or others in their format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

from apa_cli.datasets.base import Dataset, PromptStyle
from apa_cli.datasets.dialogue import HUMAN, add_leading_space, parse_dialogue, split_reply
from apa_cli.datasets.source import Candidate, Source, get_text, take_examples
from apa_cli.errors import UserError
from apa_cli.types import AtLeastOne, Example, Examples

SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
_LAYOUTS = {"prompt": ("prompt", "chosen", "rejected"), "dialogue": ("chosen", "rejected")}


@dataclass(frozen=True)
class HH(Dataset):
    """Pairs of dialogues that differ in the last reply.

    The rows are whole dialogues in one folder per subset, as in Anthropic/hh-rlhf, or have the prompt in a column of
    its own, as in Dahoas/rm-static. Rows keep their order; rows of several subsets alternate.
    """

    path: str
    subsets: list[str] | None
    format: PromptStyle
    train_rows: Annotated[int | None, AtLeastOne]
    test_rows: Annotated[int | None, AtLeastOne]
    stop_strings: list[str]

    @property
    def prompt_style(self) -> PromptStyle:
        return self.format

    def load(self, split: str) -> Examples:
        subsets = [self._iterate_candidates(split, subset) for subset in self._list_subsets()]
        return take_examples(interleave(subsets), self.test_rows if split == "test" else self.train_rows)

    def _list_subsets(self) -> list[str] | list[None]:
        """Return the folders to read; [None] for a data set without folders."""
        if self.subsets is None:
            return [None]
        local = Path(self.path).expanduser()
        available = [subset for subset in SUBSETS if not local.is_dir() or (local / subset).is_dir()]
        if not self.subsets and not available:
            raise UserError(
                f"dataset.path: none of the folders {', '.join(SUBSETS)} is in {self.path}; give dataset.subsets=null "
                "for a data set without them"
            )
        return list(dict.fromkeys(self.subsets)) or available

    def _iterate_candidates(self, split: str, subset: str | None) -> Iterator[Candidate]:
        layout, rows = Source(self.path, subset).rows(split, _LAYOUTS)
        columns = {} if subset is None else {"subset": subset}
        for row in rows:
            prompt = get_text(row, "prompt") if layout == "prompt" else ""
            yield parse_pair(prompt + get_text(row, "chosen"), prompt + get_text(row, "rejected"), columns)


def parse_pair(chosen: str, rejected: str, columns: dict[str, str]) -> Candidate:
    """Return two whole dialogues as an example, or the reason why they are unusable."""
    (prompt, better), (other_prompt, worse) = split_reply(chosen), split_reply(rejected)
    if chosen == rejected:
        return "identical pairs"
    if HUMAN in better or HUMAN in worse:
        return "pairs that end on the human's turn"
    if HUMAN not in prompt or HUMAN not in other_prompt:
        return "pairs that are not dialogues"
    if not better.strip() or not worse.strip():
        return "pairs with an empty reply"
    if prompt != other_prompt:
        return "pairs with different prompts"
    return Example(prompt, add_leading_space(better), add_leading_space(worse), dict(columns), parse_dialogue(prompt))


def interleave(sources: list[Iterator[Candidate]]) -> Iterable[Candidate]:
    """Return the first item of each source, then the second of each, …; sources that have ended are skipped."""
    return (item for items in zip_longest(*sources) for item in items if item is not None)
