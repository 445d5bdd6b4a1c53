"""--help: the manual, printed from conf/ and the pages."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from apa_cli.config.aliases import CHOSEN_BY_GROUP
from apa_cli.config.explain import describe_missing_option
from apa_cli.config.hydra_api import find_config_dir, list_config_dirs, list_groups, list_overridden_groups
from apa_cli.errors import ConfigError

COMMANDS = {
    "apa-train": "trains a language model by online RLHF: sample responses, score them, estimate advantages, update",
    "apa-sft": "fine-tunes a model on the chosen responses of a data set; writes a plain model folder",
    "apa-reward": "trains a reward model on pairs of chosen and rejected responses; writes a plain model folder",
    "apa-eval": "evaluates a policy on held-out prompts against the SFT model it comes from; writes eval.json",
    "apa-export": "writes a run's policy as a plain model folder with a model card, and checks it",
    "apa-chat": "chats with a run's policy, or another model, in the terminal",
    "apa-bench": "measures where an iteration's time and memory go, on random weights and prompts; writes bench.json",
}

EXAMPLES = {
    "apa-train": [
        "apa-train                                      the embedded default, nothing to download",
        "apa-train algo=apa lambda=0.1                  the same, spelled out",
        "apa-train algo=ppo lambda=0.05 seed=1          another algorithm, another seed",
        "apa-train -m algo=apa lambda=0.03,0.1,0.3,1    a sweep: one run for each value",
        "apa-train model.path=FOLDER_OR_HUB_ID reward=function reward.target=my_file.py:my_function",
        "apa-train dry_run=true                         print batches, models and memory, and stop",
        "apa-train resume=outputs/NAME                  continue a run with its own settings",
        "apa-train name=NAME resume=auto KEY=VALUE …    start the run, or continue it if it was started",
        "apa-train fork=outputs/NAME name=NEW lambda=1  start a new run from the state of another",
    ],
    "apa-sft": ["apa-sft sft.epochs=3", "apa-sft model.path=FOLDER_OR_HUB_ID name=my_sft"],
    "apa-reward": [
        "apa-reward",
        "apa-reward model.path=FOLDER_OR_HUB_ID reward_model.lr=1e-4 name=my_reward",
    ],
    "apa-eval": [
        "apa-eval run=outputs/NAME                      with the settings of the run",
        "apa-eval run=outputs/NAME evaluation.prompts=256 'evaluation.rewards=[vader]' 'evaluation.best_of=[4,16,64]'",
        "apa-eval model.path=FOLDER evaluation.reference=FOLDER reward=vader dataset=story_openings",
    ],
    "apa-export": [
        "apa-export run=outputs/NAME                    to outputs/NAME/export",
        "apa-export run=outputs/NAME/checkpoints/iteration_000020 export.folder=FOLDER export.dtype=bfloat16",
    ],
    "apa-chat": [
        "apa-chat run=outputs/NAME                      /reset starts over, /quit ends",
        "apa-chat run=outputs/NAME sampling.temperature=0.7 sampling.max_new_tokens=200 chat.score=true",
        "apa-chat model.path=FOLDER_OR_HUB_ID",
    ],
    "apa-bench": [
        "apa-bench                                      the embedded default",
        "apa-bench model=pythia_160m algo=ppo           that architecture; nothing is downloaded",
        "apa-bench -m model=pythia_160m sampling.max_new_tokens=32,128 rollout_batch_size=64,256 name=growth",
    ],
}

FLAGS = """\
  -m, --multirun      a sweep: every combination of comma-separated values is one run
  --cfg job           print the whole configuration and stop
  --config-dir DIR    a folder with your own yaml files, laid out like conf/
  --help PAGE         print one of the pages below
  --version           print the version of apa-cli
  --hydra-help        all other flags"""

PAGES = Path(__file__).resolve().parents[1] / "pages"
"""Folder of the manual's pages, NAME.md each."""
PACKAGE = "# @package _global_"
KEY = re.compile(r"( *)(\w+):\s*(.*)$")
DEFAULT = re.compile(r"^  - (?:override )?/?(\w+)(?:@\w+)?$", re.MULTILINE)
"""An entry of a yaml's defaults list that names another yaml of its group."""


