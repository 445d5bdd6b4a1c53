"""Decoding with critics: sampling and scoring from logits that are adjusted by hand-computed critic outputs."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from apa_cli.errors import ConfigError
from apa_cli.hardware import cpu_matmul
from apa_cli.models.adjusted_decoding import adjust_decoding
from apa_cli.models.critic import CriticModule, build_value_head
from apa_cli.models.forward import (
    PackedInputs,
    TrainingModel,
    autocast_to,
    compute_head_inputs,
    compute_response_logprobs,
    pack_if_faster,
)
from apa_cli.rollout.engine import sample_responses
from apa_cli.settings import DType, HeadKind, MatmulLibrary
from apa_cli.types import Critic, Sequences
from tests.builders import (
    EOS,
    build_tiny_policy,
    build_word_tokenizer,
    make_padded_inputs,
    make_sampling_settings,
    make_sequences,
)

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

SPECS = [Critic("q1", kind="action", polyak=0.1), Critic("q2", kind="action", polyak=0.1), Critic("v")]
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9], [7], [9, 3]]
LENGTH = 6


def build_random_head(kind: HeadKind, outputs: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    head = build_value_head(kind, 16, outputs)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def build_model(kind: str = "gpt_neox", temperature: float = 1.0) -> TrainingModel:
    """Return a policy with two action critics, whose copies differ from them, a state critic, and a separate critic."""
    critics = {
        "q1": CriticModule(None, build_random_head(HeadKind.mlp, 11, 1), is_action=True),
        "q2": CriticModule(None, build_random_head(HeadKind.linear, 11, 2), is_action=True),
        "v": CriticModule(None, build_random_head(HeadKind.linear, 1, 3)),
        "own": CriticModule(build_tiny_policy(seed=7).base_model, build_random_head(HeadKind.linear, 1, 4)),
    }
    model = TrainingModel(build_tiny_policy(kind), critics, temperature, SPECS)
    with torch.no_grad():
        for parameter in model.targets.parameters():
            parameter.mul_(-2.0)
    return model


def adjust(logits: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
    """Return ILQL's decoding with β = 1.5."""
    assert logits.dtype == torch.float32 and set(outputs) == {"q1", "q2", "v", "q1/target", "q2/target"}
    return logits + 1.5 * (torch.minimum(outputs["q1/target"], outputs["q2/target"]) - outputs["v"].unsqueeze(-1))


@torch.no_grad()
def compute_adjusted_logits(model: TrainingModel, ids: list[int]) -> Tensor:
    """Return the adjusted logits [T, V] at each position of a sequence, by a pass without cache, padding or batch."""
    policy, heads = model.policy, model.targets
    states = policy.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    advantage = torch.minimum(heads["q1"].head(states), heads["q2"].head(states)) - model.critics["v"].head(states)
    return policy(input_ids=torch.tensor([ids])).logits[0] + 1.5 * advantage


@pytest.fixture(params=["torch", "onednn"])
def matmul(request) -> Iterator[None]:
    """Decode with the layers of the model, or with the fast ones."""
    if request.param == "onednn" and not cpu_matmul.has_onednn():
        pytest.skip("PyTorch without oneDNN")
    cpu_matmul.select_matmul(MatmulLibrary(request.param))
    yield
    cpu_matmul.select_matmul(MatmulLibrary.torch)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "gptj", "llama"])
