"""apa-compare on runs written by hand: means by arithmetic, files that stand alone, errors in one line."""

import csv
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from apa_cli.cli.compare import main
from apa_cli.report.groups import group_runs
from apa_cli.runs.records import RecordedRun


@pytest.fixture
def sweep(tmp_path, write_run, history) -> Path:
    """APA and PPO, two seeds each; rewards 0.8, 0.9 and 0.5, 0.7; KL 10, 14 and 4, 6; SFT 0.2."""
    extra = {"eval/win_rate_sft": 0.75, "eval/reward_mean/length": -1.5}
    write_run("sweep/apa0", history(0.8, 10.0, **extra), seed=0)
    write_run("sweep/apa1", history(0.9, 14.0, **extra), seed=1)
    write_run("sweep/ppo0", history(0.5, 4.0), algorithm="ppo", lambda_=0.05, seed=0)
    write_run("sweep/ppo1", history(0.7, 6.0), algorithm="ppo", lambda_=0.05, seed=1)
    return tmp_path / "sweep"


def read_csv(folder: Path) -> list[dict]:
    with open(folder / "comparison.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_means_and_deviations_over_seeds(sweep, capsys):
    assert main([str(sweep)]) == 0
    apa, ppo = read_csv(sweep)
    assert (apa["algorithm"], apa["lambda"], apa["lambda_meaning"]) == ("APA", "0.1", "temperature and pull")
    assert (ppo["algorithm"], ppo["lambda"], ppo["lambda_meaning"]) == ("PPO", "0.05", "price of KL")
    assert (apa["seeds"], apa["runs"]) == ("0 1", "2")
    expected = {
        "eval/reward_mean": 0.85,  # (0.8 + 0.9) / 2
        "eval/reward_mean_std": 0.05 * 2**0.5,  # deviations ± 0.05: sqrt((0.0025 + 0.0025) / 1)
        "gain_over_sft": 0.65,  # 0.85 − 0.2
        "eval/kl_exact": 12.0,
        "eval/kl_exact_std": 2 * 2**0.5,
        "response/eos_rate": 0.75,  # the last iteration's, not the mean of 0.5 and 0.75
        "eval/win_rate_sft": 0.75,
        "eval/reward_mean/length": -1.5,
        "minutes": 2.0,
        "samples_min": 128,
        "samples_max": 128,
    }
    assert {key: float(apa[key]) for key in expected} == pytest.approx(expected)
    assert float(ppo["eval/reward_mean"]) == pytest.approx(0.6)
    assert float(ppo["gain_over_sft"]) == pytest.approx(0.4)
    assert float(ppo["eval/kl_exact"]) == pytest.approx(5.0)
    assert ppo["eval/win_rate_sft"] == ""  # not measured, so there is no number
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("APA"))
    assert "0.1 (temperature and pull)" in row
    assert "0.850 ± 0.071" in row
    assert "12.00 ± 2.83" in row
    assert "λ has a different meaning in each algorithm (APA: temperature and pull; PPO: price of KL)" in printed


def test_runs_that_record_nothing_of_their_algorithm_are_compared_by_the_name_of_its_class(
    tmp_path, write_run, history, capsys
):
    """Such as runs recorded before environment.json described the algorithm, or whose class is not installed."""
    algo = {"_target_": "not_installed.module.Mine", "strength": 0.5}
    runs = [
        write_run("old", history(0.8, 10.0), environment={"policy": "somewhere"}),
        write_run("foreign", history(0.9, 14.0), environment=None, algo=algo),
    ]
    assert main([*map(str, runs), "--out", str(tmp_path)]) == 0
    rows = read_csv(tmp_path)
    assert [(row["algorithm"], row["lambda_meaning"]) for row in rows] == [("APA", ""), ("Mine", "")]
    assert "λ has a different meaning in each algorithm: compare" in capsys.readouterr().out


def test_one_seed_has_no_deviation(sweep, tmp_path):
    assert main([str(sweep / "apa0"), "--out", str(tmp_path / "report")]) == 0
    (row,) = read_csv(tmp_path / "report")
    assert float(row["eval/reward_mean"]) == 0.8
    assert row["eval/reward_mean_std"] == ""


def test_settings_that_vary_have_a_column(sweep, write_run, history):
    write_run("sweep/slow", history(0.4, 1.0), optimizer={"lr": 1e-5})
    assert main([str(sweep)]) == 0
    rows = read_csv(sweep)
    assert [float(row["optimizer.lr"]) for row in rows] == [1e-5, 3e-4, 3e-4]
    assert [float(row["eval/reward_mean"]) for row in rows] == pytest.approx([0.4, 0.85, 0.6])


