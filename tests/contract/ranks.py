"""Runs on one rank, each of which ends by comparing the ranks; a module of its own, which spawned processes import."""

import hashlib
import json
from pathlib import Path

from torch import Tensor

from apa_cli.distributed.world import World
from apa_cli.runs.checkpoint import collect_tensors, split_state
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.settings import Config
from apa_cli.training import results
from apa_cli.training.build import build_trainer


def digest(tensors: dict[str, Tensor]) -> str:
    """Return a digest of the names and bits of tensors."""
    parts = [name.encode() + tensor.contiguous().numpy().tobytes() for name, tensor in sorted(tensors.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def train_and_compare(world: World, runs: list[tuple[Config, Path]]) -> None:
    """Train in each path, one after the other, and write ranks.json: a description of each rank's final state."""
    results.plot_curves = lambda directory: None  # takes longer than all the rest
    for config, path in runs:
        directory = RunDirectory(path)
        if world.is_main:
            directory.claim(config.raw)
        world.barrier()
        with Console(path / "run.log" if world.is_main else None, config.run.iterations, quiet=True) as console:
            trainer = build_trainer(config, path, None, None, console, world)
            trainer.train()
        state, tensors, pools = split_state(trainer.progress.algorithm)
        moments = trainer.updater.optimizer.state_dict()["state"]
        own = {
            "weights": digest(collect_tensors(trainer.models.model, trained_only=False)),
            "moments": digest({f"{i}.{name}": value for i, entry in moments.items() for name, value in entry.items()}),
            "state": json.dumps(state),
            "tensors": digest(tensors),
            "pools": {name: pool.rows(range(len(pool))) for name, pool in pools.items()},
            "kept": trainer.progress.kept.rows(range(len(trainer.progress.kept))),
        }
        ranks = world.all_gather(own)
        if world.is_main:
            (path / "ranks.json").write_text(json.dumps(ranks))
