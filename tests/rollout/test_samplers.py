"""Samplers behind their interface: models with settings of their own, the data set, random numbers, and plans."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from apa_cli.errors import UserError
from apa_cli.models.forward import TrainingModel
from apa_cli.randomness import Stream, make_generator, sample_uniforms
from apa_cli.rollout.collect import collect_rollout
from apa_cli.rollout.engine import Sampled, sample_responses
from apa_cli.rollout.samplers import DataSampler, Draws, ModelSampler, PolicySampler, Sampler
from apa_cli.settings import DType
from apa_cli.types import Prefix, Prompt, Rollout, RolloutPlan
from tests.builders import EOS, build_tiny_policy, build_word_tokenizer, make_sampling_settings

SETTINGS = make_sampling_settings(max_new_tokens=6, microbatch_size=5)
N = 12
DRAWS = Draws(5, Stream.rollout, 3, [(place, number) for place in range(6) for number in (0, 1)])
ENDS = frozenset({EOS})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_word_tokenizer()


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return build_tiny_policy(seed=0)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Two samples of each of six prompts of 1 to 3 tokens."""
    return [
        Prompt("", [1 + (place + i) % 9 for i in range(1 + place % 3)], place, number, {})
        for place, number in DRAWS.places
    ]


def draw(sampler: Sampler, prompts: list[Prompt], settings=SETTINGS, prefixes=None) -> Sampled:
    return sampler.draw(prompts, prefixes or [[] for _ in prompts], DRAWS, settings, ENDS)


# Random numbers


def test_draws_are_keyed_by_seed_stream_iteration_place_and_sample():
    expected = sample_uniforms(5, Stream.rollout, 3, DRAWS.places, 4)
    assert DRAWS.sample_uniforms(4).tolist() == expected.tolist()
    seeds = DRAWS.derive_seeds()
    assert seeds == [int(make_generator(5, Stream.rollout, 3, *place).integers(2**63 - 1)) for place in DRAWS.places]
    others = [replace(DRAWS, **change) for change in ({"seed": 6}, {"stream": Stream.roll_in}, {"iteration": 4})]
    assert len({seed for each in (DRAWS, *others) for seed in each.derive_seeds()}) == 4 * N
    assert replace(DRAWS, places=DRAWS.places[3:5]).derive_seeds() == seeds[3:5]


# Models


def test_a_model_has_settings_of_its_own(policy, tokenizer, prompts):
    """Those of the run that it does not change still hold: the length, and the stop string `b`, token 1."""
    settings = replace(SETTINGS, stop_strings=["b"])
    own = replace(settings, temperature=0.4, top_k=3)
    sampler = ModelSampler(policy, tokenizer, DType.float32, {"temperature": 0.4, "top_k": 3})
    sampled = draw(sampler, prompts, settings)
    contexts = [prompt.token_ids for prompt in prompts]
    assert sampled == sample_responses(policy, tokenizer, contexts, DRAWS.sample_uniforms(6), own, ENDS)
    plain = draw(ModelSampler(policy, tokenizer, DType.float32), prompts, settings)
    assert plain == sample_responses(policy, tokenizer, contexts, DRAWS.sample_uniforms(6), settings, ENDS)
    assert plain.tokens != sampled.tokens and "stop" in plain.endings + sampled.endings


def test_a_model_continues_prefixes(policy, tokenizer, prompts):
    sampler = ModelSampler(policy, tokenizer, DType.float32)
    prefixes = [[3, 7][: i % 3] for i in range(N)]
    longer = [replace(p, token_ids=p.token_ids + prefix) for p, prefix in zip(prompts, prefixes, strict=True)]
    continued, whole = draw(sampler, prompts, prefixes=prefixes), draw(sampler, longer)
    for i, prefix in enumerate(prefixes):  # prefix and completion together are at most 6 tokens long
        assert continued.tokens[i] == whole.tokens[i][: 6 - len(prefix)]
        assert continued.logprobs[i] == pytest.approx(whole.logprobs[i][: 6 - len(prefix)], rel=1e-6, abs=1e-7)


