"""The direction of imports, and what only some rooms may know. The source is parsed, never imported.

Read for the direction: every `import` and `from … import` of apa_cli's modules, wherever it stands: at the
top, inside a function, under TYPE_CHECKING (a type that is only named ties two rooms together as well). For
`from apa_cli import x` the room is x. `_target_` in conf/ is a string and counts for nothing.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "apa_cli"

LEVELS = [
    ["cli"],
    ["inference", "bench"],
    ["training"],
    ["report", "stages", "distributed", "config"],
    ["rollout", "rewards", "runs"],
    ["models"],
    ["algorithms", "hardware"],
    ["settings", "datasets", "kl"],
    [
        "types",
        "errors",
        "secrets",
        "losses",
        "advantages",
        "tensor_ops",
        "randomness",
        "network",
        "pool",
        "user_code",
        "hashing",
        "file_modes",
        "model_folder",
    ],
]
"""From the commands down. A package, or a module that lies flat in apa_cli, imports its own level and lower."""

LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMMANDS = ("cli", "config")

FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The room a file belongs to: its folder in apa_cli, or its own name."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> list[tuple[str, int]]:
    """Every module that is imported, with its line: a.b for `import a.b`, a.b.c for `from a.b import c`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def imported_rooms(tree: ast.Module) -> list[tuple[str, int]]:
    parts = [(name.split("."), line) for name, line in imports(tree)]
    return [(names[1], line) for names, line in parts if names[0] == "apa_cli" and len(names) > 1]


CONTRACT = ("__init__", "base", "plans", "pairs", "ratio", "online_init")
"""Modules in algorithms/ that are no algorithm: the contract, bases of several algorithms, and plans."""


def algorithm_names() -> tuple[set[str], set[str]]:
    """The modules in algorithms/ that are algorithms, and the classes in them that are derived from `Algorithm`."""
    files = sorted((PACKAGE / "algorithms").glob("*.py"))
    classes = [(file.stem, node) for file in files for node in parsed(file).body if isinstance(node, ast.ClassDef)]
    derived = {"Algorithm"}
    for _ in classes:  # a chain of bases has at most as many links as there are classes
        derived |= {node.name for _, node in classes if derived & {getattr(base, "id", None) for base in node.bases}}
    names = {node.name for module, node in classes if module not in CONTRACT and node.name in derived}
    return {file.stem for file in files} - set(CONTRACT), names


def test_the_reader_finds_imports_wherever_they_stand():
    source = """
import torch
from apa_cli import kl, runs as started
import apa_cli.training.trainer
if TYPE_CHECKING:
    from apa_cli.models.loading import load_pretrained
def f():
    from apa_cli.report.curves import draw
"""
    rooms = [name for name, _ in imported_rooms(ast.parse(source))]
    assert sorted(rooms) == ["kl", "models", "report", "runs", "training"]


def test_every_module_has_a_level():
    unknown = {room(file) for file in FILES} - LEVEL.keys() - {"__init__"}
    assert not unknown, "give these a place in LEVELS"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = LEVEL.get(room(file), len(LEVELS))  # apa_cli/__init__.py imports nothing of the package
    upwards = [(name, line) for name, line in imported_rooms(parsed(file)) if LEVEL[name] < own]
    assert not upwards


def module(file: Path) -> str:
    """The dotted name of a file in the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module, known: set[str]) -> set[str]:
    """The package's own modules among the imports: apa_cli.a.b for `from apa_cli.a.b import c`."""
    return {
        name if name in known else name.rpartition(".")[0]
        for name, _ in imports(tree)
        if name.startswith("apa_cli.") and {name, name.rpartition(".")[0]} & known
    }


def test_no_circles():
    """Modules can be ordered so that each imports only earlier ones, also within a package."""
    known = {module(file) for file in FILES}
    graph = {module(file): imported_modules(parsed(file), known) - {module(file)} for file in FILES}
    assert len(graph) > 70 and graph["apa_cli.training.trainer"] >= {"apa_cli.training.updater", "apa_cli.types"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_only_the_commands_import_config():
    for file in FILES:
        if room(file) not in COMMANDS:
            assert "config" not in [name for name, _ in imported_rooms(parsed(file))], file


def test_every_algorithm_of_conf_is_one_that_the_next_test_is_about():
    modules, classes = algorithm_names()
    assert modules >= {"apa", "ppo", "awr", "dpo", "grpo"} and classes >= {"APA", "PPO", "AWR", "DPO", "GRPO"}
    assert not classes & {"Algorithm", "ActorCritic", "Pairwise", "RatioAlgorithm", "Online", "OnlineInit"}
    files = sorted((ROOT / "conf" / "algo").glob("[!_]*.yaml"))
    targets = [re.search(r"_target_: apa_cli\.algorithms\.(\w+)\.(\w+)", file.read_text()) for file in files]
    named = {(target[1], target[2]) for target in targets if target}
    assert len(named) == len(files), "the yaml of an algorithm names its own class"
    assert {module for module, _ in named} == modules and {name for _, name in named} == classes


@pytest.mark.parametrize(
    "file", [file for file in FILES if room(file) != "algorithms"], ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_nobody_asks_which_algorithm_runs(file):
    """No algorithm's module or class is imported or named, and no text is compared with an algorithm's name.

    A table of words or colours by name (report/) is data to look a label up in: it decides nothing.
    """
    modules, classes = algorithm_names()
    names = {name.lower() for name in modules | classes}
    tree, found = parsed(file), []
    for name, line in imports(tree):
        if set(name.split(".")[2:]) & (modules | classes) and name.startswith("apa_cli.algorithms"):
            found.append((line, name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in classes:
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and node.attr in classes:
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Compare | ast.MatchValue):
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            asked = [text for text in texts if text.lower().rsplit(".", 1)[-1] in names]
            found += [(node.lineno, text) for text in asked]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            paths = re.findall(r"apa_cli\.algorithms\.(\w+)", node.value)
            found += [(node.lineno, path) for path in paths if path in modules]
    assert not found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_command_line_knows_hydra(file):
    if room(file) in COMMANDS:
        return
    assert not [name for name, _ in imports(parsed(file)) if name.split(".")[0] in ("hydra", "omegaconf")]


def test_conf_holds_yaml_and_nothing_else():
    files = [file for file in (ROOT / "conf").rglob("*") if file.is_file()]
    assert files and not [file for file in files if file.suffix != ".yaml"]