def print_help(command: str, extra_dir: str | None, arguments: list[str]) -> None:
    """Print a page if `arguments` name one, else usage, examples, groups with their options, and every key.

    Arguments such as dataset=jsonl choose the option whose keys are printed, which may be in the user's own folder
    `extra_dir`. Raise ConfigError for an unknown page or option.
    """
    pages = [argument for argument in arguments if "=" not in argument]
    if pages:
        print(read_page(pages[0]), end="")
        return
    print(f"{command} {COMMANDS[command]}.\n\nUsage: {command} [group=option | key=value] … [flags]\n\nExamples:")
    print("\n".join(f"  {line}" for line in EXAMPLES[command]))
    print(f"\nFlags:\n{FLAGS}")
    print(f"\nPages ({command} --help PAGE):\n  {', '.join(list_pages())}")
    main = (find_config_dir() / "config.yaml").read_text(encoding="utf-8")
    chosen = dict(re.findall(r"^  - (\w+): (\w+)$", main, flags=re.MULTILINE))
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments) if key in chosen}
    groups, folders = list_groups(extra_dir), list_config_dirs(extra_dir)
    for group, option in {**chosen, **given}.items():
        if option in groups[group]:
            chosen |= list_overridden_groups(group, option, extra_dir)
    chosen |= given
    print("\nGroups (conf/GROUP/OPTION.yaml; * marks the option whose keys are listed below):")
    for group, option in chosen.items():
        if option not in {"null", *groups[group]}:
            raise ConfigError(f"{group}: {describe_missing_option(option, groups[group], group)}")
        names = (f"{name}*" if name == option else name for name in sorted(groups[group]))
        print(f"  {group + '=':15s}{', '.join(names)}")
    print(f"\nKeys (key=value; keys of another option: {command} --help dataset=jsonl):")
    printed: set[str] = set()
    for group, option in sorted(chosen.items(), key=lambda choice: choice[0] != "algo"):
        if option != "null":
            print(f"\n {group}={option}")
            for text in _read_with_defaults(group, option, folders):
                _print_keys("" if PACKAGE in text else f"{group}.", text, printed)
    print("\n the run")
    _print_keys("", main.partition("\nhydra:")[0], printed)  # without the keys that an option above sets


def list_pages() -> list[str]:
    """Return the names of the manual's pages."""
    return sorted(file.stem for file in PAGES.glob("*.md"))


def read_page(name: str) -> str:
    """Return a page of the manual. Raise ConfigError with the nearest name if there is no such page."""
    pages = list_pages()
    if name not in pages:
        nearest = difflib.get_close_matches(name, pages, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(pages)}"
        raise ConfigError(f"--help: no page {name!r}; {hint}")
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def _read_with_defaults(group: str, option: str, folders: list[Path]) -> list[str]:
    """Return the texts of an option's yaml and of the yamls of its group that it starts from."""
    files = [folder / group / f"{option}.yaml" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return []
    text = file.read_text(encoding="utf-8")
    bases = [name for name in DEFAULT.findall(text) if name != "_self_"]
    return [text, *(base for name in bases for base in _read_with_defaults(group, name, folders))]


def describe_keys(yaml: str) -> list[tuple[str, str, str]]:
    """Return (dotted key, value, comment above it) for each key of a yaml file with a comment directly above it."""
    rows: list[tuple[str, str, str]] = []
    comment: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in yaml.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment = [] if stripped == PACKAGE else [*comment, stripped.lstrip("# ")]
            continue
        if match := KEY.match(line):
            indent, name = len(match[1]), match[2]
            parents = [(depth, parent) for depth, parent in parents if depth < indent]
            parents.append((indent, name))
            if comment:
                rows.append((".".join(part for _, part in parents), match[3], " ".join(comment)))
        comment = []
    return rows


def _print_keys(prefix: str, yaml: str, printed: set[str]) -> None:
    """Print each key with its value and its comment, a section as a heading; keys in `printed` are left out."""
    section = ""
    for key, value, comment in describe_keys(yaml):
        name = f"{prefix}{key}"
        if key in ("defaults", "_target_") or name in printed or name in CHOSEN_BY_GROUP:
            continue
        printed.add(name)
        if value:
            if section and not name.startswith(section):
                print()
                section = ""
            print(f"  {f'{name}={value}':38s} {comment}")
        else:
            print(f"\n {name}: {comment}")
            section = f"{name}."
