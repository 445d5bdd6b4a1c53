"""--help: conf/ is the manual, and this prints it."""

from __future__ import annotations

import re
from pathlib import Path

COMMANDS = {
    "apa-train": "trains a language model by online RLHF: sample replies, score them, estimate advantages, update",
    "apa-sft": "supervised fine-tuning on the chosen replies of a data set; writes a plain model folder",
    "apa-reward": "trains a reward model on pairs of chosen and rejected replies; writes a plain model folder",
    "apa-eval": "evaluates a policy on held-out prompts against the SFT model it comes from; writes eval.json",
    "apa-export": "writes a run's policy as a plain model folder with a model card, and checks it",
    "apa-chat": "talks with a run's policy, or another model, in the terminal",
    "apa-bench": "measures where an iteration's time and memory go, on random weights and prompts; writes bench.json",
}

EXAMPLES = {
    "apa-train": [
        "apa-train                                      the embedded default, nothing to download",
        "apa-train algo=apa lambda=0.1                  the same, spelled out",
        "apa-train algo=ppo lambda=0.05 seed=1          another algorithm, another seed",
        "apa-train -m algo=apa lambda=0.03,0.1,0.3,1    a sweep: one run for each value",
        "apa-train model=local model.path=FOLDER reward=function reward.target=my_file.py:my_function",
        "apa-train dry_run=true                            say what would run, and stop",
        "apa-train resume=outputs/NAME                  continue a run with its own settings",
        "apa-train name=NAME resume=auto WORDS          begin it, or continue it where it was begun",
        "apa-train fork=outputs/NAME name=NEW lambda=1  another run from the state of this one",
    ],
    "apa-sft": ["apa-sft sft.epochs=3", "apa-sft model=local model.path=FOLDER name=my_sft"],
    "apa-reward": [
        "apa-reward",
        "apa-reward model=local model.path=FOLDER reward_model.lr=1e-4 name=my_reward",
    ],
    "apa-eval": [
        "apa-eval run=outputs/NAME                      with the settings of the run",
        "apa-eval run=outputs/NAME evaluation.prompts=256 evaluation.rewards=[vader] evaluation.best_of=[4,16,64]",
        "apa-eval model.path=FOLDER evaluation.reference=FOLDER reward=vader dataset=story_openings",
    ],
    "apa-export": [
        "apa-export run=outputs/NAME                    to outputs/NAME/export",
        "apa-export run=outputs/NAME/checkpoints/iteration_000020 export.folder=FOLDER export.dtype=bfloat16",
    ],
    "apa-chat": [
        "apa-chat run=outputs/NAME                      /reset begins anew, /quit ends",
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
  --config-dir DIR    a folder with your own yaml files, laid out as conf/
  --hydra-help        all other flags"""


def described_keys(yaml: str) -> list[tuple[str, str, str]]:
    """(dotted key, value, comment above it) for each key of a yaml file that has a comment directly above it."""
    rows, comment = [], []
    above: list[tuple[int, str]] = []
    for line in yaml.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
            continue
        if found := re.match(r"( *)(\w+):\s*(.*)$", line):
            above = [(indent, name) for indent, name in above if indent < len(found[1])]
            above.append((len(found[1]), found[2]))
            if comment:
                rows.append((".".join(name for _, name in above), found[3], " ".join(comment)))
        comment = []
    return rows


def print_help(command: str, conf: Path, words: list[str]) -> None:
    """Usage, examples, groups with their options, and every key of those chosen with its comment and value.

    `words` such as dataset=jsonl choose.
    """
    print(f"{command} {COMMANDS[command]}.\n\nUsage: {command} [group=option | key=value] … [flags]\n\nExamples:")
    print("\n".join(f"  {line}" for line in EXAMPLES[command]))
    print(f"\nFlags:\n{FLAGS}\n\nGroups (conf/GROUP/OPTION.yaml; the one whose keys follow has a star):")
    main = (conf / "config.yaml").read_text()
    chosen = dict(re.findall(r"^  - (\w+): (\w+)$", main, flags=re.M))
    chosen |= {key: value for key, _, value in (word.partition("=") for word in words) if key in chosen}
    for group, default in chosen.items():
        options = sorted(str(f.relative_to(conf / group).with_suffix("")) for f in (conf / group).rglob("*.yaml"))
        marked = [f"{option}*" if option == default else option for option in options]
        print(f"  {group + '=':15s}{', '.join(marked)}")
    print(f"\nKeys (key=value; for those of another option: {command} --help dataset=jsonl):")
    _print_keys("", main.split("\nhydra:")[0])
    for group, default in chosen.items():
        file = conf / group / f"{default}.yaml"
        if file.is_file():
            print(f"\n {group}={default}")
            text = file.read_text()
            _print_keys("" if "# @package _global_" in text else f"{group}.", text)


def _print_keys(prefix: str, yaml: str) -> None:
    for key, value, comment in described_keys(yaml):
        if key not in ("defaults", "_target_"):
            print(f"  {f'{prefix}{key}={value}':38s} {comment}")
