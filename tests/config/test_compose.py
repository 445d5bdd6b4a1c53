"""Composition: groups, base yamls, and model.path= that stands for model=local."""

import pytest

from apa_cli.config.compose import compose
from apa_cli.config.hydra_api import compose_unchecked, list_groups

TOY_LR, DEFAULT_LR = 3e-4, 1e-5


def test_groups_are_where_a_user_chooses():
    groups = list_groups(None)
    names = "algo critic dataset experiment guide lora model plan reward tracking"
    assert set(groups) == set(names.split())
    assert all(len(options) > 1 for options in groups.values())
    assert groups["algo"] >= {"apa", "ppo", "awr"}
    assert not [option for option in groups["algo"] if "_actor_critic" in option]  # a yaml that they start from


@pytest.mark.parametrize(
    ("overrides", "lr", "dtype"),
    [
        ([], TOY_LR, "float32"),
        (["model.path=FOLDER"], DEFAULT_LR, "float32"),
        (["model.path=FOLDER", "algo=ppo", "seed=1"], DEFAULT_LR, "float32"),
        (["model=local", "model.path=FOLDER"], DEFAULT_LR, "float32"),
        (["model=embedded", "model.path=FOLDER"], TOY_LR, "float32"),
        (["model.path=null"], TOY_LR, "float32"),
        (["experiment=stories_vader", "model.path=FOLDER"], 3e-5, "bfloat16"),
        (["experiment=paper/hh_125m_apa", "model.path=FOLDER"], 1e-6, "float32"),
        (["experiment=quickstart", "model.path=FOLDER"], DEFAULT_LR, "float32"),
    ],
)
def test_model_path_alone_means_a_local_model_and_not_the_toys_learning_rates(overrides, lr, dtype):
    cfg = compose(overrides)
    assert (cfg.optimizer.lr, cfg.model.dtype) == (lr, dtype)


def test_a_model_that_an_experiment_chooses_keeps_its_dimensions_under_another_path():
    cfg = compose(["experiment=paper/hh_1b_apa", "model.path=FOLDER"])
    assert cfg.model.path == "FOLDER" and cfg.model.architecture.hidden_size == 2048


def test_what_algorithms_share_stands_in_one_yaml():
    shared = compose_unchecked(["+algo=_actor_critic"], config_name=None).algo
    assert "lambda_" not in shared and shared.gae_lambda == 0.95
    for name in ("apa", "ppo", "awr"):
        assert set(shared) < set(compose([f"algo={name}"]).algo)
