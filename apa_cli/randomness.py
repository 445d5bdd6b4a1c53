"""Counter-based random numbers, keyed by purpose and place, so that no sample depends on the samples before it.

numpy's Philox generator takes a 128-bit key and a 256-bit counter. The key holds (seed, stream), the three upper
words of the counter hold the place, and the lowest word counts the numbers sampled. Nothing in the package uses a
global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """The purpose of random numbers. The values are part of the run format: never renumber them."""

    rollout = 1
    roll_in = 2
    evaluation = 3
    best_of_n = 4
    data_order = 5
    minibatch_order = 6
    initialization = 7
    plan = 8
    roll_in_cut = 9
    held_out = 10
    once_per_prompt = 11
    process_rollout = 12


def make_generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """Return the generator of one place: up to three integers ≥ 0, such as (iteration, prompt, sample).

    Raise ValueError for more than three.
    """
    if len(place) > 3:
        raise ValueError(f"place: at most three coordinates are allowed, got {len(place)}")
    counter = [0, *place, *[0] * (3 - len(place))]
    return np.random.Generator(np.random.Philox(counter=counter, key=[seed, int(stream)]))


def sample_uniforms(
    seed: int, stream: Stream, iteration: int, places: Sequence[tuple[int, int]], length: int
) -> NDArray[np.float64]:
    """Return one number in (0, 1] per response and position, [N, T] float64.

    `places` holds (place of the prompt in the rollout batch, sample number) of each of the N responses; `length` is T.
    Each response has its own generator, so its numbers do not depend on the other responses.
    """
    rows = [1.0 - make_generator(seed, stream, iteration, place, sample).random(length) for place, sample in places]
    return np.stack(rows) if rows else np.zeros((0, length))


def sample_permutation(n: int, seed: int, stream: Stream, *place: int) -> NDArray[np.int64]:
    """Return a random permutation of 0 … n − 1, [n] int64."""
    return make_generator(seed, stream, *place).permutation(n)


def derive_torch_seed(seed: int, stream: Stream, *place: int) -> int:
    """Return a seed in [0, 2⁶³ − 1) for code that uses torch's global generator, such as weight initialization."""
    return int(make_generator(seed, stream, *place).integers(2**63 - 1))
