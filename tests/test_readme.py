"""Every command in the README and in the pages, parsed from them, runs; only sizes are overridden."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PAGES = ROOT / "apa_cli" / "pages"
DOCUMENTS = [ROOT / "README.md", *sorted(PAGES.glob("*.md")), ROOT / "tests" / "benchmarks" / "RESULTS.md"]
"""In the order in which their commands run."""
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
README, MANUAL = TEXTS[ROOT / "README.md"], "\n".join(TEXTS.values())
BLOCKS = re.findall(r"```bash\n(.*?)```", MANUAL, flags=re.S)
FILES = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", MANUAL, flags=re.S)
PROMPTS = re.search(r"```json\n(.*?)```", README, flags=re.S)[1]
HUB_MODEL = "nickypro/tinyllama-15M"

SMALL = {
    "iterations": 2, "rollout_batch_size": 4, "minibatch_size": 4, "evaluation.every": 0, "checkpoint.every": 1,
    "evaluation.prompts": 4, "sampling.max_new_tokens": 8,
}  # fmt: skip
SMALL_DATA = {"dataset.train_prompts": 48, "dataset.test_prompts": 8}
SMALL_MODEL = {
    "model.architecture.hidden_size": 32, "model.architecture.num_hidden_layers": 1,
    "model.tokenizer_vocabulary": 400,
}  # fmt: skip
FLAGS = ("--help", "--cfg")
FOLDERS = {"hh": "hh-rlhf", "stack_exchange": "stack-exchange-paired"}
ON_DISK = [f"model.path={SHARED}/models/stories15m", "dataset.train_rows=12", "dataset.test_rows=4"]
REAL_DATA = {
    "apa-reward": ["reward_model.batch_size=4", "reward_model.max_tokens=64", "reward_model.held_out=4"],
    "apa-train": [f"{key}={value}" for key, value in SMALL.items()]
    + ["microbatch_size=4", "sampling.max_prompt_tokens=64"],
}
"""Sizes of the runs on real data, which take a small model and the data on disk."""


def commands() -> list[str]:
    return [line for block in BLOCKS for line in block.strip().splitlines()]


def sized(line: str) -> list[str]:
    """The command's words with only sizes changed, and the hub model replaced by a local copy of it."""
    words = [word.replace(HUB_MODEL, str(SHARED / "models" / "stories15m")) for word in shlex.split(line)]
    words = [word.replace("reward.path=toxicity", f"reward.path={SHARED}/rewards/bert-tiny-toxicity") for word in words]
    if words[0] == "apa-eval":
        return [*words, "evaluation.prompts=4", "evaluation.best_of=[2]", "evaluation.best_of_prompts=2"]
    if words[0] == "apa-bench":
        return [*words, "rollout_batch_size=4", "minibatch_size=4", "sampling.max_new_tokens=4", "bench.iterations=1"]
    if words[0] not in ("apa-train", "apa-sft", "apa-reward") or any(flag in words for flag in FLAGS):
        return words
    sizes = {} if "dataset=jsonl" in words else dict(SMALL_DATA)
    if words[0] == "apa-train":
        given = [word.split("=")[0] for word in words]
        longer = 3 if "fork" in given else 2 if "resume" in given else 1
        sizes |= SMALL | {"iterations": 2 * longer}
        if "grpo" in line:  # it samples eight responses to a prompt
            sizes["rollout_batch_size"] = 8
        if "resume" in given or "fork" in given:  # the run has its own model and data
            return words + [f"{key}={value}" for key, value in sizes.items() if key not in SMALL_DATA]
    if "model=smollm2_135m" in words:
        dataset = next(word.partition("=")[2] for word in words if word.startswith("dataset="))
        return [*words, *ON_DISK, f"dataset.path={SHARED}/data/{FOLDERS[dataset]}", *REAL_DATA[words[0]]]
    if not any(word.startswith("model=") or "stories_vader" in word for word in words):
        sizes |= SMALL_MODEL
    return words + [f"{key}={value}" for key, value in sizes.items()]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 200
    for path, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_readme_lists_every_page():
    listed = re.findall(r"^\| \[(\w+)\]\(apa_cli/pages/(\w+)\.md\)", README, flags=re.M)
    assert sorted(listed) == sorted((page.stem, page.stem) for page in PAGES.glob("*.md"))


def test_commands_are_quoted_for_every_shell():
    for line in commands():
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        assert not re.search(r"[\[\]{}*?]", unquoted), line


def test_the_documents_have_commands_and_none_is_unknown():
    names = {shlex.split(line)[0] for line in commands()}
    assert names == {
        "make", "pip", "apa-train", "apa-sft", "apa-reward", "apa-compare", "apa-eval", "apa-export", "apa-chat",
        "apa-bench",
    }  # fmt: skip


def test_sizes_are_all_that_is_overridden():
    for line in commands():
        words = sized(line)
        for before, after in zip(shlex.split(line), words, strict=False):
            assert before == after or HUB_MODEL in before or before == "reward.path=toxicity"


@pytest.mark.slow
def test_every_apa_command_runs_in_order(tmp_path):
    if not (SHARED / "models" / "stories15m").is_dir():
        pytest.skip("the stories15m model is not on this machine")
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    (tmp_path / "my_prompts.jsonl").write_text(PROMPTS)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "APA_CACHE_DIR": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    for line in commands():
        if not line.startswith("apa-"):
            continue
        done = subprocess.run(
            sized(line),
            cwd=tmp_path,
            env=environment,
            input="hello\n/quit\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    runs = yaml.safe_load((tmp_path / "outputs" / "long" / "config.yaml").read_text())
    assert runs["name"] == "long"
    assert len((tmp_path / "outputs" / "long" / "metrics.jsonl").read_text().splitlines()) == 1 + 4
    assert (tmp_path / "outputs" / "sweeps" / "lambdas" / "comparison.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def fresh_copy(tmp_path_factory):
    """The repository's tracked files in another folder, as a clone would have them."""
    folder = tmp_path_factory.mktemp("clone") / "apa-cli"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_make_and_pip_commands_run_in_a_fresh_copy(fresh_copy, tmp_path):
    """`make install` for real; train with small sizes; test on one file; the installed wheel from elsewhere."""
    environment = {**os.environ, "APA_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("VIRTUAL_ENV", None)
    small = " ".join(f"{key}={value}" for key, value in (SMALL | SMALL_DATA | SMALL_MODEL).items())
    arguments = {
        "make install": [],
        "make train": [f"ARGS={small}"],
        "make test": ["ARGS=tests/test_losses.py"],
        "make check": [],
    }
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
    listed = re.findall(r"^make .*$", blocks, flags=re.M)
    assert sorted(listed) == sorted(arguments)
    for line in listed:
        done = subprocess.run(
            [*line.split(), *arguments[line]],
            cwd=fresh_copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    binary = fresh_copy / ".venv" / "bin"
    subprocess.run(
        [binary / "pip", "install", "--quiet", "--no-deps", "--force-reinstall", "."], cwd=fresh_copy, check=True
    )
    where = subprocess.run(
        [binary / "python", "-c", "import apa_cli; print(apa_cli.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "site-packages" in where.stdout
    done = subprocess.run(
        [binary / "apa-train", "algo=apa", "lambda=0.1", *small.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "outputs").glob("*/model/config.json"))
