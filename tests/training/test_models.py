"""Samplers of a run by name, and the guide, which may be of another architecture with the same vocabulary."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from apa_cli.algorithms.plans import Online
from apa_cli.errors import ConfigError
from apa_cli.models.loading import save_model
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.randomness import Stream
from apa_cli.rollout.engine import Sampled
from apa_cli.rollout.samplers import DataSampler, Draws, ModelSampler, Sampler
from apa_cli.settings import DType
from apa_cli.training.trainer import Trainer
from apa_cli.types import Prompt, RolloutPlan
from tests.builders import build_tiny_policy, build_word_tokenizer

DRAWS = Draws(3, Stream.rollout, 1, [(place, 0) for place in range(6)])
PROMPTS = [Prompt("", [40 + place, 7], place, 0, {}, example_index=place) for place in range(6)]


@dataclass(frozen=True)
class WithSamplers(Online):
    """The online plan, which also asks for these samplers."""

    samplers: tuple[str, ...]

    def needs(self, needs):
        return replace(needs, samplers=self.samplers)


GUIDED = WithSamplers(("guide",))


def draw(trainer: Trainer, sampler: Sampler, **changes) -> Sampled:
    settings = replace(trainer.config.sampling, **changes)
    return sampler.draw(PROMPTS, [[] for _ in PROMPTS], DRAWS, settings, trainer.evaluator.end_tokens)


def sample_with(trainer: Trainer, model: PreTrainedModel, **changes) -> Sampled:
    """Return what a sampler of this model draws with these changes to the run's settings."""
    tokenizer = trainer.evaluator.tokenizer
    return draw(trainer, ModelSampler(model, tokenizer, DType.float32), **changes)


