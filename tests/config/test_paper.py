"""The paper's nine runs on HH have the published settings: the table of ALGORITHMS.md, section 7, written out again."""

from dataclasses import dataclass
from functools import cache

import pytest

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose


@dataclass(frozen=True)
class Column:
    """What depends on the algorithm and the size of the model."""

    policy: str
    lr: float
    minibatch: int
    rollout_batch_size: int
    sampling_chunk: int
    responses: int
    """In all; where 20,000 steps are no whole number of iterations, the last one is finished."""


SMALL, MIDDLE, LARGE = "Dahoas/pythia-125M-static-sft", "Dahoas/pythia-1B-static-sft", "Dahoas/pythia-6B-static-sft"

TABLE = {
    "125m_apa": Column(SMALL, 1e-6, 8, 128, 16, 80_000),
    "1b_apa": Column(MIDDLE, 1e-6, 2, 64, 4, 20_000),
    "6b_apa": Column(LARGE, 1e-6, 1, 64, 1, 10_000),
    "125m_awr": Column(SMALL, 1e-6, 8, 128, 16, 80_000),
    "1b_awr": Column(MIDDLE, 1e-6, 2, 64, 4, 20_000),
    "6b_awr": Column(LARGE, 1e-6, 1, 64, 1, 10_000),
    "125m_ppo": Column(SMALL, 8e-6, 8, 128, 16, 80_000),
    "1b_ppo": Column(MIDDLE, 1e-6, 2, 64, 4, 20_000),
    "6b_ppo": Column(LARGE, 8e-6, 2, 64, 1, 20_000),
}

nine = pytest.mark.parametrize("name", TABLE)


@cache
def experiment(name: str):
    return build_config(compose([f"experiment=paper/hh_{name}"]))


@nine
def test_what_depends_on_the_size(name):
    config, column = experiment(name), TABLE[name]
    run = config.run
    assert config.model.path == column.policy
    assert (config.optimizer.lr, config.optimizer.critic_lr) == (column.lr, column.lr)
    assert (run.minibatch_size, run.rollout_batch_size) == (column.minibatch, column.rollout_batch_size)
    assert config.sampling.microbatch_size == column.sampling_chunk
    # 20,000 optimizer steps, two of them on each minibatch, and no iteration more than they need
    assert 2 * column.responses / column.minibatch == 20_000
    assert 0 <= run.iterations * run.rollout_batch_size - column.responses < run.rollout_batch_size


@nine
def test_what_depends_on_the_algorithm(name):
    config = experiment(name)
    algo, kind = config.algo, name.split("_")[1]
    assert type(algo).__name__.lower() == kind
    if kind == "ppo":
        assert (algo.kl_coef, algo.kl_controller.value, algo.kl_target) == (0.05, "adaptive", 6)
        assert (algo.kl_horizon, algo.clip_range, algo.value_clip_range) == (10_000, 0.2, 0.2)
        assert (algo.score_clip, config.sampling.top_k) == (10, 0)
        assert config.critic.kind.value == "head"  # on the policy's trunk; APA and AWR have a network of their own
        return
    assert algo.lambda_ == {"apa": 0.1, "awr": 2.0}[kind]
    assert (algo.score_clip, config.sampling.top_k, algo.value_clip_range) == (100, 50, None)
    assert config.critic.kind.value == "separate"
    if kind == "apa":
        assert algo.normalizer.value == "none"
    else:
        assert algo.weight_clip is None


@nine
def test_what_all_have_in_common(name):
    config = experiment(name)
    algo, optimizer, sampling, run = config.algo, config.optimizer, config.sampling, config.run
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ([0.9, 0.95], 1e-8, 1e-6)
    assert (optimizer.lr_scheduler.value, optimizer.warmup_ratio, optimizer.max_grad_norm) == ("constant", 0, 1.0)
    assert optimizer.critic_warmup_iterations == 0
    assert (run.update_epochs, run.update_order.value, run.samples_per_prompt) == (2, "consecutive", 1)
    assert (algo.gamma, algo.gae_lambda, algo.value_coef, algo.advantage_estimator.value) == (1, 0.95, 1, "gae")
    assert (algo.score_scaling.value, algo.whitening.value) == ("running", "minibatch")
    assert (sampling.max_prompt_tokens, sampling.max_new_tokens) == (872, 128)
    assert (sampling.temperature, sampling.top_p) == (1, 1)
    assert sampling.stop_strings == ["Human:", "human:", "Assistant:", "assistant:"]
    assert (config.model.trainable_layers, config.lora.rank, config.reference.refresh_every) == (2, 0, 0)
    assert (config.critic.head.value, config.critic.init.value) == ("mlp", "policy")
    assert config.evaluation.prompts == 280
    assert (type(config.dataset).__name__, config.dataset.path) == ("HH", "Dahoas/rm-static")
    assert (type(config.reward).__name__, config.reward.path) == ("GPTJReward", "Dahoas/gptj-rm-static")
    assert (config.penalty.per_token, config.penalty.missing_eos) == (0, 0)
