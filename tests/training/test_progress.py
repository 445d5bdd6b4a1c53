"""Training state in checkpoints: nested states of an algorithm, pools, Polyak copies, and checkpoints without them."""

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from apa_cli.errors import UserError
from apa_cli.models.critic import CriticModule
from apa_cli.models.forward import TrainingModel
from apa_cli.pool import Pool
from apa_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from apa_cli.runs.directory import RunDirectory
from apa_cli.training.progress import Progress, check_state, collect_state, restore_state, save_pools
from apa_cli.types import Critic
from tests.builders import build_tiny_policy


def build_model(seed: int, with_copies: bool = False) -> TrainingModel:
    """Return a policy with two critics on its trunk, of which "q" may have a Polyak copy; all weights are random."""
    policy = build_tiny_policy(seed=seed)
    critics = {name: CriticModule(None, nn.Linear(policy.config.hidden_size, 1)) for name in ("value", "q")}
    model = TrainingModel(policy, critics, 1.0, [Critic("q", polyak=0.1)] if with_copies else [])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def build_optimizer(model: TrainingModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])


def save(directory: RunDirectory, progress: Progress, model: TrainingModel):
    """Save a checkpoint as a run does, and return its path."""
    tensors, values = collect_state(progress, model, build_optimizer(model), None)
    save_pools(progress, directory.pools)
    return save_checkpoint(directory.checkpoints, progress.iteration, tensors, values)


def restore(checkpoint, initial: dict | None = None, model: TrainingModel | None = None) -> Progress:
    """Return the progress of a checkpoint, restored into `model` or a new one."""
    model = model or build_model(1)
    pools = RunDirectory(checkpoint.parent.parent).pools
    return restore_state(*load_checkpoint(checkpoint), initial or {}, model, build_optimizer(model), None, pools)


def make_pool(*numbers: int) -> Pool:
    pool = Pool()
    pool.append([{"n": number} for number in numbers])
    return pool


def read_numbers(pool: Pool) -> list[int]:
    return [row["n"] for row in pool.rows(range(pool.length))]


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_nested_state_returns_bit_for_bit(tmp_path):
    """Some tensors share memory or are not contiguous, both of which safetensors refuses."""
    base = torch.randn(3, 4)
    tensors = [
        base,
        base.T,
        base[:, 1:3],
        torch.randn(5).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor(2**62 + 1),
        torch.zeros(0, 3),
        torch.zeros(1).expand(4),
        torch.tensor([math.nan, -0.0, 1e-45]),
        torch.ones(2, requires_grad=True),
    ]
    state = {"top": base, "nested": {"list": [{"t": tensor} for tensor in tensors], "x": 0.1 + 0.2, "m": (1.5, 2)}}
    found = restore(save(RunDirectory(tmp_path), Progress(3, 24, algorithm=state), build_model(0)))
    assert (found.iteration, found.samples) == (3, 24) and found.algorithm.keys() == {"top", "nested"}
    assert found.algorithm["nested"]["x"] == 0.30000000000000004 and found.algorithm["nested"]["m"] == [1.5, 2]
    assert_same_bits(found.algorithm["top"], base)
    for entry, tensor in zip(found.algorithm["nested"]["list"], tensors, strict=True):
        assert_same_bits(entry["t"], tensor)
    assert math.copysign(1, found.algorithm["nested"]["list"][8]["t"][1]) == -1


def test_pools_and_counts_return(tmp_path):
    directory = RunDirectory(tmp_path)
    progress = Progress(2, algorithm={"hindsight": {"pool": make_pool(1, 2)}}, optimizer_steps=6, kept=make_pool(5))
    checkpoint = save(directory, progress, build_model(0))
    names = {str(path.relative_to(directory.pools)) for path in directory.pools.rglob("*.jsonl")}
    assert names == {"hindsight/pool.jsonl", "kept.jsonl"}
    found = restore(checkpoint)
    assert found.optimizer_steps == 6
    assert read_numbers(found.algorithm["hindsight"]["pool"]) == [1, 2] and read_numbers(found.kept) == [5]


def test_a_run_without_pools_has_no_files_of_pools(tmp_path):
    checkpoint = save(RunDirectory(tmp_path), Progress(1, algorithm={"pool": Pool()}), build_model(0))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    found = restore(checkpoint)
    assert found.kept.length == found.algorithm["pool"].length == 0


def test_a_resume_from_an_earlier_checkpoint_cuts_the_pool_back(tmp_path):
    """Rows 3 and 4 were added after checkpoint 1; the run that continues from it adds 30 instead."""
    directory, model = RunDirectory(tmp_path), build_model(0)
    progress = Progress(1, algorithm={"pool": make_pool(1, 2)})
    first = save(directory, progress, model)
    progress.iteration = 2
    progress.algorithm["pool"].append([{"n": 3}, {"n": 4}])
    second = save(directory, progress, model)
    assert read_numbers(restore(second).algorithm["pool"]) == [1, 2, 3, 4]
    resumed = restore(first)
    resumed.iteration = 2
    resumed.algorithm["pool"].append([{"n": 30}])
    assert read_numbers(restore(save(directory, resumed, model)).algorithm["pool"]) == [1, 2, 30]
    assert (directory.pools / "pool.jsonl").read_text() == '{"n": 1}\n{"n": 2}\n{"n": 30}\n'


