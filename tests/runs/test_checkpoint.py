"""Checkpoints: saved and restored tensors and state, nested states, damaged files, pruning."""

import json
import re

import pytest
import torch
from torch import nn

from apa_cli.errors import UserError
from apa_cli.pool import Pool
from apa_cli.runs import checkpoint as checkpoints


class Tied(nn.Module):
    """Model with two names for one matrix, as with tied embeddings, and a buffer."""

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


def train_model(seed: int, steps: int):
    """Return a model after some steps of AdamW, and its optimizer."""
    model = Tied(seed)
    optimizer = torch.optim.AdamW(
        [{"params": [model.embedding.weight], "lr": 0.1}, {"params": [model.scale], "lr": 0.01}]
    )
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([step % 7, 1])).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save_one(folder, iteration, value=0.0):
    """Save a checkpoint of one tensor of two equal values."""
    tensors = {"policy": {"weight": torch.full((2,), value)}, "algorithm": {}}
    return checkpoints.save_checkpoint(folder, iteration, tensors, {"iteration": iteration})


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model, _ = train_model(0, 3)
    tensors = checkpoints.gather_module_tensors(model)
    assert sorted(tensors) == ["count", "embedding.weight", "scale"]
    path = checkpoints.save_checkpoint(tmp_path, 1, {"policy": tensors}, {})
    other = Tied(1)
    checkpoints.load_module(other, checkpoints.load_checkpoint(path)[0]["policy"])
    assert other.head.weight is other.embedding.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.count.item() == 0.0  # buffers are restored as well


def test_optimizer_state_is_restored(tmp_path):
    model, optimizer = train_model(0, 3)
    tensors = {
        "policy": checkpoints.gather_module_tensors(model),
        "optimizer": checkpoints.gather_optimizer_tensors(optimizer),
    }
    path = checkpoints.save_checkpoint(tmp_path, 3, tensors, {})
    other, other_optimizer = train_model(1, 1)
    loaded, _ = checkpoints.load_checkpoint(path)
    checkpoints.load_module(other, loaded["policy"])
    checkpoints.load_optimizer(other_optimizer, loaded["optimizer"])
    for network, stepper in ((model, optimizer), (other, other_optimizer)):
        stepper.zero_grad()
        network(torch.tensor([2, 5])).square().sum().backward()
        stepper.step()
    assert torch.equal(model.embedding.weight, other.embedding.weight)
    assert torch.equal(model.scale, other.scale)
    moments, other_moments = (checkpoints.gather_optimizer_tensors(o) for o in (optimizer, other_optimizer))
    assert moments.keys() == other_moments.keys() and "0.exp_avg_sq" in moments
    assert all(torch.equal(moments[name], other_moments[name]) for name in moments)
    assert moments["0.step"] == 4


def test_tensors_of_another_model_are_refused():
    with pytest.raises(UserError, match="scale"):
        checkpoints.load_module(Tied(0), {"embedding.weight": torch.zeros(7, 3), "count": torch.zeros(1)})


def test_state_is_restored(tmp_path):
    state = {"iteration": 4, "best_reward": 0.1 + 0.2, "best_iteration": None, "algorithm": {"m": [1.5, 2]}}
    path = checkpoints.save_checkpoint(tmp_path, 4, {"algorithm": {"pool": torch.arange(3)}, "critics": {}}, state)
    tensors, loaded = checkpoints.load_checkpoint(path)
    assert loaded == state
    assert tensors["algorithm"]["pool"].tolist() == [0, 1, 2] and tensors["critics"] == {}
    assert path.name == "iteration_000004" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_nested_state_has_its_tensors_and_pools_named_by_path(tmp_path):
    pool, weight = Pool(), torch.tensor([1.5])
    pool.append([{"n": 7}])
    state = {"a": {"items": [{"w": weight}, (1, 2.5)], "pool": pool}, "flag": True, "none": None, "empty": {}}
    values, tensors, pools = checkpoints.split_state(state)
    assert values == {
        "a": {
            "items": [{"w": {"__tensor__": "a/items/0/w"}}, [1, 2.5]],
            "pool": {"__pool__": "a/pool", "length": 1},
        },
        "flag": True,
        "none": None,
        "empty": {},
    }
    assert tensors == {"a/items/0/w": weight} and pools == {"a/pool": pool}
    pool.save(checkpoints.get_pool_file(tmp_path, "a/pool"))
    assert (tmp_path / "a" / "pool.jsonl").read_text() == '{"n": 7}\n'
    joined = checkpoints.join_state(json.loads(json.dumps(values)), tensors, tmp_path)
    assert joined["a"].pop("pool").rows([0]) == [{"n": 7}]
    assert joined == {"a": {"items": [{"w": weight}, [1, 2.5]]}, "flag": True, "none": None, "empty": {}}


