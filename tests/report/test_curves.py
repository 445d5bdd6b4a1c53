"""curves.png shows what the metrics say; colours are looked for in its pixels."""

import numpy as np
import pytest

from apa_cli.errors import UserError
from apa_cli.report import curves
from apa_cli.report.curves import EVALUATION, TRAINING, draw_curves
from apa_cli.runs.records import read_run


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(imread(path)[..., :3] * 255).astype(int)


def count(image: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return int((np.abs(image - wanted).max(axis=-1) <= 2).sum())


def test_training_and_evaluation_are_both_drawn(write_run, history):
    run = write_run("run", history(0.8, 10.0))
    path = draw_curves(run)
    assert path == run / "curves.png"
    image = pixels(path)
    third = image.shape[1] // 3
    assert count(image[:, :third], TRAINING) > 100
    assert count(image[:, third : 2 * third], TRAINING) > 100
    assert count(image[:, 2 * third :], TRAINING) == 0  # reward against KL is of evaluations only
    assert all(count(image[:, place * third : (place + 1) * third], EVALUATION) > 50 for place in range(3))


def test_a_run_at_its_beginning_is_drawn(write_run, history):
    nothing_but_sft = pixels(draw_curves(write_run("start", history(0.8, 10.0)[:1])))
    assert count(nothing_but_sft, TRAINING) == 0
    assert count(nothing_but_sft, EVALUATION) > 0
    no_evaluation = pixels(draw_curves(write_run("training", history(0.8, 10.0)[1:2])))
    assert count(no_evaluation, TRAINING) > 0
    assert count(no_evaluation, EVALUATION) == 0


def test_the_points_are_the_evaluations(write_run, history):
    from matplotlib.figure import Figure

    run = read_run(write_run("run", history(0.8, 10.0)))
    reward, kl, frontier = Figure().subplots(1, 3)
    curves._draw_reward(reward, run)
    points, _, (bars,) = reward.containers[0].lines
    assert points.get_xydata().tolist() == [[0, 0.2], [128, 0.8]]
    ends = [end for bar in bars.get_segments() for end in bar[:, 1]]
    assert ends == pytest.approx([0.15, 0.25, 0.75, 0.85])  # ± 0.05
    assert reward.lines[0].get_xydata().tolist() == [[64, 0.5], [128, 0.8]]
    assert list(reward.lines[-1].get_ydata()) == [0.2, 0.2]  # the SFT model, all along
    curves._draw_kl(kl, run)
    assert [line.get_xydata().tolist() for line in kl.lines] == [[[64, 5], [128, 10]], [[0, 0], [128, 10]]]
    curves._draw_frontier(frontier, run)
    assert frontier.lines[0].get_xydata().tolist() == [[0, 0.2], [10, 0.8]]


def test_a_name_is_no_formula(write_run, history):
    assert draw_curves(write_run("cost $^^$", history(0.8, 10.0))).is_file()


FILES = ["config.yaml", "curves.png", "metrics.jsonl"]


def test_the_file_is_replaced_in_one_step(write_run, history):
    run = write_run("run", history(0.8, 10.0))
    (run / "curves.png").write_bytes(b"old")
    with open(run / "curves.png", "rb") as viewer:
        draw_curves(run)
        assert viewer.read() == b"old"  # whoever was reading goes on reading the old file
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == FILES


def test_a_failure_leaves_the_old_file_and_nothing_else(write_run, history, monkeypatch):
    run = write_run("run", history(0.8, 10.0))
    (run / "curves.png").write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("apa_cli.report.curves.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_curves(run)
    monkeypatch.undo()
    assert (run / "curves.png").read_bytes() == b"old"
    assert sorted(path.name for path in run.iterdir()) == FILES


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        draw_curves(tmp_path)
