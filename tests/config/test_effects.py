"""Options without effect: refused with the reason if they are set for one run, harmless values excepted."""

from argparse import Namespace

import pytest

from apa_cli.cli.app import check_job
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.effects import list_idle_options
from apa_cli.errors import ConfigError

SINGLE, SWEEP = (Namespace(config_dir=None, multirun=multirun) for multirun in (False, True))
GROUP_MEAN = "algo.advantage_estimator=group_mean"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=ppo", GROUP_MEAN, "algo.gamma=0.9"], "algo.gamma: no effect with algo.advantage_estimator=group_mean"),
        (["algo=awr", GROUP_MEAN, "critic=head"], "critic: no effect with AWR without a critic"),
        (["algo=ppo", "algo.kl_target=3"], "algo.kl_target: no effect with algo.kl_controller=fixed"),
        (["model.path=/tmp", "+model.architecture.hidden_size=8"], "no effect with a model.path that is a folder"),
        (["algo=dpo", "optimizer.critic_warmup_iterations=1"], "DPO with these settings has no critic"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                (["algo=apa", GROUP_MEAN, "algo.gae_lambda=0"], "algo.gae_lambda: no effect with"),
                (["algo=awr", GROUP_MEAN, "algo.value_coef=0.5"], "algo.value_coef: no effect with"),
                (["algo=awr", GROUP_MEAN, "algo.value_clip_range=0.2"], "algo.value_clip_range: no effect with"),
                (
                    ["algo=apa", "algo.advantage_estimator=monte_carlo", "algo.gae_lambda=0.5"],
                    "estimator=monte_carlo; leave",
                ),
                (["algo=apa", "algo.value_coef=0", "algo.value_clip_range=1"], "no effect with algo.value_coef=0"),
                (
                    ["algo=grpo", "optimizer.critic_lr=1e-3"],
                    "optimizer.critic_lr: no effect with GRPO without a critic",
                ),
                (["algo=rloo", "optimizer.joint_clip=true"], "joint_clip: no effect with RLOO without a critic"),
                (["algo=rloo", "critic.head=mlp"], "critic.head: no effect with RLOO without a critic"),
                (["algo=ppo", "critic=head", "critic.init=reward"], "critic.init: no effect with critic=head"),
                (
                    ["model.path=/tmp", "model.tokenizer_vocabulary=400"],
                    "tokenizer_vocabulary: no effect with model.path",
                ),
                (
                    ["algo=awr", "reference.refresh_every=2"],
                    "reference.refresh_every: no effect with AWR, whose loss reads no",
                ),
                (["algo=ppo", "algo.kl_controller=adaptive", "lambda=0"], "and 0 stays 0; give lambda above 0"),
            ]
        ),
    ],
)
def test_an_option_without_effect_is_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        check_job(overrides, SINGLE, ())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ["algo=ppo", "algo.gamma=0.9", "algo.gae_lambda=0.5", "algo.value_coef=2", "critic=head"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["algo=ppo", "algo.kl_controller=adaptive", "algo.kl_target=3", "algo.kl_horizon=100"],
            marks=pytest.mark.slow,
        ),
        ["algo=grpo", "optimizer.critic_warmup_iterations=0", "guard.critic_patience=null"],
        pytest.param(["algo=grpo", "reference.refresh_every=2"], marks=pytest.mark.slow),
        ["algo=awr", "reference.refresh_every=0"],
    ],
)
def test_an_option_that_has_an_effect_or_is_off_is_taken(overrides):
    check_job(overrides, SINGLE, ())


def test_the_jobs_of_a_sweep_may_share_options_that_some_of_their_algorithms_lack():
    check_job(["algo=grpo", "optimizer.critic_lr=1e-3"], SWEEP, ())


def test_with_a_critic_and_a_reference_every_shared_option_has_an_effect():
    assert list_idle_options(build_config(compose(["algo=apa"]))) == {}
