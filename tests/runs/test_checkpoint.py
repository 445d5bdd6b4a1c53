"""Checkpoints: everything comes back, damage is named, only what was asked for stays."""

import json

import pytest
import torch
from torch import nn

from apa_cli.errors import UserError
from apa_cli.training.launch import checkpoint as checkpoints


class Tied(nn.Module):
    """Two names for one matrix, as a language model with tied embeddings has, and a buffer."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.rand(3))
        self.register_buffer("count", torch.tensor([float(seed)]))

    def forward(self, ids):
        return self.head(self.embedding(ids) * self.scale)


def trained(seed: int, steps: int):
    """A model after some steps of AdamW, and the optimizer."""
    model = Tied(seed)
    optimizer = torch.optim.AdamW(
        [{"params": [model.embedding.weight], "lr": 0.1}, {"params": [model.scale], "lr": 0.01}]
    )
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([step % 7, 1])).square().sum().backward()
        optimizer.step()
    return model, optimizer


def saved(folder, iteration, value=0.0):
    tensors = {"policy": {"weight": torch.full((2,), value)}, "algorithm": {}}
    return checkpoints.save(folder, iteration, tensors, {"iteration": iteration})


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model, _ = trained(0, 3)
    tensors = checkpoints.module_tensors(model)
    assert sorted(tensors) == ["count", "embedding.weight", "scale"]
    path = checkpoints.save(tmp_path, 1, {"policy": tensors}, {})
    other = Tied(1)
    checkpoints.load_module(other, checkpoints.load(path)[0]["policy"])
    assert other.head.weight is other.embedding.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.count.item() == 0.0  # buffers come back as well


def test_the_optimizer_goes_on_where_it_was(tmp_path):
    model, optimizer = trained(0, 3)
    tensors = {
        "policy": checkpoints.module_tensors(model),
        "optimizer": checkpoints.optimizer_tensors(optimizer),
    }
    path = checkpoints.save(tmp_path, 3, tensors, {})
    other, other_optimizer = trained(1, 1)
    loaded, _ = checkpoints.load(path)
    checkpoints.load_module(other, loaded["policy"])
    checkpoints.load_optimizer(other_optimizer, loaded["optimizer"])
    for network, stepper in ((model, optimizer), (other, other_optimizer)):
        stepper.zero_grad()
        network(torch.tensor([2, 5])).square().sum().backward()
        stepper.step()
    assert torch.equal(model.embedding.weight, other.embedding.weight)
    assert torch.equal(model.scale, other.scale)
    moments, other_moments = (checkpoints.optimizer_tensors(o) for o in (optimizer, other_optimizer))
    assert moments.keys() == other_moments.keys() and "0.exp_avg_sq" in moments
    assert all(torch.equal(moments[name], other_moments[name]) for name in moments)
    assert moments["0.step"] == 4


def test_another_models_tensors_are_refused():
    with pytest.raises(UserError, match="scale"):
        checkpoints.load_module(Tied(0), {"embedding.weight": torch.zeros(7, 3), "count": torch.zeros(1)})


def test_state_comes_back(tmp_path):
    state = {"iteration": 4, "best_reward": 0.1 + 0.2, "best_iteration": None, "algorithm": {"m": [1.5, 2]}}
    path = checkpoints.save(tmp_path, 4, {"algorithm": {"pool": torch.arange(3)}, "critics": {}}, state)
    tensors, loaded = checkpoints.load(path)
    assert loaded == state
    assert tensors["algorithm"]["pool"].tolist() == [0, 1, 2] and tensors["critics"] == {}
    assert path.name == "iteration_000004" and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["policy.safetensors", "state.json"])
def test_a_damaged_file_is_named(name, tmp_path):
    path = saved(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is missing or damaged"):
        checkpoints.load(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        checkpoints.load(path)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    path = saved(tmp_path, 1)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.load(path)


def test_a_save_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "digest", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"iteration_000002 cannot be written \(disk full\)"):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["iteration_000001"]


def test_saving_the_same_iteration_again_replaces_it(tmp_path):
    saved(tmp_path, 1, value=1.0)
    path = saved(tmp_path, 1, value=2.0)
    assert checkpoints.load(path)[0]["policy"]["weight"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("keep_last", "best", "left"),
    [(1, None, [5]), (2, None, [4, 5]), (2, 1, [1, 4, 5]), (2, 5, [4, 5]), (9, 2, [1, 2, 3, 4, 5])],
)
def test_the_last_and_the_best_are_kept(keep_last, best, left, tmp_path):
    for iteration in range(1, 6):
        saved(tmp_path, iteration)
    checkpoints.prune(tmp_path, keep_last, best)
    assert [int(path.name[-6:]) for path in checkpoints.all_in(tmp_path)] == left


def test_the_latest_checkpoint_of_a_run_is_found_or_the_one_that_is_named(tmp_path):
    run = tmp_path / "run"
    for iteration in (2, 10, 9):
        saved(run / "checkpoints", iteration)
    (run / "checkpoints" / ".iteration_000011.77").mkdir()
    named = [run / "checkpoints" / f"iteration_{iteration:06d}" for iteration in (2, 9, 10)]
    assert checkpoints.located(str(run)) == (run, named)
    assert checkpoints.located(str(named[0])) == (run, named[:1])
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.located(str(tmp_path))


def test_a_runs_checkpoints_are_pruned_as_it_was_asked(run_train, records):
    run = run_train("iterations=5", "evaluation.every=1", "checkpoint.keep_last=1", "optimizer.lr=1e-2")
    scores = {row["iteration"]: row["eval/reward_mean"] for row in records(run / "metrics.jsonl")}
    best = max(scores, key=lambda iteration: (scores[iteration], -iteration))
    names = {int(path.name[-6:]) for path in (run / "checkpoints").iterdir()}
    assert names == {best, 5} - {0}
    state = json.loads((run / "checkpoints" / "iteration_000005" / "state.json").read_text())
    assert state["best_iteration"] == best and state["best_reward"] == scores[best]


def test_without_keep_best_only_the_last_stay(run_train):
    run = run_train("iterations=3", "evaluation.every=1", "checkpoint.keep_last=2", "checkpoint.keep_best=false")
    assert sorted(path.name[-1] for path in (run / "checkpoints").iterdir()) == ["2", "3"]