def test_responses_are_sampled_from_the_adjusted_distribution(kind, temperature, matmul):
    model, uniforms = build_model(kind), 1 - np.random.default_rng(1).random((len(PROMPTS), LENGTH))
    settings = make_sampling_settings(temperature=temperature, max_new_tokens=LENGTH, microbatch_size=4)
    inputs = (model.policy, build_word_tokenizer(), PROMPTS, uniforms, settings, frozenset({EOS}))
    with adjust_decoding(model, adjust):
        sampled = sample_responses(*inputs)
    compared = 0
    for prompt, tokens, logprobs, numbers in zip(PROMPTS, sampled.tokens, sampled.logprobs, uniforms, strict=True):
        expected = (compute_adjusted_logits(model, prompt + tokens)[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        assert logprobs == pytest.approx(expected[range(len(tokens)), tokens].tolist(), abs=1e-5)
        edges = expected.double().exp().cumsum(-1)
        for token, row, u in zip(tokens, edges, numbers, strict=False):
            if float((row[:-1] - u).abs().min()) > 1e-5:  # a uniform nearer to an edge may select either token
                assert token == int((row[:-1] < u).sum())
                compared += 1
    assert compared > 0.9 * sum(map(len, sampled.tokens)) > len(PROMPTS)
    assert sample_responses(*inputs).tokens != sampled.tokens


def test_greedy_decoding_takes_the_largest_adjusted_logit(matmul):
    model, uniforms = build_model("llama"), np.full((len(PROMPTS), 1), 0.5)
    settings = make_sampling_settings(top_k=1, max_new_tokens=1)
    with adjust_decoding(model, adjust):
        sampled = sample_responses(model.policy, build_word_tokenizer(), PROMPTS, uniforms, settings, frozenset({EOS}))
    assert [row[0] for row in sampled.tokens] == [
        int(compute_adjusted_logits(model, prompt)[-1].argmax()) for prompt in PROMPTS
    ]


def make_padded_sequences() -> Sequences:
    """Return sequences with so much padding that they are packed."""
    responses = [[2, 7], [8, 2, 8, 1, 9, 9, 4, 3], [8], [], [4, 5, 9], [1]]
    return make_sequences(PROMPTS, responses)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
@torch.no_grad()
def test_log_probs_and_head_inputs_are_those_of_the_adjusted_logits(kind):
    model, tokens = build_model(kind, temperature=0.7), make_padded_sequences()
    padded = make_padded_inputs(tokens)
    assert isinstance(pack_if_faster(model.policy, padded), PackedInputs)
    rows = []
    for prompt, ids, mask in zip(PROMPTS, tokens.response_ids, tokens.mask, strict=True):
        response = ids[mask].tolist()
        rows.append(compute_adjusted_logits(model, prompt + response)[len(prompt) - 1 : -1])
    expected = torch.cat(rows)
    with adjust_decoding(model, adjust):
        states, head = compute_head_inputs(model.policy, padded)
        logprobs = compute_response_logprobs(model.policy, tokens, 0.7)
    close(head(states), expected)
    chosen = (expected / 0.7).log_softmax(-1)[range(len(expected)), tokens.response_ids[tokens.mask]]
    close(logprobs[tokens.mask], chosen)
    assert not logprobs[~tokens.mask].any()


@torch.no_grad()
def test_the_head_of_the_policy_is_restored_also_after_an_error():
    model, tokens = build_model(), make_padded_sequences()
    before = compute_response_logprobs(model.policy, tokens, 1.0)

    def fail(logits: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), adjust_decoding(model, fail):
        compute_response_logprobs(model.policy, tokens, 1.0)
    assert torch.equal(compute_response_logprobs(model.policy, tokens, 1.0), before)
    with adjust_decoding(model, lambda logits, outputs: logits):
        close(compute_response_logprobs(model.policy, tokens, 1.0), before)


@torch.no_grad()
def test_logits_and_critic_outputs_of_a_bfloat16_pass_are_float32():
    model, seen = build_model(), {}

    def record(logits: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        seen.update(outputs, logits=logits)
        return logits

    with autocast_to(torch.device("cpu"), DType.bfloat16), adjust_decoding(model, record):
        model.policy(input_ids=torch.tensor([[3, 1, 4], [2, 7, 8]]))
    shapes = {name: tuple(x.shape) for name, x in seen.items()}
    assert shapes == {"v": (6,), **dict.fromkeys(("logits", "q1", "q2", "q1/target", "q2/target"), (6, 11))}
    assert {x.dtype for x in seen.values()} == {torch.float32}


def test_a_policy_without_a_plain_head_is_refused():
    model = TrainingModel(build_tiny_policy("granite", logits_scaling=0.25), {}, 1.0)
    with (
        pytest.raises(ConfigError, match=r"^algo: .*plain linear output head.*granite"),
        adjust_decoding(model, adjust),
    ):
        pass
