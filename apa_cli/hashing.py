"""Identity of a run's inputs by their content: rows of data, models, tokenizers, files and the user's code.

An input copied to another place keeps its identity; no digest depends on a path, an owner or a time. This module does
not import torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apa_cli.model_folder import ADAPTER_CONFIG, MODEL_FILES, is_adapter_folder
from apa_cli.types import Example

WHOLE_FILE_LIMIT = 2**30
"""Bytes up to which a file is read as a whole; of a larger one `SAMPLED_BLOCKS` are read."""
SAMPLED_BLOCKS, BLOCK_SIZE = 1024, 2**18
"""Number of blocks, evenly spaced from a large file's start to its end, and their size in bytes (256 MiB in all)."""

WEIGHTS = ("adapter_model*.safetensors", "adapter_model*.bin", "model*.safetensors", "pytorch_model*.bin", "*.bin")
"""Names of weight files; the files of the first pattern that matches are loaded."""
MODEL_CONFIGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
TOKENIZER_FILES = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken",
)  # fmt: skip
TEMPLATE_FILES = ("chat_template.*", "additional_chat_templates/*")
TEMPLATE = "chat_template"
NOT_CONTENT = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version")
"""Keys of a model's .json files that say where it was or who wrote it."""

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_large_file(file: Path) -> str:
    """Return the SHA-256 of a file, or above `WHOLE_FILE_LIMIT` of its size and of blocks spread evenly over it.

    The first block holds the header of a safetensors file, with each tensor's name, shape and place.
    """
    size = file.stat().st_size
    if size <= WHOLE_FILE_LIMIT:
        return hash_file(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        for number in range(SAMPLED_BLOCKS):
            handle.seek(number * (size - BLOCK_SIZE) // (SAMPLED_BLOCKS - 1))
            digest.update(handle.read(BLOCK_SIZE))
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of nested plain data; other objects count by their representation."""
    text = json.dumps(value, default=lambda entry: ADDRESS.sub("", repr(entry)), skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- data ---------------------------------------------------------------------------------------------------


def hash_examples(*splits: list[Example]) -> str:
    """Return a digest of all fields of every example, in order."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            fields = [row.prompt, row.chosen, row.rejected, row.columns, row.messages, row.response, row.score]
            digest.update(hash_json(fields).encode())
        digest.update(b"\0")
    return digest.hexdigest()


# --- models -------------------------------------------------------------------------------------------------


def hash_model(path: str) -> str | None:
    """Return a digest of a model's configuration and weights; None for a hub id that is not in the cache.

    An adapter's digest covers its base model. The tokenizer is apart, see `hash_tokenizer`.
    """
    folder = find_model_folder(path)
    if folder is None:
        return None
    files = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    parts: list[Any] = [[file.name, hash_large_file(file)] for file in [*files, *sorted(folder.glob("*.py"))]]
    parts += [[name, read_model_settings(folder / name)] for name in MODEL_CONFIGS if (folder / name).is_file()]
    base = find_adapter_base(folder)
    return hash_json([*parts, ["base", hash_model(base)]] if base else parts)


def hash_tokenizer(path: str) -> str | None:
    """Return a digest of a tokenizer without its chat template; None if there is none, or it is not in the cache."""
    folder = find_tokenizer_folder(path)
    if folder is None:
        return None
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
    settings = read_model_settings(folder / "tokenizer_config.json")
    if isinstance(settings, dict):
        settings.pop(TEMPLATE, None)
    return hash_json([[[file.name, hash_large_file(file)] for file in files], settings])


def hash_chat_template(path: str) -> str | None:
    """Return a digest of a tokenizer's chat templates; None if the tokenizer is not in the cache."""
    folder = find_tokenizer_folder(path)
    if folder is None:
        return None
    files = sorted({file for pattern in TEMPLATE_FILES for file in folder.glob(pattern) if file.is_file()})
    settings = read_model_settings(folder / "tokenizer_config.json")
    inside = settings.get(TEMPLATE) if isinstance(settings, dict) else None
    return hash_json([[[file.name, hash_file(file)] for file in files], inside])


def find_model_folder(path: str) -> Path | None:
    """Return a model's folder, or of a hub id its snapshot in the local cache; None if there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(path, name) for name in MODEL_FILES]
    except ValueError:  # not a name that a repository can have
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def find_tokenizer_folder(path: str) -> Path | None:
    """Return the folder with the tokenizer of a model; an adapter without a tokenizer has that of its base model."""
    folder = find_model_folder(path)
    if folder is not None and not (folder / "tokenizer_config.json").is_file() and (base := find_adapter_base(folder)):
        return find_tokenizer_folder(base)
    return folder


def find_adapter_base(folder: Path) -> str | None:
    """Return the base model that the adapter in a folder names; None if the folder holds no adapter."""
    if not is_adapter_folder(folder):
        return None
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return settings["base_model_name_or_path"] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_model_settings(file: Path) -> Any:
    """Return a .json file without the keys that are no content; the text if it cannot be parsed, None if missing."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    try:
        content = json.loads(text)
    except ValueError:
        return text
    return {k: content[k] for k in sorted(content) if k not in NOT_CONTENT} if isinstance(content, dict) else content


# --- files and code -----------------------------------------------------------------------------------------


def hash_path(path: str) -> str | None:
    """Return a digest of a model, of any other folder, or of a file; None if there is none, or it is not cached."""
    place = Path(path).expanduser()
    if place.is_file():
        return hash_large_file(place)
    if place.is_dir() and not any((place / name).is_file() for name in MODEL_FILES):
        files = sorted(file for file in place.rglob("*") if file.is_file())
        return hash_json([[str(file.relative_to(place)), hash_large_file(file)] for file in files])
    return hash_model(path)


def split_target(target: str) -> tuple[str, str]:
    """Return the file or module, and the name in it, of FILE.py:NAME, package.module:NAME or package.module.NAME."""
    source, _, name = target.rpartition(":" if ":" in target else ".")
    return source, name


def hash_target(target: str) -> str | None:
    """Return a digest of the file of FILE.py:NAME, package.module:NAME or package.module.NAME; None without a file.

    The digest covers the modules of the file's folder that it imports, at any depth.
    """
    source, _ = split_target(target)
    if source.endswith(".py"):
        return hash_source(Path(source).expanduser())
    module = sys.modules.get(source)
    try:
        spec = None if module else importlib.util.find_spec(source)
    except (ImportError, ValueError):
        return None
    origin = getattr(module, "__file__", None) if module else spec and spec.origin
    return hash_source(Path(origin)) if origin else None


def hash_source(file: Path) -> str | None:
    """Return a digest of a Python file and of the modules of its folder that it imports; None if there is no file."""
    if not file.is_file():
        return None
    files = {file: None, **dict.fromkeys(list_local_imports(file))}
    return hash_json(sorted([str(each.relative_to(file.parent)), hash_file(each)] for each in files))


def list_local_imports(file: Path) -> list[Path]:
    """Return the files of a Python file's folder that it imports, directly or through one another; not itself."""
    folder, found, queue = file.parent, dict[Path, None](), [file]
    while queue:
        for name in list_imported_names(queue.pop()):
            module = folder / f"{name}.py"
            files = [module] if module.is_file() else sorted((folder / name).rglob("*.py"))
            new = [each for each in files if each not in found and each != file]
            found |= dict.fromkeys(new)
            queue += new
    return list(found)


def list_imported_names(file: Path) -> Iterable[str]:
    """Return the first part of every module that a Python file imports; nothing for a file that cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (OSError, ValueError, SyntaxError):
        return []
    absolute = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    absolute += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    relative = [a.name for n in nodes if isinstance(n, ast.ImportFrom) and not n.module for a in n.names]
    names = {name.partition(".")[0] for name in [*absolute, *relative]}
    return sorted(name for name in names if name.isidentifier())
