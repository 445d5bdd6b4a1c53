"""MFU of the updates by hand, and the seconds of nested phases."""

import pytest
import torch

from apa_cli.hardware.roofline import ModelCost
from apa_cli.training.mfu import Stopwatch, UpdateMeter, count_tokens
from tests.builders import make_batch, make_sequences


def test_utilization_by_hand(make_config):
    cost = ModelCost(10, 20, 4, 8, 100, 200, 55, 6)
    meter = UpdateMeter(
        cost, 11, make_config("rollout_batch_size=2", "minibatch_size=2", "microbatch_size=1").run, 4, False, 1000.0
    )
    batch = make_batch(make_sequences([[1] * 2, [1] * 3], [[1] * 3, [1]]))
    # As in tests/hardware/test_roofline.py 534 FLOPs forward; twice that backward, two epochs: 3204 in 4 s at 1000/s.
    assert meter.compute_utilization(batch, 4.0) == pytest.approx(0.801, rel=1e-12)


def test_a_stopwatch_counts_nested_phases_in_both(monkeypatch):
    # Start of the outer phase, start and end of the inner one, end of the outer.
    times = iter([1.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr("apa_cli.training.mfu.time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch("prepare"), stopwatch("reference"):
        pass
    assert stopwatch.seconds == {"prepare": 8.0, "reference": 3.0}


def test_a_phase_that_is_repeated_adds_up(monkeypatch):
    times = iter([1.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr("apa_cli.training.mfu.time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):  # as for a response and a related sequence
        with stopwatch("reference"):
            pass
    assert stopwatch.seconds == {"reference": 1.0 + 4.0}


def test_tokens_of_related_sequences_count():
    """Two rows with 2 + 3 and 3 + 1 tokens, and related responses of 1 and 2 tokens to the same prompts."""
    tokens = make_sequences([[1] * 2, [1] * 3], [[1] * 3, [1]])
    related = make_sequences([[1] * 2, [1] * 3], [[1], [1] * 2])
    assert count_tokens(make_batch(tokens, related={"other": related})) == ([2, 3, 2, 3], [3, 1, 1, 2])
