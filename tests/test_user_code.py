"""Import of the user's files and modules, in this process and in a spawned one."""

import subprocess
import sys

import pytest

from apa_cli.user_code import import_object


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """An empty current folder; what the test adds to the path is removed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_file_and_a_module_of_the_current_folder_are_imported(own_folder):
    (own_folder / "lone_module.py").write_text("class Inner:\n    number = 7\n")
    for target in ("lone_module.py:Inner", f"{own_folder}/lone_module.py:Inner"):
        assert import_object(target).number == 7
    for target in ("lone_module:Inner", "lone_module.Inner"):
        assert import_object(target) is sys.modules["lone_module"].Inner
    assert import_object("lone_module.py:Inner") is import_object(f"{own_folder}/lone_module.py:Inner")


def test_files_of_one_name_are_two_modules_and_hide_no_installed_one(own_folder):
    for folder, number in (("a", 1), ("b", 2)):
        (own_folder / folder).mkdir()
        (own_folder / folder / "random.py").write_text(f"number = {number}\n")
    assert (import_object("a/random.py:number"), import_object("b/random.py:number")) == (1, 2)
    assert import_object("random:Random") is not None


def test_a_file_may_import_modules_of_its_own_folder(own_folder):
    (own_folder / "sub").mkdir()
    (own_folder / "sub" / "sibling_module.py").write_text("number = 5\n")
    (own_folder / "sub" / "main_file.py").write_text("from sibling_module import number\n")
    assert import_object("sub/main_file.py:number") == 5


CANNOT = r"cannot import bad\.py"
FILES = {
    "x = (\n": rf"{CANNOT} \(SyntaxError: .*\(bad\.py, line 1\)\)",
    "import math\nimport nothing_there\n": rf"{CANNOT} \(ModuleNotFoundError: .*nothing_there', bad\.py, line 2\)",
    "import sys\n\nsys.exit('usage')\n": rf"{CANNOT} \(SystemExit: usage, bad\.py, line 3\)",
    "def f():\n    raise ValueError('a\\nb')\n\n\nf()\n": rf"{CANNOT} \(ValueError: a b, bad\.py, line 5\)",
    "": r"bad\.py defines no Thing",
}


@pytest.mark.parametrize("text", FILES)
def test_a_fault_in_the_file_is_one_line_with_file_and_line(text, own_folder):
    (own_folder / "bad.py").write_text(text)
    with pytest.raises(ImportError, match=rf"^{FILES[text]}$") as caught:
        import_object("bad.py:Thing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("absent.py:Thing", r"cannot import absent\.py \(FileNotFoundError: no file absent\.py\)"),
        (
            "absent_module.Thing",
            r"cannot import absent_module \(ModuleNotFoundError: No module named 'absent_module'\)",
        ),
        ("bad.py", "'bad.py' is not of the form"),
        (":Thing", "':Thing' is not of the form"),
        ("bad.py:", "'bad.py:' is not of the form"),
        ("Thing", "'Thing' is not of the form"),
    ],
)
def test_a_target_that_names_nothing_is_one_line(target, reason):
    with pytest.raises(ImportError, match=f"^{reason}"):
        import_object(target)


SPAWN = """
import multiprocessing
from apa_cli.user_code import import_object

if __name__ == "__main__":
    things = [import_object("sub/own_file.py:Thing")(3), import_object("own_module.Other")(4)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(repr, (things,)))
"""


def test_a_spawned_process_unpickles_what_a_file_and_a_module_define(own_folder):
    (own_folder / "sub").mkdir()
    head = "from dataclasses import dataclass\n\n\n@dataclass\nclass "
    (own_folder / "sub" / "own_file.py").write_text(f"import own_sibling\n{head}Thing:\n    number: int\n")
    (own_folder / "sub" / "own_sibling.py").write_text("")
    (own_folder / "own_module.py").write_text(f"{head}Other:\n    number: int\n")
    (own_folder / "scripts").mkdir()
    (own_folder / "scripts" / "start.py").write_text(SPAWN)  # as a console script, elsewhere than the current folder
    done = subprocess.run([sys.executable, "scripts/start.py"], capture_output=True, text=True, check=False)
    assert done.stdout == "[Thing(number=3), Other(number=4)]\n", done.stderr