def test_a_model_is_computed_in_its_own_dtype(policy, tokenizer, prompts):
    plain, rounded = (draw(ModelSampler(policy, tokenizer, dtype), prompts) for dtype in DType)
    differences = [
        abs(a - b)
        for row, other, tokens, other_tokens in zip(
            plain.logprobs, rounded.logprobs, plain.tokens, rounded.tokens, strict=True
        )
        for a, b in zip(row, other, strict=False)
        if tokens == other_tokens
    ]
    assert max(differences) > 1e-4  # bfloat16 has 8 bits


def test_a_model_samples_within_its_decoding(policy, tokenizer, prompts):
    """The context adds 100 to the logit of token 4, which then is every token."""

    @contextmanager
    def prefer_token():
        head = policy.get_output_embeddings()
        head.bias = torch.nn.Parameter(100.0 * (torch.arange(11) == 4))
        yield
        head.bias = None

    sampler = ModelSampler(policy, tokenizer, DType.float32, decoding=prefer_token)
    assert draw(sampler, prompts).tokens == [[4] * 6] * N
    assert draw(replace(sampler, decoding=ModelSampler.decoding), prompts).tokens != [[4] * 6] * N


def test_the_policy_follows_the_model_under_training(policy, tokenizer, prompts):
    trained, other = TrainingModel(build_tiny_policy(seed=7), {}, 1.0), build_tiny_policy(seed=0)
    expected = draw(ModelSampler(trained.policy, tokenizer, DType.float32), prompts)
    sampler = PolicySampler(other, tokenizer, DType.float32)
    assert draw(sampler, prompts) != expected
    sampler.refresh(trained)
    assert draw(sampler, prompts) == expected and sampler.model is other
    frozen = ModelSampler(build_tiny_policy(seed=0), tokenizer, DType.float32)
    before = draw(frozen, prompts)
    frozen.refresh(trained)  # other samplers do not follow it
    assert draw(frozen, prompts) == before != expected


# The data set


def add_responses(prompts: list[Prompt], responses: list[list[int] | None]) -> list[Prompt]:
    return [
        replace(prompt, response_ids=response, example_index=40 + i)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=False))
    ]


def test_the_data_set_gives_its_logged_responses():
    """The limit is 6 tokens; the last of 7 is cut off, its end token with it."""
    responses = [[3, 4, EOS], [1, 2, 3, 4, 5, EOS], [1, 2, 3, 4, 5, 6, EOS], [5], [EOS]]
    logged = add_responses([Prompt("", [1], i, 0, {}) for i in range(5)], responses)
    sampled = draw(DataSampler(), logged)
    assert sampled.tokens == [responses[0], responses[1], [1, 2, 3, 4, 5, 6], [5], [EOS]]
    assert sampled.endings == ["eos", "eos", "length", "length", "eos"]
    assert sampled.logprobs == [[0.0] * 3, [0.0] * 6, [0.0] * 6, [0.0], [0.0]]


def test_a_row_without_a_response_is_one_line():
    logged = add_responses([Prompt(f"prompt\n{i}", [1], i, 0, {}) for i in range(2)], [[3, EOS], None])
    with pytest.raises(UserError) as error:
        draw(DataSampler(), logged)
    assert str(error.value) == ("dataset: row 41 has no response, which the plan needs; its prompt is 'prompt\\n1'")


def collect(plan: RolloutPlan, tokenizer, prompts: list[Prompt], **samplers: Sampler) -> Rollout:
    return collect_rollout(samplers, tokenizer, prompts, SETTINGS, ENDS, 5, Stream.rollout, 3, plan)


