"""Checkpoints: safetensors and JSON with a manifest of checksums, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apa_cli.errors import UserError, get_first_line
from apa_cli.file_modes import apply_umask
from apa_cli.hashing import hash_file
from apa_cli.models.sharding import distribute_like, gather_full_tensor, get_storage_key
from apa_cli.pool import Pool
from apa_cli.runs.files import CHECKPOINT_NAME, CHECKPOINT_PATTERN, POOLS, STATE, list_checkpoints, read_state
from apa_cli.types import State

MANIFEST = "manifest.json"
"""File of a checkpoint that maps the name of each other file to its SHA-256."""

TENSOR, POOL, LENGTH = "__tensor__", "__pool__", "length"
"""Keys of the objects in state.json that stand for a tensor, by its name, and a pool, by its name and length."""

WRITE_ERRORS = (OSError, SafetensorError)
"""Errors of a full disk, a missing permission and the like."""

# --- tensors of modules and optimizers ----------------------------------------------------------------------


def collect_tensors(module: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """Return a module's parameters and persistent buffers by name; sharded tensors are not gathered.

    Tensors that share memory are returned under the first of their names only. `trained_only` leaves out frozen
    parameters, which stay as they were loaded.
    """
    frozen = {get_storage_key(p) for p in module.parameters() if not p.requires_grad} if trained_only else set()
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if get_storage_key(tensor) in frozen:
            continue
        if get_storage_key(tensor) not in seen or tensor.numel() == 0:
            seen.add(get_storage_key(tensor))
            tensors[name] = tensor.detach()
    return tensors


def gather_module_tensors(module: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """Return `collect_tensors` with sharded tensors gathered; every rank must call this."""
    tensors = collect_tensors(module, trained_only)
    return {name: gather_full_tensor(tensor).contiguous() for name, tensor in tensors.items()}


def load_module(module: nn.Module, tensors: dict[str, Tensor], trained_only: bool = False) -> None:
    """Copy saved tensors into a module of the same shape. Raise UserError if the names differ."""
    targets = collect_tensors(module, trained_only)
    if targets.keys() != tensors.keys():
        differing = sorted(targets.keys() ^ tensors.keys())[:3]
        raise UserError(f"resume: the checkpoint's tensors differ from the model's: {differing}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(distribute_like(tensors[name], target))


def gather_optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return every tensor of an optimizer's state under `index.name`, gathered; every rank must call this."""
    return {
        f"{index}.{name}": gather_full_tensor(value).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `gather_optimizer_tensors` returned into an optimizer of the same parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = distribute_like(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# --- nested state -------------------------------------------------------------------------------------------


def split_state(state: State) -> tuple[State, dict[str, Tensor], dict[str, Pool]]:
    """Return an algorithm's state as JSON data, and its tensors and pools, for which that data has markers.

    Tensors and pools are named by their path in the state, such as "hindsight/pool". Raise ValueError naming the path
    of an entry that a checkpoint cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    pools: dict[str, Pool] = {}

    def split(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if path in tensors:
                raise ValueError(f"state {path}: two tensors have this path; leave / out of the keys")
            tensors[path] = value
            return {TENSOR: path}
        if isinstance(value, Pool):
            if path in pools or any(value is pool for pool in pools.values()):
                raise ValueError(f"state {path}: the state has two pools of this path, or this pool twice")
            if {"", ".", ".."} & set(path.split("/")):
                raise ValueError(f"state {path}: a pool's path names its file and cannot be empty or have . or ..")
            pools[path] = value
            return {POOL: path, LENGTH: value.length}
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or key in (TENSOR, POOL):
                    raise ValueError(f"state {path}: key {key!r} is not a string, or is reserved; give another key")
            return {key: split(entry, f"{path}/{key}" if path else key) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [split(entry, f"{path}/{index}") for index, entry in enumerate(value)]
        if value is None or isinstance(value, str | int | float):
            return value
        raise ValueError(f"state {path}: a checkpoint cannot hold a {type(value).__name__}; see apa_cli.types.State")

    return split(state, ""), tensors, pools


def join_state(values: Any, tensors: dict[str, Tensor], folder: Path) -> Any:
    """Return what `split_state` split, or a part of it; its pools are read from `folder`.

    Tensors return on the CPU, tuples as lists. Raise UserError if a pool's file lacks rows.
    """
    if isinstance(values, list):
        return [join_state(entry, tensors, folder) for entry in values]
    if not isinstance(values, dict):
        return values
    if TENSOR in values:
        return tensors[values[TENSOR]]
    if POOL in values:
        return Pool.read(get_pool_file(folder, values[POOL]), values[LENGTH])
    return {key: join_state(entry, tensors, folder) for key, entry in values.items()}


def get_pool_file(folder: Path, name: str) -> Path:
    """Return the file of a pool in a run's folder of pools."""
    return folder / f"{name}.jsonl"


# --- one checkpoint -----------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, iteration: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `folder`/iteration_NNNNNN with one safetensors file per entry of `tensors`, and state.json.

    Every file is on disk, with a manifest of checksums, before the checkpoint gets its name. Raise UserError if the
    checkpoint cannot be written; earlier checkpoints are left intact.
    """
    target = folder / CHECKPOINT_NAME.format(iteration)
    temporary = folder / f".{target.name}.{os.getpid()}"
    remove_incomplete(folder)
    try:
        temporary.mkdir(parents=True)
        write_files(temporary, tensors, state)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        fsync_path(folder)
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{target}: cannot be written ({describe_write_error(error)}); earlier checkpoints are intact"
        ) from error
    return target


def write_files(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write all files of a checkpoint and flush them to disk."""
    for name, group in tensors.items():
        save_file(group, folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps(state))
    apply_umask(folder)
    files = sorted(folder.iterdir())
    manifest = {file.name: hash_file(file) for file in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, folder / MANIFEST, folder]:
        fsync_path(path)


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors and the state that `save_checkpoint` wrote. Raise UserError naming a damaged file."""
    names = [name for name in verify_checkpoint(checkpoint) if name.endswith(".safetensors")]
    tensors = {name.removesuffix(".safetensors"): load_file(checkpoint / name) for name in names}
    return tensors, read_state(checkpoint)


def verify_checkpoint(checkpoint: Path) -> list[str]:
    """Return the names of a checkpoint's files. Raise UserError if a file is missing or differs from its checksum."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = {checkpoint / name: checksum for name, checksum in manifest.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"resume: {checkpoint} is not a checkpoint (no readable {MANIFEST})") from error
    for file, checksum in files.items():
        if not file.is_file() or hash_file(file) != checksum:
            raise UserError(f"resume: {file} is missing or damaged")
    return list(manifest)


def read_pools(checkpoint: Path) -> dict[str, Pool]:
    """Return the pools of which a checkpoint stores the length. Raise UserError if a pool's file lacks rows."""

    def find(values: Any) -> Iterator[tuple[str, int]]:
        if isinstance(values, dict) and POOL in values:
            yield values[POOL], values[LENGTH]
        elif isinstance(values, dict | list):
            for entry in values.values() if isinstance(values, dict) else values:
                yield from find(entry)

    folder = checkpoint.parent.parent / POOLS
    return {name: Pool.read(get_pool_file(folder, name), length) for name, length in find(read_state(checkpoint))}


def parse_iteration(checkpoint: Path) -> int:
    """Return the iteration in a checkpoint's name."""
    return int(checkpoint.name.rpartition("_")[2])


def fsync_path(path: Path) -> None:
    """Flush the content of a file, or the list of names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_write_error(error: Exception) -> str:
    """Return the operating system's message, or the first line of another error."""
    return getattr(error, "strerror", None) or get_first_line(error)


# --- the checkpoints of a run -------------------------------------------------------------------------------


def locate_checkpoints(resume: str) -> tuple[Path, list[Path]]:
    """Return the run directory that `resume=PATH` names and its checkpoints, oldest first.

    If PATH is a checkpoint, it is the only one returned. Raise UserError if there is none.
    """
    path = Path(resume).expanduser()
    if CHECKPOINT_PATTERN.match(path.name) and path.is_dir():
        return path.parent.parent, [path]
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise UserError(f"resume: there is no checkpoint in {path}")
    return path, checkpoints


def select_latest_intact(
    checkpoints: list[Path], say: Callable[[str], None], check: Callable[[Path], None] = lambda checkpoint: None
) -> Path:
    """Return the latest intact checkpoint, and report each damaged later one. Raise UserError if all are damaged.

    `check(checkpoint)` raises UserError for what is damaged besides the checkpoint's own files, such as its pools.
    """
    for number, path in enumerate(reversed(checkpoints), 1):
        try:
            verify_checkpoint(path)
            check(path)
        except UserError as error:
            if number == len(checkpoints):
                raise
            say(f"{error}; the checkpoint before it is used")
        else:
            return path
    raise UserError("resume: there is no checkpoint")


def prune_checkpoints(folder: Path, keep_last: int, best: int | None) -> None:
    """Delete all checkpoints except the last `keep_last` and the checkpoint of iteration `best`."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if best is None or path.name != CHECKPOINT_NAME.format(best):
            shutil.rmtree(path)


def remove_later_checkpoints(folder: Path, iteration: int) -> None:
    """Delete the checkpoints after `iteration`, from which the run continues differently."""
    for path in list_checkpoints(folder):
        if path.name > CHECKPOINT_NAME.format(iteration):
            shutil.rmtree(path)
    remove_incomplete(folder)


def remove_incomplete(folder: Path) -> None:
    """Delete the temporary folders that interrupted saves have left; no other process may be saving in `folder`."""
    for path in folder.glob(".iteration_*"):
        shutil.rmtree(path, ignore_errors=True)
