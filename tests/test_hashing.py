"""Digests of inputs: the same content in another place is the same input, any other content is another."""

import json
import shutil

import pytest

from apa_cli import hashing
from apa_cli.hashing import hash_chat_template, hash_examples, hash_large_file, hash_model, hash_target, hash_tokenizer
from apa_cli.types import Example


@pytest.fixture
def model(tmp_path):
    """A folder with the files of a model and its tokenizer; their content is read by no library here."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": "somewhere"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "a"}))
    return folder


def digest(folder) -> tuple:
    return hash_model(str(folder)), hash_tokenizer(str(folder)), hash_chat_template(str(folder))


def test_a_copy_of_a_model_has_its_digests(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({"_name_or_path": "elsewhere", "model_type": "llama"}))
    (copy / "README.md").write_text("not read by a run")
    assert digest(copy) == digest(model) and None not in digest(model)


@pytest.mark.parametrize(
    ("file", "content", "changed"),
    [
        ("model.safetensors", "weightz", [True, False, False]),
        ("config.json", '{"model_type": "gptj"}', [True, False, False]),
        ("generation_config.json", '{"eos_token_id": 3}', [True, False, False]),
        ("modeling.py", "code", [True, False, False]),
        ("tokenizer.json", "{ }", [False, True, False]),
        ("tokenizer_config.json", '{"eos_token": "x", "chat_template": "a"}', [False, True, False]),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": "b"}', [False, False, True]),
        ("chat_template.jinja", "b", [False, False, True]),
    ],
)
def test_each_file_of_a_model_counts_where_it_is_read(file, content, changed, model):
    before = digest(model)
    (model / file).write_text(content)
    assert [old != new for old, new in zip(before, digest(model), strict=True)] == changed


def test_weights_that_are_not_loaded_do_not_count(model):
    before = hash_model(str(model))
    (model / "pytorch_model.bin").write_bytes(b"an older format beside safetensors")
    assert hash_model(str(model)) == before


@pytest.mark.parametrize("further", [[], ["config.json"]])  # some trainers save the base's configuration beside it
def test_an_adapter_is_known_by_its_base_too(further, model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in further:
        (adapter / name).write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model), "r": 2}))
    (adapter / "adapter_model.safetensors").write_bytes(b"low rank")
    before = digest(adapter)
    assert before[1:] == digest(model)[1:]
    (model / "model.safetensors").write_bytes(b"other")
    assert hash_model(str(adapter)) != before[0]


def test_of_a_large_file_size_and_blocks_from_start_to_end_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "WHOLE_FILE_LIMIT", 50)
    monkeypatch.setattr(hashing, "SAMPLED_BLOCKS", 3)
    monkeypatch.setattr(hashing, "BLOCK_SIZE", 10)
    file = tmp_path / "weights"

    def hash_with(place: int | None = None, size: int = 100) -> str:
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        return hash_large_file(file)

    # Blocks of 10 bytes at 0 · 90 / 2 = 0, 1 · 90 / 2 = 45 and 2 · 90 / 2 = 90.
    whole = hash_with()
    assert all(hash_with(place) != whole for place in (0, 9, 45, 54, 90, 99))
    assert all(hash_with(place) == whole for place in (10, 44, 55, 89))
    assert hash_with(size=101) != whole
    assert hash_with(place=20, size=50) != hash_with(size=50)  # a small file is read as a whole


def test_every_field_of_an_example_counts_and_so_does_the_order():
    row = Example("p", "c", "r", {"level": 1}, [{"role": "user", "content": "p"}], "logged", 0.5)
    others = [
        Example(*(None if place == n else value for place, value in enumerate(vars(row).values()))) for n in range(1, 7)
    ]
    digests = {hash_examples([each]) for each in [row, *others]}
    assert len(digests) == 7
    assert hash_examples([row, others[0]]) != hash_examples([others[0], row]) != hash_examples([others[0]], [row])
    holds_object = Example("p", None, None, {"x": lambda: 0})
    assert hash_examples([holds_object]) == hash_examples([Example("p", None, None, {"x": holds_object.columns["x"]})])


def test_code_is_known_with_the_modules_of_its_folder(tmp_path):
    (tmp_path / "reward.py").write_text("import json\nfrom first import f\n")
    (tmp_path / "first.py").write_text("def f():\n    from package import second\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "second.py").write_text("x = 1\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    target = f"{tmp_path}/reward.py:f"
    before = hash_target(target)
    copy = shutil.copytree(tmp_path, tmp_path / "copy", ignore=lambda *_: ["copy"])
    assert hash_target(f"{copy}/reward.py:g") == before is not None
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert hash_target(target) == before
    for file in ("reward.py", "first.py", "package/second.py"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text + "\n")
        assert hash_target(target) != before
        (tmp_path / file).write_text(text)
    assert hash_target(f"{tmp_path}/none.py:f") is None and hash_target("apa_cli.rewards.vader:compound") is not None
