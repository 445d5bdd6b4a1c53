"""Counter-based random numbers: every draw is keyed by what it is for, so nothing depends on what was drawn before.

numpy's Philox generator takes a 128-bit key and a 256-bit counter; the key holds (seed, stream), the upper
words of the counter the place. The lowest word counts the numbers drawn. Nothing in the package uses a
global generator.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for. The values are part of the format: never renumber them."""

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


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """The generator of one place: up to three whole numbers ≥ 0, such as (iteration, prompt, sample)."""
    if len(place) > 3:
        raise ValueError(f"a place has at most three coordinates, got {len(place)}")
    words = [0, *place, *[0] * (3 - len(place))]
    return np.random.Generator(np.random.Philox(counter=words, key=[seed, int(stream)]))


def uniforms(seed: int, stream: Stream, iteration: int, places: list[tuple[int, int]], length: int) -> np.ndarray:
    """One number in (0, 1] per response and position, [N, T] float64, for responses at (prompt place, sample number).

    One generator per response, positions in order: a response's numbers do not depend on the others.
    """
    rows = [1.0 - generator(seed, stream, iteration, place, sample).random(length) for place, sample in places]
    return np.stack(rows) if rows else np.zeros((0, length))


def permutation(n: int, seed: int, stream: Stream, *place: int) -> np.ndarray:
    """An order of n things, [n] int64."""
    return generator(seed, stream, *place).permutation(n)


def torch_seed(seed: int, stream: Stream, *place: int) -> int:
    """A seed for code that can only be seeded globally, as the initialisation of weights is."""
    return int(generator(seed, stream, *place).integers(2**63 - 1))
