"""GPU selection: concurrent runs in one process each claim different GPUs."""

import tempfile

import torch

from apa_cli.distributed import device
from apa_cli.distributed.world import SINGLE_PROCESS, World


def test_concurrent_runs_claim_different_gpus(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = make_config("launch.processes=1").launch
    claims = []
    for _ in range(3):  # a new dictionary stands for a new process
        monkeypatch.setattr(device, "GPU_LOCKS", locks := {})
        claims.append((device.claim_gpu(settings, SINGLE_PROCESS), locks))
    assert [index for index, _ in claims] == [0, 1, 0]  # with both locked, the third run shares GPU 0
    assert [len(locks) for _, locks in claims] == [1, 1, 0]
    monkeypatch.setattr(device, "GPU_LOCKS", claims[1][1])
    assert device.claim_gpu(settings, SINGLE_PROCESS) == 1  # the next job of a sweep in the second process


def test_with_several_processes_the_gpu_is_the_local_rank(make_config):
    assert device.claim_gpu(make_config("launch.processes=1").launch, World(3, 8, 2, None, 0.0)) == 2
