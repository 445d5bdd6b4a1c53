"""dataset=tldr: Reddit posts with their authors' one-line summaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from apa_cli.datasets.base import Dataset
from apa_cli.datasets.dialogue import add_leading_space
from apa_cli.datasets.row_file import Row
from apa_cli.datasets.source import Candidate, Source, get_text, take_examples
from apa_cli.types import AtLeastOne, Example, Examples

_LAYOUTS = {
    "completion": ("prompt", "completion"),
    "label": ("prompt", "label"),
    "summary": ("subreddit", "title", "post", "summary"),
}
"""layout → its columns; the layout's name is the column that holds the summary."""


@dataclass(frozen=True)
class TLDR(Dataset):
    """Posts that end in "TL;DR:", and their summaries; no rejected replies. Rows keep their order.

    Stored prompts (trl-lib/tldr, CarperAI/openai_summarize_tldr) are unchanged, apart from a last paragraph "TL;DR:"
    if they have none. Posts with title and subreddit get the format of trl-lib/tldr.
    """

    path: str
    train_rows: Annotated[int | None, AtLeastOne]
    test_rows: Annotated[int | None, AtLeastOne]
    stop_strings: list[str]

    def load(self, split: str) -> Examples:
        layout, rows = Source(self.path).rows(split, _LAYOUTS)
        limit = self.test_rows if split == "test" else self.train_rows
        return take_examples((parse_post(row, layout) for row in rows), limit)


def parse_post(row: Row, layout: str) -> Candidate:
    """Return a row as an example, or the reason why it is unusable."""
    post, summary = get_text(row, "post" if layout == "summary" else "prompt"), get_text(row, layout)
    if not post.strip():
        return "empty posts"
    if not summary.strip():
        return "posts with an empty summary"
    if layout == "summary":
        subreddit = get_text(row, "subreddit")
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {get_text(row, 'title')}\n\nPOST: {post}\n\nTL;DR:"
        return Example(prompt, add_leading_space(summary), None, {"subreddit": subreddit})
    prompt = post if post.endswith("TL;DR:") else f"{post}\n\nTL;DR:"
    return Example(prompt, add_leading_space(summary), None, {})
