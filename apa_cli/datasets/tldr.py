"""dataset=tldr: Reddit posts with their authors' one-line summaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from apa_cli.datasets.base import Dataset
from apa_cli.datasets.dialogue import spaced
from apa_cli.datasets.source import Row, Source, text, usable
from apa_cli.types import AtLeastOne, Example, Examples

FORMS = {
    "completion": ("prompt", "completion"),
    "label": ("prompt", "label"),
    "summary": ("subreddit", "title", "post", "summary"),
}


@dataclass(frozen=True)
class TLDR(Dataset):
    """A post to be summed up, ending in "TL;DR:", and its summary; nothing rejected. Rows keep their order.

    Prompts that are stored (trl-lib/tldr, CarperAI/openai_summarize_tldr) are taken as they are, and get a last
    paragraph "TL;DR:" where they have none. From posts with title and subreddit they are made in the form of
    trl-lib/tldr.
    """

    path: str
    train_rows: Annotated[int | None, AtLeastOne]
    test_rows: Annotated[int | None, AtLeastOne]
    stop_strings: list[str]

    def load(self, split: str) -> Examples:
        form, rows = Source(self.path).rows(split, FORMS)
        most = self.test_rows if split == "test" else self.train_rows
        return usable((example(row, form) for row in rows), most)


def example(row: Row, form: str) -> Example | str:
    """A row as an example, or why it is none."""
    post, summary = text(row, "post" if form == "summary" else "prompt"), text(row, form)
    if not post.strip():
        return "empty posts"
    if not summary.strip():
        return "posts with an empty summary"
    if form == "summary":
        subreddit = text(row, "subreddit")
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {text(row, 'title')}\n\nPOST: {post}\n\nTL;DR:"
        return Example(prompt, spaced(summary), None, {"subreddit": subreddit})
    prompt = post if post.endswith("TL;DR:") else f"{post}\n\nTL;DR:"
    return Example(prompt, spaced(summary), None, {})