def test_the_page_loads_nothing_and_its_texts_are_escaped(sweep, write_run, history):
    write_run("sweep/<script>alert(1)<script>", history(0.4, 1.0), seed=2)
    assert main([str(sweep)]) == 0
    page = (sweep / "comparison.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("src=") == 1
    assert "url(" not in page
    assert "<link" not in page
    assert 'src="data:image/png;base64,' in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "0.1 (temperature and pull)" in page
    assert "compare algorithms at equal KL, not at equal λ" in page


def test_seeds_that_stopped_early_are_named(sweep, write_run, history):
    short = write_run("short", history(0.9, 14.0)[:2], seed=1)
    assert main([str(sweep / "apa0"), str(short), "--out", str(sweep)]) == 0
    assert "stopped at different numbers of samples (64 to 128)" in (sweep / "comparison.html").read_text()


def test_files_go_to_the_folder_of_runs_or_to_the_current_one(sweep, tmp_path, monkeypatch):
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    assert main([str(sweep / "apa0"), str(sweep / "apa1")]) == 0
    assert sorted(path.name for path in current.iterdir()) == [
        "comparison.csv",
        "comparison.html",
        "comparison.png",
    ]
    assert not list(sweep.glob("comparison.*"))
    assert main([str(sweep), str(sweep / "apa0")]) == 0  # apa0 is named twice, and counts once
    assert read_csv(sweep)[0]["seeds"] == "0 1"


def fail(arguments: list[str], capsys) -> str:
    """Run apa-compare; return its one line on stderr."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_errors_are_one_line_with_status_2(tmp_path, write_run, history, capsys):
    assert f"{tmp_path / 'none'}: no such folder" in fail([str(tmp_path / "none")], capsys)
    assert "no run in it" in fail([str(tmp_path)], capsys)
    unevaluated = write_run("unevaluated", history(0.8, 10.0)[1:2])
    assert "evaluation" in fail([str(unevaluated)], capsys)
    assert not list(tmp_path.glob("**/comparison.*"))
    (unevaluated / "metrics.jsonl").write_text("")
    assert str(unevaluated) in fail([str(unevaluated)], capsys)


def test_a_failed_job_of_a_sweep_is_left_out_and_named(sweep, capsys):
    (sweep / "apa1/metrics.jsonl").write_text("")
    assert main([str(sweep)]) == 0
    assert str(sweep / "apa1") in capsys.readouterr().err
    assert read_csv(sweep)[0]["seeds"] == "0"


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"apa-cli {metadata.version('apa-cli')}\n"


def test_help_loads_no_heavy_library_and_explains_lambda():
    code = (
        "import sys\nfrom apa_cli.cli.compare import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "print('MODULES', *sys.modules)"
    )
    text, _, modules = subprocess.check_output([sys.executable, "-c", code], text=True).partition("MODULES")
    assert "lambda has a different meaning in each algorithm" in text
    assert not set(modules.split()) & {"torch", "matplotlib", "numpy", "wandb", "rich"}


def test_runs_with_truncated_sampling_are_marked_everywhere(tmp_path, write_run, history, capsys):
    entropy = {"eval/entropy": 1.5}
    write_run("sweep/apa", history(0.8, 10.0, **entropy), sampling={"top_k": 50, "top_p": 1.0})
    write_run("sweep/awr", history(0.7, 9.0, **entropy), algorithm="awr", sampling={"top_k": 0, "top_p": 0.9})
    write_run("sweep/ppo", history(0.6, 4.0, **entropy), algorithm="ppo", sampling={"top_k": 0, "top_p": 1.0})
    assert main([str(tmp_path / "sweep")]) == 0
    printed = capsys.readouterr().out
    for algorithm, marks in (("APA", ["10.00 †", "1.50 †"]), ("AWR", ["9.00 †", "1.50 †"]), ("PPO", [])):
        row = next(line for line in printed.splitlines() if line.startswith(algorithm))
        assert row.count("†") == len(marks) and all(mark in row for mark in marks)
    assert "† Sampled with top-k 50, top-p 0.9: KL and entropy are those of the truncated sampler" in printed
    assert [row["truncation"] for row in read_csv(tmp_path / "sweep")] == ["top-k 50", "top-p 0.9", ""]
    page = (tmp_path / "sweep" / "comparison.html").read_text(encoding="utf-8")
    assert "10.00 †" in page and "<td>top-p 0.9</td>" in page and "<td>none</td>" in page
    labels = [group.label for group in group_runs([RecordedRun.read(tmp_path / "sweep" / n) for n in ("apa", "ppo")])]
    assert labels[0].endswith("† top-k 50") and "†" not in labels[1]