def test_logged_responses_are_off_policy(tokenizer, prompts):
    logged = add_responses(prompts, [[3, 4, EOS] if i % 2 else [5, 6] for i in range(N)])
    rollout = collect(RolloutPlan("data"), tokenizer, logged, data=DataSampler())
    assert rollout.response_ids[:2].tolist() == [[5, 6, 0], [3, 4, EOS]]
    assert rollout.mask[:2].tolist() == [[True, True, False], [True] * 3] and not rollout.on_policy.any()
    assert not rollout.logprobs["sampler"].any() and rollout.endings[:2] == ["length", "eos"]
    assert rollout.example_index.tolist() == list(range(40, 40 + N)) and rollout.plans == (RolloutPlan("data"),)
    assert [text.split() for text in rollout.responses[:2]] == [["f", "g"], ["d", "e"]]  # without the end token


def test_the_policy_completes_prefixes_of_logged_responses(policy, tokenizer, prompts):
    logged = add_responses(prompts, [[3, 4, 5, EOS]] * N)
    sampler = ModelSampler(policy, tokenizer, DType.float32)
    plan = RolloutPlan("data", Prefix("uniform"), "policy")
    rollout = collect(plan, tokenizer, logged, data=DataSampler(), policy=sampler)
    cuts = (rollout.mask & ~rollout.on_policy).sum(-1).tolist()
    assert set(cuts) == {1, 2, 3}  # never the end token
    completions = draw(sampler, logged, prefixes=[[3, 4, 5][:cut] for cut in cuts])
    for i, cut in enumerate(cuts):
        length = min(6, cut + len(completions.tokens[i]))
        assert rollout.response_ids[i, :length].tolist() == ([3, 4, 5][:cut] + completions.tokens[i])[:6]
        expected = ([0.0] * cut + completions.logprobs[i])[:6]
        assert rollout.logprobs["sampler"][i, :length].tolist() == pytest.approx(expected, rel=1e-6)
        assert rollout.on_policy[i].tolist() == [cut <= t < length for t in range(rollout.mask.shape[1])]


def test_without_a_prefix_the_roll_in_is_not_sampled(policy, tokenizer, prompts):
    sampler = ModelSampler(policy, tokenizer, DType.float32)
    online = collect(RolloutPlan(), tokenizer, prompts, policy=sampler)
    for prefix in (Prefix("none"), Prefix("uniform", 0.0)):
        rollout = collect(RolloutPlan("guide", prefix, "policy"), tokenizer, prompts, policy=sampler)
        assert torch.equal(rollout.response_ids, online.response_ids) and torch.equal(rollout.on_policy, rollout.mask)


def test_a_completion_by_another_sampler_is_off_policy(policy, tokenizer, prompts):
    samplers = {
        name: ModelSampler(model, tokenizer, DType.float32)
        for name, model in (("policy", policy), ("guide", build_tiny_policy(seed=1)))
    }
    rollout = collect(RolloutPlan("policy", Prefix("uniform"), "guide"), tokenizer, prompts, **samplers)
    cuts = rollout.on_policy.sum(-1).tolist()
    assert max(cuts) > 1 and (rollout.mask & ~rollout.on_policy).any()
    assert rollout.on_policy.tolist() == [[t < cut for t in range(rollout.mask.shape[1])] for cut in cuts]
    whole = collect(RolloutPlan("guide"), tokenizer, prompts, **samplers)
    assert not whole.on_policy.any() and torch.equal(whole.groups, rollout.groups)


# Plans


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix": Prefix("uniform")}, "prefix uniform does not fit roll_out None"),
        ({"prefix": Prefix("none")}, "prefix none does not fit roll_out None"),
        ({"roll_in": "data", "roll_out": "policy"}, "prefix all does not fit roll_out policy"),
        ({"once_per_prompt": True}, "once_per_prompt needs samplers that do not change, not the policy"),
        (
            {"roll_in": "data", "prefix": Prefix("uniform"), "roll_out": "policy", "once_per_prompt": True},
            "once_per_prompt needs samplers that do not change, not the policy",
        ),
    ],
)
def test_plans_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        RolloutPlan(**fields)
    assert str(error.value) == f"RolloutPlan: {message}"
