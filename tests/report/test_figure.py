"""Styles of a comparison's groups, and the figure itself by the colours of its pixels."""

import numpy as np
import pytest

from apa_cli.report.figure import (
    FALLBACK_COLORS,
    align_series,
    choose_colors,
    choose_styles,
    plot_comparison,
    shade_color,
)
from apa_cli.report.groups import group_runs
from apa_cli.runs.records import RecordedRun

BLUE, ORANGE, GREEN = "#1d5fa8", "#c2410c", "#15803d"
"""Colours that the runs of `write_run` record for APA, PPO and AWR."""


@pytest.fixture
def read_run(write_run, history):
    """read_run(name, **arguments of write_run) → RecordedRun."""
    return lambda name, **arguments: RecordedRun.read(write_run(name, history(0.8, 10.0), **arguments))


def test_colors_are_those_that_the_runs_record(read_run):
    runs = [read_run("a"), read_run("b", algorithm="ppo"), read_run("c", algorithm="awr")]
    assert choose_colors(runs) == {"APA": BLUE, "PPO": ORANGE, "AWR": GREEN}


def test_runs_without_a_color_get_the_next_of_the_list(read_run):
    runs = [
        read_run("a", environment=None),  # recorded before environment.json named a colour
        read_run("b", algorithm="ppo", environment={"algorithm": {"label": "PPO", "color": "no colour"}}),
        read_run("c", algorithm="awr"),
    ]
    assert choose_colors(runs) == {"APA": FALLBACK_COLORS[0], "PPO": FALLBACK_COLORS[1], "AWR": GREEN}


def test_no_two_algorithms_have_the_same_color(read_run):
    runs = [
        read_run("a"),
        read_run("b", environment={"algorithm": {"label": "My APA", "color": BLUE}}),
        read_run("c", environment={"algorithm": {"label": "Other APA", "color": FALLBACK_COLORS[0]}}),
    ]
    assert choose_colors(runs) == {"APA": BLUE, "My APA": FALLBACK_COLORS[1], "Other APA": FALLBACK_COLORS[0]}


def test_one_run_that_records_a_color_gives_it_to_its_algorithm(read_run):
    assert choose_colors([read_run("old", environment=None), read_run("new")]) == {"APA": BLUE}


def test_shades_are_mixed_with_white_or_black():
    assert shade_color("#204060", 0.0) == "#204060"
    # 0x20 = 32: 32 + 0.5 · (255 − 32) = 143.5; 64 → 159.5; 96 → 175.5; matplotlib rounds half to even.
    assert shade_color("#204060", 0.5) == "#90a0b0"
    assert shade_color("#204060", -0.5) == "#102030"


def test_groups_of_an_algorithm_differ_in_shade_and_marker_and_algorithms_in_line_style(read_run):
    runs = [
        *[read_run(f"apa {lambda_}", lambda_=lambda_) for lambda_ in (0.1, 0.2, 0.3)],
        read_run("ppo", algorithm="ppo", lambda_=0.05),
    ]
    styles = choose_styles(group_runs(runs))
    assert [style.linestyle for style in styles] == ["-", "-", "-", "--"]
    assert [style.marker for style in styles] == ["o", "s", "D", "o"]
    brightness = [sum(int(style.color[i : i + 2], 16) for i in (1, 3, 5)) for style in styles[:3]]
    assert brightness[0] > brightness[1] > brightness[2]
    assert styles[3].color == ORANGE  # the only group of its algorithm has the colour itself


def test_a_series_ends_with_the_shortest_run(write_run, history):
    full = RecordedRun.read(write_run("full", history(0.8, 10.0)))
    short = RecordedRun.read(write_run("short", history(0.9, 14.0)[:2]))
    assert align_series([full, short], "reward/mean") == {64: [0.5, pytest.approx(0.55)]}  # (0.2 + 0.9) / 2


def test_every_group_is_plotted(read_run, tmp_path):
    from matplotlib.image import imread

    runs = [read_run(f"{name}{seed}", algorithm=name, seed=seed) for name in ("apa", "ppo") for seed in (0, 1)]
    plot_comparison(group_runs(runs), tmp_path / "figure.png")
    pixels = np.round(imread(tmp_path / "figure.png")[..., :3] * 255).astype(int)
    frontier = pixels[:, : pixels.shape[1] // 2]
    for color in (BLUE, ORANGE):
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(frontier - rgb).max(axis=-1) <= 2).sum() > 100
