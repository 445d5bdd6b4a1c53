"""Launchers: the rank of this process, read from the environment of torchrun or SLURM."""

import os

import pytest

from apa_cli.distributed.spawn import RankInfo, detect_launcher


@pytest.mark.parametrize(
    ("variables", "info"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, RankInfo(rank=3, size=4, local_rank=1)),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "MASTER_ADDR": "a"},
            RankInfo(rank=2, size=4, local_rank=0),
        ),
    ],
)
def test_the_rank_is_read_from_the_environment(variables, info, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert detect_launcher() == info
    if "SLURM_JOB_ID" in variables:
        assert os.environ["MASTER_PORT"] == "20007"  # 20000 + job 7
