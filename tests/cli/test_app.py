"""The commands: one line for wrong overrides, no heavy import before they are checked, help, version."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import yaml

from apa_cli.cli.app import check_job, label_jobs
from apa_cli.config.hydra_api import expand_sweep, find_config_dir
from apa_cli.errors import ConfigError

LOADED = "import sys; heavy = {'torch', 'transformers', 'wandb', 'matplotlib', 'datasets', 'accelerate'}"
SINGLE = Namespace(config_dir=None, multirun=False)


def run(*words, cwd, module="train"):
    code = f"import sys; from apa_cli.cli.{module} import main; sys.argv[0] = 'apa-{module}'; main()"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)


def test_labels_of_a_sweeps_jobs_are_the_overrides_that_distinguish_them():
    jobs = expand_sweep(["algo=apa", "lambda=0.1,1", "seed=0,1"])
    assert label_jobs(jobs)[:3] == ["lambda=0.1 seed=0", "lambda=0.1 seed=1", "lambda=1 seed=0"]
    assert label_jobs([["algo=apa", "seed=0"]]) == [""]


@pytest.mark.parametrize("key", ["resume", "fork"])
@pytest.mark.parametrize("quote", ["", "'"])
def test_a_jobs_folder_that_does_not_exist_is_named_as_it_was_written(key, quote, tmp_path):
    folder = "outputs/sweeps/lam/lambda=1,seed=0"
    done = run(f"{key}={quote}{folder}{quote}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"apa-train: {key}: there is no run in {folder}\n")


@pytest.mark.parametrize(("takes", "key"), [((), "resume"), (("run", "model.path"), "run")])
def test_a_folder_alone_is_answered_with_the_key_that_takes_it(takes, key, tmp_path):
    with pytest.raises(ConfigError, match=f"give {key}={tmp_path}"):
        check_job([str(tmp_path)], SINGLE, takes)


STARTS = """
import contextlib, importlib, io, json
loaded, endings = {}, []
for name in ("train", "sft", "reward", "evaluate", "export", "chat", "bench"):
    for words in (["--help"], ["lambd=1"], ["--cfg", "job"]):
        sys.argv = [f"apa-{name}", *words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                importlib.import_module(f"apa_cli.cli.{name}").main()
                endings.append([0, said.getvalue().count(chr(10))])
            except SystemExit as end:
                endings.append([end.code, said.getvalue().count(chr(10))])
        loaded[" ".join(sys.argv)] = sorted(heavy & set(sys.modules))
print(json.dumps([loaded, endings]))
"""


def test_help_wrong_overrides_and_cfg_load_no_heavy_package_in_any_command(tmp_path):
    """`--cfg job` of a command that needs a run is answered as a wrong override is."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED + STARTS], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded, endings = json.loads(done.stdout)
    assert len(loaded) == 21 and not [words for words, packages in loaded.items() if packages]
    needs_a_run = [[0, 0], [2, 1], [2, 1]]
    assert endings == 3 * [[0, 0], [2, 1], [0, 0]] + 3 * needs_a_run + [[0, 0], [2, 1], [0, 0]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("lambd=1",),
        ("-m", "lambda=0.1,x"),
        ("--cfg", "job", "lambd=1"),
        ("seed=[1",),
        ("--learning_rate", "1e-5"),
        ("--nothing",),
        ("--help", "rewadrs"),
    ],
)
def test_the_command_answers_wrong_overrides_with_one_line_and_status_2(tmp_path, words):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("apa-train: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_cfg_job_prints_the_configuration_and_writes_nothing(tmp_path):
    done = run("--cfg", "job", "lambda=0.25", cwd=tmp_path)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["lambda"] == 0.25
    assert not list(tmp_path.iterdir())


def test_help_names_every_key_group_and_option(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("lambda=0.1", "optimizer.lr=", "algo=", "apa*", "ppo", "awr", "--config-dir", "-m", "resume="):
        assert word in done.stdout
    for name in yaml.safe_load((find_config_dir() / "config.yaml").read_text()):
        if name not in ("defaults", "hydra"):
            assert f"  {name}=" in done.stdout or f"\n {name}: " in done.stdout


def test_help_prints_a_page_of_the_manual(tmp_path):
    for page in ("rewards", "metrics"):
        done = run("--help", page, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("# ") and len(done.stdout) > 1000
    assert "did you mean rewards?" in run("--help", "rewadrs", cwd=tmp_path).stderr


def test_help_of_an_option_has_the_keys_that_it_shares_with_others(tmp_path):
    text = run("--help", "algo=ppo", "critic=head", cwd=tmp_path).stdout
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and "=" in line]
    assert {
        "algo.kl_controller=fixed",
        "algo.gae_lambda=0.95",
        "algo.value_clip_range=0.2",
        "critic.head=linear",
    } <= set(lines)
    keys = [line.partition("=")[0] for line in lines if line.startswith(("algo.", "critic."))]
    assert len(keys) == len(set(keys)) and "critic.kind" not in keys


def test_help_has_plans_and_guides(tmp_path):
    text = run("--help", "guide=local", cwd=tmp_path).stdout
    assert "\n  guide=         local*, sft\n" in text and "\n  plan=          online*" in text
    assert "  guide.path=???" in text and "  guide.top_k=50" in text and "  reference.log_kl=true" in text
    assert "  guide.path=null" in run("--help", cwd=tmp_path).stdout
    assert "did you mean 'local'" in run("--help", "guide=locl", cwd=tmp_path).stderr
    text = run("--help", "algo=a2po", cwd=tmp_path).stdout  # an algorithm that brings its plan
    assert "\n  plan=          online, online_init*\n" in text and "  plan.init_samples=8" in text


def test_help_knows_the_users_own_folder(tmp_path):
    (tmp_path / "mine" / "reward").mkdir(parents=True)
    (tmp_path / "mine" / "reward" / "short.yaml").write_text(
        "# Short responses.\n_target_: my.Short\n# Longest response, characters.\nlongest: 9\n"
    )
    text = run("--config-dir", "mine", "--help", "reward=short", cwd=tmp_path).stdout
    assert "short*" in text and "reward.longest=9" in text and "Longest response, characters." in text
    assert "did you mean 'short'" in run("--config-dir", "mine", "--help", "reward=shrot", cwd=tmp_path).stderr


@pytest.mark.parametrize("key", ["run", "resume", "fork"])
def test_a_groups_key_is_refused_for_recorded_runs_too(key, tmp_path):
    takes = ("run",) if key == "run" else ()
    with pytest.raises(ConfigError, match=r"^critic\.kind: only an option of the group"):
        check_job([f"{key}={tmp_path}", "critic.kind=head"], SINGLE, takes)


def test_version_is_the_packages(tmp_path):
    from importlib.metadata import version

    assert run("--version", cwd=tmp_path).stdout == f"apa-cli {version('apa-cli')}\n"


@pytest.mark.slow
@pytest.mark.parametrize("words", [("dry_run=true",), ("dry_run=true", "model.path=nothing/there")])
def test_a_single_run_makes_no_directory_before_it_starts(words, tmp_path):
    run(*words, "launch.device=cpu", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


PIPED = [
    ("--help", 0),
    ("--cfg job", 0),
    pytest.param("dry_run=true launch.device=cpu", 141, marks=pytest.mark.slow),  # loads the models' libraries
]


@pytest.mark.parametrize(("words", "status"), PIPED)
def test_a_reader_that_closes_the_pipe_causes_no_traceback(words, status, tmp_path):
    code = "import sys; from apa_cli.cli.train import main; sys.argv[0] = 'apa-train'; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words.split()], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == status
