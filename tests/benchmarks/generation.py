"""Sampling: our loop with a key-value cache against `transformers`' generate, both driven by the same uniforms.

    python tests/benchmarks/generation.py FOLDER_OR_HUB_ID [responses] [tokens]

Prints seconds (median of three, the two in turn) and the ratio. `generate` draws through a logits processor
that keeps only the token of the inverse CDF, so both give the same tokens.
"""

import statistics
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from apa_cli.models.loading import ensure_pad_token, find_end_token_ids
from apa_cli.randomness import Stream, sample_uniforms
from apa_cli.rollout.engine import pad_left, sample_responses
from apa_cli.rollout.token_sampling import invert_cdf
from apa_cli.settings import SamplingSettings

PROMPTS = [
    "Lily went to the park",
    "One day, Tom was at the",
    "It was raining when the little dog came to the big lake",
]


class InverseCDF(LogitsProcessor):
    def __init__(self, draws: torch.Tensor, prompt_length: int):
        self.draws, self.prompt_length = draws, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = invert_cdf(scores.float().softmax(-1), self.draws[:, input_ids.shape[1] - self.prompt_length])
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)


def main(path: str, responses: int = 64, tokens: int = 32) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = ensure_pad_token(AutoTokenizer.from_pretrained(path))
    prompts = [tokenizer(PROMPTS[i % len(PROMPTS)])["input_ids"] for i in range(responses)]
    draws = sample_uniforms(0, Stream.rollout, 0, [(i, 0) for i in range(responses)], tokens)
    settings = SamplingSettings(64, tokens, 1.0, 0, 1.0, [], responses, True)
    ends = find_end_token_ids(model, tokenizer)
    ids, mask = pad_left(prompts, tokenizer.pad_token_id)

    def ours() -> list[list[int]]:
        return sample_responses(model, tokenizer, prompts, draws, settings, ends).tokens

    @torch.no_grad()
    def theirs(cache: str | None) -> list[list[int]]:
        processor = LogitsProcessorList([InverseCDF(torch.from_numpy(draws), ids.shape[1])])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, logits_processor=processor,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends), cache_implementation=cache,
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    ways = {"our loop": ours, "generate": lambda: theirs(None), "generate, static cache": lambda: theirs("static")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, list[list[int]]] = {}
    for turn in range(4):
        for name, way in ways.items():
            begun = time.perf_counter()
            rows[name] = way()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    base = statistics.median(seconds["our loop"])
    for name, values in seconds.items():
        same = np.mean([b[: len(a)] == a for a, b in zip(rows["our loop"], rows[name], strict=True)])
        median = statistics.median(values)
        print(f"{name:24s} {median:7.2f} s  {median / base:5.2f} × our loop  same responses {same:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
