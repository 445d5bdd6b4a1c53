"""curves.png shows the recorded metrics; its colours are counted in the pixels."""

import numpy as np
import pytest

from apa_cli.errors import UserError
from apa_cli.report.curves import EVALUATION, TRAINING, plot_curves, plot_frontier, plot_kl, plot_reward
from apa_cli.runs.records import RecordedRun


def read_pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(imread(path)[..., :3] * 255).astype(int)


def count_pixels(image: np.ndarray, color: str) -> int:
    rgb = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    return int((np.abs(image - rgb).max(axis=-1) <= 2).sum())


def test_training_and_evaluation_are_both_plotted(write_run, history):
    run = write_run("run", history(0.8, 10.0))
    path = plot_curves(run)
    assert path == run / "curves.png"
    image = read_pixels(path)
    third = image.shape[1] // 3
    assert count_pixels(image[:, :third], TRAINING) > 100
    assert count_pixels(image[:, third : 2 * third], TRAINING) > 100
    assert count_pixels(image[:, 2 * third :], TRAINING) == 0  # reward against KL is of evaluations only
    assert all(count_pixels(image[:, i * third : (i + 1) * third], EVALUATION) > 50 for i in range(3))


def test_a_run_at_its_start_is_plotted(write_run, history):
    sft_only = read_pixels(plot_curves(write_run("start", history(0.8, 10.0)[:1])))
    assert count_pixels(sft_only, TRAINING) == 0
    assert count_pixels(sft_only, EVALUATION) > 0
    training_only = read_pixels(plot_curves(write_run("training", history(0.8, 10.0)[1:2])))
    assert count_pixels(training_only, TRAINING) > 0
    assert count_pixels(training_only, EVALUATION) == 0


def test_the_points_are_the_evaluations(write_run, history):
    from matplotlib.figure import Figure

    run = RecordedRun.read(write_run("run", history(0.8, 10.0)))
    reward, kl, frontier = Figure().subplots(1, 3)
    plot_reward(reward, run)
    points, _, (bars,) = reward.containers[0].lines
    assert points.get_xydata().tolist() == [[0, 0.2], [128, 0.8]]
    ends = [end for bar in bars.get_segments() for end in bar[:, 1]]
    assert ends == pytest.approx([0.15, 0.25, 0.75, 0.85])  # ± 0.05
    assert reward.lines[0].get_xydata().tolist() == [[64, 0.5], [128, 0.8]]
    assert list(reward.lines[-1].get_ydata()) == [0.2, 0.2]  # the SFT model, a horizontal line
    plot_kl(kl, run)
    assert [line.get_xydata().tolist() for line in kl.lines] == [[[64, 5], [128, 10]], [[0, 0], [128, 10]]]
    plot_frontier(frontier, run)
    assert frontier.lines[0].get_xydata().tolist() == [[0, 0.2], [10, 0.8]]


def test_dollar_signs_in_a_name_are_not_read_as_a_formula(write_run, history):
    assert plot_curves(write_run("cost $^^$", history(0.8, 10.0))).is_file()


FILES = ["config.yaml", "curves.png", "environment.json", "metrics.jsonl"]


def test_the_file_is_replaced_atomically(write_run, history):
    run = write_run("run", history(0.8, 10.0))
    (run / "curves.png").write_bytes(b"old")
    with open(run / "curves.png", "rb") as reader:
        plot_curves(run)
        assert reader.read() == b"old"  # an open file keeps its content
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == FILES


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(write_run, history, monkeypatch):
    run = write_run("run", history(0.8, 10.0))
    (run / "curves.png").write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("apa_cli.report.plotting.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(run)
    monkeypatch.undo()
    assert (run / "curves.png").read_bytes() == b"old"
    assert sorted(path.name for path in run.iterdir()) == FILES


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        plot_curves(tmp_path)