SHARED_POOL = Pool()


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {"b": [0, {1, 2}]}}, "a/b/1"),
        ({"a": {1: 2.0}}, "a"),
        ({"a": [{"__tensor__": 1}]}, "a/0"),
        ({"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}, "a/b"),
        ({"a": {"b": Pool()}, "a/b": Pool()}, "a/b"),
        ({"a": SHARED_POOL, "b": SHARED_POOL}, "b"),
        ({"..": {"a": Pool()}}, "../a"),
        ({"/a": Pool()}, "/a"),
        ({"a": torch.Generator()}, "a"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named_by_its_path(state, path):
    with pytest.raises(ValueError, match=rf"^state {re.escape(path)}: "):
        checkpoints.split_state(state)


@pytest.mark.parametrize("name", ["policy.safetensors", "state.json"])
def test_damaged_file_is_named_in_the_error(name, tmp_path):
    path = save_one(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is missing or damaged"):
        checkpoints.load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        checkpoints.load_checkpoint(path)


def test_folder_without_manifest_is_not_a_checkpoint(tmp_path):
    path = save_one(tmp_path, 1)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.load_checkpoint(path)


def test_failed_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    save_one(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "hash_file", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"iteration_000002: cannot be written \(disk full\)"):
        save_one(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["iteration_000001"]


def test_saving_an_iteration_again_replaces_its_checkpoint(tmp_path):
    save_one(tmp_path, 1, value=1.0)
    path = save_one(tmp_path, 1, value=2.0)
    assert checkpoints.load_checkpoint(path)[0]["policy"]["weight"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [(1, None, [5]), (2, None, [4, 5]), (2, 1, [1, 4, 5]), (2, 5, [4, 5]), (9, 2, [1, 2, 3, 4, 5])],
)
def test_prune_keeps_the_last_and_the_best(keep_last, best, kept, tmp_path):
    for iteration in range(1, 6):
        save_one(tmp_path, iteration)
    checkpoints.prune_checkpoints(tmp_path, keep_last, best)
    assert [int(path.name[-6:]) for path in checkpoints.list_checkpoints(tmp_path)] == kept


def test_find_checkpoints_of_a_run_or_a_single_one(tmp_path):
    run = tmp_path / "run"
    for iteration in (2, 10, 9):
        save_one(run / "checkpoints", iteration)
    (run / "checkpoints" / ".iteration_000011.77").mkdir()
    paths = [run / "checkpoints" / f"iteration_{iteration:06d}" for iteration in (2, 9, 10)]
    assert checkpoints.locate_checkpoints(str(run)) == (run, paths)
    assert checkpoints.locate_checkpoints(str(paths[0])) == (run, paths[:1])
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.locate_checkpoints(str(tmp_path))


def test_run_prunes_checkpoints_as_configured(run_train, records):
    run = run_train("iterations=5", "evaluation.every=1", "checkpoint.keep_last=1", "optimizer.lr=1e-2")
    scores = {row["iteration"]: row["eval/reward_mean"] for row in records(run / "metrics.jsonl")}
    best = max(scores, key=lambda iteration: (scores[iteration], -iteration))
    names = {int(path.name[-6:]) for path in (run / "checkpoints").iterdir()}
    assert names == {best, 5} - {0}
    state = json.loads((run / "checkpoints" / "iteration_000005" / "state.json").read_text())
    assert state["best_iteration"] == best and state["best_reward"] == scores[best]


def test_without_keep_best_only_the_last_checkpoints_stay(run_train):
    run = run_train("iterations=3", "evaluation.every=1", "checkpoint.keep_last=2", "checkpoint.keep_best=false")
    assert sorted(path.name[-1] for path in (run / "checkpoints").iterdir()) == ["2", "3"]