def test_a_fork_has_its_own_pool_and_the_new_algorithms_entries(tmp_path):
    source, fork = RunDirectory(tmp_path / "source"), RunDirectory(tmp_path / "fork")
    model = build_model(0)
    checkpoint = save(source, Progress(1, algorithm={"pool": make_pool(1, 2), "x": 1.0}), model)
    initial = {"pool": Pool(), "x": 0.0, "nested": {"y": torch.tensor([4.0])}, "other": make_pool(8)}
    progress = restore(checkpoint, initial)
    assert progress.algorithm["x"] == 1.0 and progress.algorithm["nested"] == {"y": torch.tensor([4.0])}
    progress.algorithm["pool"].append([{"n": 9}])
    found = restore(save(fork, progress, model)).algorithm
    assert read_numbers(found["pool"]) == [1, 2, 9] and read_numbers(found["other"]) == [8]
    assert (source.pools / "pool.jsonl").read_text() == '{"n": 1}\n{"n": 2}\n'


def test_a_pool_with_a_damaged_row_is_one_line(tmp_path):
    checkpoint = save(RunDirectory(tmp_path), Progress(1, algorithm={"pool": make_pool(1, 2)}), build_model(0))
    (tmp_path / "pools" / "pool.jsonl").write_text('{"n": 1}\n{"n"')
    with pytest.raises(UserError, match=r"pools/pool.jsonl, line 2: missing or damaged.*earlier checkpoint$"):
        restore(checkpoint)


def test_a_checkpoint_from_before_nested_states_loads(tmp_path):
    """It has tensors of the state in algorithm.safetensors alone, no `kept`, no `optimizer_steps` and no copies."""
    tensors, values = collect_state(Progress(4), build_model(0), build_optimizer(build_model(0)), None)
    values = {name: value for name, value in values.items() if name not in ("kept", "optimizer_steps")}
    values["algorithm"] = {"score_moments": [3, 0.5, 1.5]}
    tensors["algorithm"] = {"table": torch.tensor([1, 2])}
    path = save_checkpoint(tmp_path / "checkpoints", 4, tensors, json.loads(json.dumps(values)))
    found = restore(path, {"score_moments": [0, 0.0, 0.0], "table": torch.zeros(2), "kl_coef": 0.1})
    assert found.algorithm.pop("table").tolist() == [1, 2]
    assert found.algorithm == {"score_moments": [3, 0.5, 1.5], "kl_coef": 0.1}
    assert found.iteration == 4 and found.optimizer_steps == 0 and found.kept.length == 0


def test_polyak_copies_return(tmp_path):
    model, other = build_model(0, with_copies=True), build_model(1, with_copies=True)
    restore(save(RunDirectory(tmp_path), Progress(1), model), model=other)
    for name, tensor in model.state_dict().items():
        assert_same_bits(other.state_dict()[name], tensor)
    assert not torch.equal(other.targets["q"].head.weight, other.critics["q"].head.weight)


def test_polyak_copies_that_a_checkpoint_lacks_start_from_its_critics(tmp_path):
    other = build_model(1, with_copies=True)
    model = build_model(0)
    restore(save(RunDirectory(tmp_path), Progress(1), model), model=other)
    assert other.targets.keys() == {"q"}
    for name, tensor in other.targets["q"].state_dict().items():
        assert_same_bits(tensor, model.critics["q"].state_dict()[name])


def test_polyak_copies_that_a_fork_does_not_have_are_left_out(tmp_path):
    model, other = build_model(0, with_copies=True), build_model(1)
    restore(save(RunDirectory(tmp_path), Progress(1), model), model=other)
    for name, tensor in other.state_dict().items():
        assert_same_bits(tensor, model.state_dict()[name])


def test_a_state_that_cannot_be_saved_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match=r"^state kept: the trainer has a pool of this name"):
        check_state({"kept": Pool()})
    check_state({"kept": 1, "a": {"kept": Pool()}})
    model = build_model(0)
    with pytest.raises(ValueError, match=r"^state a/b: a checkpoint cannot hold a set"):
        collect_state(Progress(algorithm={"a": {"b": set()}}), model, build_optimizer(model), None)
    with pytest.raises(ValueError, match=r"^state kept: "):
        collect_state(Progress(algorithm={"kept": Pool()}), model, build_optimizer(model), None)


def test_a_fork_with_other_critics_keeps_the_policy_and_starts_the_critics_anew(tmp_path):
    """The policy's weights and moments return; the critics keep theirs, and have no moments."""
    source = build_model(0)
    optimizer = build_optimizer(source)
    for parameter in source.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors, values = collect_state(Progress(1), source, optimizer, None)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 1, tensors, values)
    model = TrainingModel(build_tiny_policy(seed=5), {"other": CriticModule(None, nn.Linear(16, 1))}, 1.0)
    critic = {name: tensor.clone() for name, tensor in model.critics.state_dict().items()}
    forked = build_optimizer(model)
    restore_state(*load_checkpoint(checkpoint), {}, model, forked, None, tmp_path / "pools")
    for name, tensor in source.policy.state_dict().items():
        assert_same_bits(model.policy.state_dict()[name], tensor)
    for name, tensor in critic.items():
        assert_same_bits(model.critics.state_dict()[name], tensor)
    for old, new in zip(source.policy_parameters(), model.policy_parameters(), strict=True):
        assert_same_bits(forked.state[new]["exp_avg"], optimizer.state[old]["exp_avg"])
    assert not any(parameter in forked.state for parameter in model.critic_parameters())