@torch.no_grad()
def shift_weights(model: torch.nn.Module, seed: int) -> None:
    """Move every weight."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory) -> Path:
    """The folder of a model of another architecture with the tokenizer of the tiny policy."""
    folder = tmp_path_factory.mktemp("guide") / "llama"
    model = build_tiny_policy("llama", seed=4, vocab_size=600, max_position_embeddings=128)
    save_model(model, AutoTokenizer.from_pretrained(tiny), folder)
    return folder


# Samplers


def test_a_run_has_the_samplers_that_it_needs(make_trainer):
    assert make_trainer().rollout_builder.samplers.keys() == {"policy"}
    plan = WithSamplers(("init", "data"))
    samplers = make_trainer(plan=plan).rollout_builder.samplers
    assert samplers.keys() == {"policy", "init", "data"} and type(samplers["data"]) is DataSampler


def test_each_sampler_draws_from_its_model(make_trainer):
    trainer = make_trainer("reference.refresh_every=1", plan=WithSamplers(("init", "reference")))
    models, samplers = trainer.models, trainer.rollout_builder.samplers
    init = sample_with(trainer, models.reference)
    shift_weights(models.policy, 1)
    shift_weights(models.moving_reference, 2)
    trainer.refresh_samplers()
    expected = {"policy": models.policy, "init": models.reference, "reference": models.moving_reference}
    drawn = {name: draw(trainer, sampler) for name, sampler in samplers.items()}
    assert drawn == {name: sample_with(trainer, model) for name, model in expected.items()}
    assert drawn["init"] == init and len({str(sampled) for sampled in drawn.values()}) == 3


def test_without_a_moving_reference_the_reference_is_the_initial_policy(make_trainer):
    trainer = make_trainer(plan=WithSamplers(("init", "reference", "guide")))
    samplers = trainer.rollout_builder.samplers
    init = sample_with(trainer, trainer.models.reference)
    shift_weights(trainer.models.policy, 1)
    assert draw(trainer, samplers["reference"]) == draw(trainer, samplers["init"]) == init
    # guide=sft: the same model with the guide's settings
    guide = trainer.config.guide
    own = {"temperature": guide.temperature, "top_k": guide.top_k, "top_p": guide.top_p}
    assert (guide.path, own["top_k"], own["top_p"]) == (None, 50, 0.92)
    expected = sample_with(trainer, trainer.models.reference, **own)
    assert draw(trainer, samplers["guide"]) == expected != init and trainer.models.guide is None


def test_with_lora_the_initial_policy_samples_without_the_adapter(make_trainer):
    trainer = make_trainer("lora=default", plan=WithSamplers(("init",)))
    init = sample_with(trainer, trainer.models.policy)  # a new adapter changes nothing
    shift_weights(torch.nn.ParameterList(trainer.models.model.policy_parameters()), 1)
    assert isinstance(trainer.models.reference, AdapterDisabledModel)
    assert draw(trainer, trainer.rollout_builder.samplers["init"]) == init
    assert draw(trainer, trainer.rollout_builder.samplers["policy"]) != init


def test_an_unknown_sampler_is_one_line(make_trainer):
    with pytest.raises(ConfigError) as error:
        make_trainer(plan=WithSamplers(("oracle",)))
    assert str(error.value) == ("plan: there is no sampler 'oracle'; there are policy, init, reference, guide and data")


# The guide


def test_a_guide_of_another_architecture_samples_with_its_own_settings(make_trainer, llama):
    overrides = ["guide=local", f"guide.path={llama}", "guide.temperature=0.5", "guide.top_k=20", "guide.top_p=0.9"]
    trainer = make_trainer(*overrides, "sampling.temperature=0.8", plan=GUIDED)
    guide, sampler = trainer.models.guide, trainer.rollout_builder.samplers["guide"]
    assert guide.config.model_type == "llama" != trainer.models.policy.config.model_type
    assert not any(parameter.requires_grad for parameter in guide.parameters())
    drawn = draw(trainer, sampler)
    assert drawn == sample_with(trainer, guide, temperature=0.5, top_k=20, top_p=0.9)
    assert drawn != sample_with(trainer, guide)


def test_the_log_probs_of_the_guide_are_those_at_its_temperature(make_trainer, llama):
    """At the temperature of its sampling; the guide is only computed here, it does not sample."""

    @dataclass(frozen=True)
    class Scored(Online):
        def needs(self, needs):
            return replace(needs, passes={"response": ("guide",)})

    overrides = ["guide=local", f"guide.path={llama}", "guide.temperature=0.5", "sampling.temperature=0.8"]
    trainer = make_trainer(*overrides, "algo=awr", "reference.log_kl=false", plan=Scored())
    rollout = trainer.forward_passes.run(trainer.rollout_builder.sample(1, {})[0].rollout)
    assert rollout.logprobs.keys() == {"sampler", "guide"}
    row = int(rollout.prompt_mask.sum(-1).argmin())
    length = int(rollout.mask[row].sum())
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
    response = rollout.response_ids[row, :length].tolist()
    with torch.no_grad():
        logits = trainer.models.guide(input_ids=torch.tensor([prompt + response])).logits[0].double() / 0.5
    table = logits.log_softmax(-1)
    expected = [float(table[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]
    assert rollout.logprobs["guide"][row, :length].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_guide_that_nothing_needs_is_not_loaded(make_trainer, tmp_path):
    assert make_trainer("guide=local", f"guide.path={tmp_path}/none").models.guide is None


def test_a_guide_of_another_vocabulary_is_one_line(make_trainer, tmp_path):
    save_model(build_tiny_policy("gptj"), build_word_tokenizer(), tmp_path / "guide")
    with pytest.raises(ConfigError) as error:
        make_trainer("guide=local", f"guide.path={tmp_path}/guide", plan=GUIDED)
    assert str(error.value) == f"guide.path: the vocabulary of {tmp_path}/guide is not the policy's"


def test_a_guide_with_too_few_positions_is_one_line(make_trainer, tiny, tmp_path):
    model = build_tiny_policy("gptj", vocab_size=600, n_positions=64)
    save_model(model, AutoTokenizer.from_pretrained(tiny), tmp_path / "guide")
    with pytest.raises(ConfigError) as error:
        make_trainer("guide=local", f"guide.path={tmp_path}/guide", plan=GUIDED)
    assert "64 positions" in str(error.value) and "\n" not in str(error.value)


def test_the_guide_takes_part_in_a_run(make_trainer, llama):
    """Its responses, rolled in for a second plan, are off-policy and train nobody."""

    @dataclass(frozen=True)
    class Both(WithSamplers):
        def rollout(self, step, rng, state):
            return RolloutPlan(), RolloutPlan("guide", samples=1)

        def masks(self, rollout):
            return {"policy": rollout.on_policy}

    plan = Both(("guide",))
    trainer = make_trainer("guide=local", f"guide.path={llama}", plan=plan)
    result = trainer.run_phases(1)
    assert result.rollout.on_policy.any(-1).tolist() == [True] * 8 + [False] * 8
    alone = make_trainer("algo.score_scaling=none").run_phases(1)
    assert torch.equal(result.rollout.response_ids[:8, : alone.rollout.mask.shape[1]], alone.rollout.response_ids)
