"""Run directories written by hand."""

import json
from pathlib import Path

import pytest
import yaml

ALGORITHMS = {
    "apa": {"label": "APA", "color": "#1d5fa8", "lambda_meaning": "temperature and pull"},
    "awr": {"label": "AWR", "color": "#15803d", "lambda_meaning": "step size"},
    "ppo": {"label": "PPO", "color": "#c2410c", "lambda_meaning": "price of KL"},
}
"""What environment.json records of an algorithm, by the module of its class."""


@pytest.fixture
def write_run(tmp_path):
    """write_run(directory, metrics, algorithm=, lambda_=, seed=, environment=, **sections) → Path of a run.

    `environment` replaces the content of environment.json, which by default describes the algorithm; None: no file.
    """

    def write(
        directory: str, metrics: list[dict], algorithm="apa", lambda_=0.1, seed=0, environment=..., **sections
    ) -> Path:
        path = tmp_path / directory
        path.mkdir(parents=True)
        facts = ALGORITHMS[algorithm]
        lambda_key = "kl_coef" if algorithm == "ppo" else "lambda_"
        algo = {
            "_target_": f"apa_cli.algorithms.{algorithm}.{facts['label']}",
            lambda_key: lambda_,
            "gamma": 1.0,
        }
        config = {"name": path.name, "seed": seed, "lambda": lambda_, "algo": algo, "optimizer": {"lr": 3e-4}}
        (path / "config.yaml").write_text(yaml.safe_dump(config | sections, sort_keys=False), encoding="utf-8")
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8")
        if environment is ...:
            environment = {"algorithm": facts}
        if environment is not None:
            (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        return path

    return write


@pytest.fixture
def history():
    """history(final_reward, final_kl) → metrics: the SFT model's evaluation (0.2), two iterations, an evaluation."""

    def make(reward: float, kl: float, **last) -> list[dict]:
        times = {"time/rollout_s": 30.0, "time/score_s": 10.0, "time/update_s": 20.0}
        start = {"eval/reward_mean": 0.2, "eval/reward_ci": 0.05, "eval/kl_exact": 0.0}
        end = {"eval/reward_mean": reward, "eval/reward_ci": 0.05, "eval/kl_exact": kl}
        training = {
            "reward/mean": (0.2 + reward) / 2,
            "kl/sequence": kl / 2,
            "response/eos_rate": 0.5,
        } | times
        final = {"reward/mean": reward, "kl/sequence": kl, "response/eos_rate": 0.75} | times | end
        return [
            {"iteration": 0, "samples": 0} | start,
            {"iteration": 1, "samples": 64} | training,
            {"iteration": 2, "samples": 128} | final | last,
        ]

    return make
