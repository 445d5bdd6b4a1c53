"""The examples of CONTRIBUTING.md: written to files as it says, they train."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", TEXT, flags=re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S) for line in block.splitlines()]
SMALL = [
    "iterations=1", "rollout_batch_size=4", "minibatch_size=4", "evaluation.prompts=4", "checkpoint.every=0",
    "sampling.max_prompt_tokens=64",
    "launch.device=cpu", "launch.threads=1",
]  # fmt: skip


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the files of the three examples."""
    for name, text in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(line: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run a command of the file in `folder`; a variable before it is set."""
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z]+=", word))
    words = [word for word in words if not re.match(r"[A-Z]+=", word)]
    environment = {
        **os.environ, **variables, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return subprocess.run([*words, *overrides], cwd=folder, env=environment, capture_output=True, text=True)


def test_there_is_one_example_each():
    assert [name for name, _ in FILES] == [
        "my_algorithm.py", "my_conf/algo/a2c.yaml", "my_dataset.py", "my_conf/dataset/sums.yaml",
        "my_reward_class.py", "my_conf/reward/answer.yaml",
    ]  # fmt: skip
    assert len(COMMANDS) == 2 and "dry_run=true" in COMMANDS[0]


@pytest.mark.slow
def test_a_dry_run_builds_all_three(project):
    done = run(COMMANDS[0], project)
    assert done.returncode == 0, done.stderr
    assert "reward: Answer" in done.stdout


@pytest.mark.slow
def test_all_three_train_together(project, tiny):
    line = re.sub(r"model\.path=\S+", f"model.path={tiny}", COMMANDS[1])
    done = run(line, project, *SMALL)
    assert done.returncode == 0, done.stderr
    folder = project / "outputs" / "sums"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["algorithm"] == {"label": "A2C", "color": "#7c3aed", "lambda_meaning": None}
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1] and "loss/policy" in rows[1]
