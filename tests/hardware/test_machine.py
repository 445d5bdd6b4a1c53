"""Measurement of the machine: rates of matrix products and copies, peak memory."""

import torch

from apa_cli.hardware import machine
from apa_cli.hardware.machine import (
    measure_copy_rate,
    measure_matrix_rate,
    read_free_memory,
    read_peak_memory,
    reset_peak_memory,
    time_fastest,
)

CPU = torch.device("cpu")


def test_the_fastest_run_counts(monkeypatch):
    # The first run, of 1 s, is a warm-up; runs of 3, 2 and 4 s follow until the time is over.
    monkeypatch.setattr("apa_cli.hardware.machine.MEASUREMENT_SECONDS", 8.5)
    times = iter([0.0, 1.0, 1.0, 4.0, 5.0, 7.0, 8.0, 12.0])
    monkeypatch.setattr("apa_cli.hardware.machine.time.perf_counter", lambda: next(times))
    assert time_fastest(lambda: None, CPU) == 2.0


def test_rates_by_hand(monkeypatch):
    monkeypatch.setattr("apa_cli.hardware.machine.time_fastest", lambda work, device: (work(), 0.5)[1])
    monkeypatch.setitem(machine.MATRIX_SIZE, "cpu", 8)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 64)
    assert measure_matrix_rate(CPU, torch.float32) == 2 * 8**3 / 0.5
    assert measure_copy_rate(CPU) == 2 * 64 / 0.5


def test_a_reset_starts_a_new_peak_of_memory():
    large = torch.ones(2**27, dtype=torch.uint8)
    del large
    reset_peak_memory(CPU)
    before = read_peak_memory(CPU)
    large = torch.ones(2**26, dtype=torch.uint8)
    assert 2**25 < read_peak_memory(CPU) - before < 2**27
    del large
    assert read_free_memory(CPU) > 2**20
