"""Chunked statistics of the output head: values, gradients, memory, and the models that support them."""

import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from apa_cli.models import lm_head
from apa_cli.models.forward import (
    TrainingModel,
    autocast_to,
    compute_response_logits,
    compute_response_logprobs,
)
from apa_cli.models.lm_head import (
    TokenStatistics,
    compute_head_logprobs,
    compute_head_statistics,
    find_linear_head,
    split_into_chunks,
)
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.settings import DType
from apa_cli.tensor_ops import token_logprobs
from tests.builders import (
    add_random_adapter,
    build_tiny_policy,
    make_lora_settings,
    make_padded_inputs,
    make_sequences,
)

N, H, V = 7, 5, 40


def make_inputs(bias: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """Return states [N, H], weight [V, H] and bias [V] or None, with gradients, for likely and unlikely tokens."""
    torch.manual_seed(0)
    tensors = [2 * torch.randn(N, H), torch.randn(V, H), torch.randn(V)]
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    return leaves if bias else [*leaves[:2], None]


TOKENS = torch.tensor([3, 0, 39, 3, 17, 8, 20])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 0.25])


def compute_reference(states, weight, bias, temperature):
    """Return the log-probs by the plain formula, in the precision of the inputs."""
    logits = nn.functional.linear(states, weight, bias) / temperature
    return logits.log_softmax(-1)[range(N), TOKENS]


@pytest.fixture(params=["saved", "recomputed", "partly saved"])
def memory(request, monkeypatch):
    """Save all logits for the backward pass; none, in chunks of two tokens; or two of such chunks."""
    if request.param != "saved":
        monkeypatch.setattr(lm_head, "LOGITS_PER_CHUNK", 2 * V)
        monkeypatch.setattr(lm_head, "MAX_SAVED_BYTES", 0 if request.param == "recomputed" else 5 * V * 4)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_and_gradients_equal_those_of_the_plain_formula(memory, temperature, bias):
    exact, leaves = make_inputs(bias, torch.float64), make_inputs(bias)
    expected = compute_reference(*exact, temperature)
    logprobs = compute_head_logprobs(*leaves, TOKENS, temperature)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-6, atol=2e-6)
    (expected * WEIGHTS).sum().backward()
    (logprobs * WEIGHTS).sum().backward()
    for one, other in zip(leaves, exact, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad.float(), rtol=1e-5, atol=2e-6)


def test_log_probs_without_gradient_are_bit_identical(memory):
    leaves = make_inputs(True)
    with_gradient = compute_head_logprobs(*leaves, TOKENS, 0.7)
    with torch.no_grad():
        assert torch.equal(compute_head_logprobs(*leaves, TOKENS, 0.7), with_gradient)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_the_right_one(memory, frozen):
    states, weight, _ = both = make_inputs(False)
    compute_reference(states.double(), weight.double(), None, 1.0).sum().backward()
    expected = both[1 - frozen].grad.clone()
    states.grad = weight.grad = None
    both[frozen].requires_grad_(False)
    compute_head_logprobs(states, weight, None, TOKENS, 1.0).sum().backward()
    assert both[frozen].grad is None
    torch.testing.assert_close(both[1 - frozen].grad, expected, rtol=1e-5, atol=2e-6)


def test_zero_tokens_give_zero_gradients():
    states, weight, _ = make_inputs(False)
    compute_head_logprobs(states[:0], weight, None, TOKENS[:0], 1.0).sum().backward()
    assert not weight.grad.any() and not states.grad.any()


def test_log_prob_and_gradient_of_an_impossible_and_a_certain_token():
    # logits 0, 200: log-probs −200 and −e^−200 = 0; the gradient to the first state's logits is (1, −1)
    states, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[0.0], [200.0]])
    logprobs = compute_head_logprobs(states, weight, None, torch.tensor([0, 1]), 1.0)
    assert logprobs.tolist() == [-200.0, 0.0]
    logprobs.sum().backward()
    assert states.grad.tolist() == [[-200.0], [0.0]]


def test_bfloat16_keeps_the_gradient_of_a_nearly_certain_token():
    # p = 1 / (1 + e^−8) rounds to 1 in bfloat16; the gradient of its log-prob to its logit is 1 − p = 3.35e-4
    states = torch.ones(1, 1)
    weight = torch.tensor([[8.0], [0.0]], requires_grad=True)
    with autocast_to(torch.device("cpu"), DType.bfloat16):
        logprobs = compute_head_logprobs(states, weight, None, torch.tensor([0]), 1.0)
    logprobs.sum().backward()
    assert logprobs.dtype == weight.grad.dtype == torch.float32
    assert logprobs.item() == pytest.approx(-3.354e-4, rel=1e-3)
    # eight bits of mantissa: 2⁻⁸ at most
    assert weight.grad.flatten().tolist() == pytest.approx([3.3535e-4, -3.3535e-4], rel=2**-8)


def test_bfloat16_gradients_equal_those_of_the_plain_formula_under_autocast(memory):
    results = []
    for compute in (
        lambda s, w, b: compute_head_logprobs(s, w, b, TOKENS, 0.7),
        lambda s, w, b: token_logprobs(nn.functional.linear(s, w, b).float().unsqueeze(0) / 0.7, TOKENS.unsqueeze(0)),
    ):
        leaves = make_inputs(True)
        with autocast_to(torch.device("cpu"), DType.bfloat16):
            logprobs = compute(*leaves).flatten()
        (logprobs * WEIGHTS).sum().backward()
        results.append([logprobs.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(*(result[1:] for result in results), strict=True):
        # eight bits of mantissa in every term of a sum, of the size of the largest
        assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())


def test_chunks_cover_each_row_once_within_the_size_limit(monkeypatch):
    monkeypatch.setattr(lm_head, "LOGITS_PER_CHUNK", 100)
    for rows in (0, 1, 2, 3, 10, 11):
        for vocabulary in (1, 30, 50, 1000):
            chunks = split_into_chunks(rows, vocabulary)
            assert [i for chunk in chunks for i in range(rows)[chunk]] == list(range(rows))
            assert all(chunk.stop - chunk.start <= chunks[0].stop for chunk in chunks)
            assert all((chunk.stop - chunk.start) * vocabulary <= max(100, vocabulary) for chunk in chunks)


# Statistics of the whole distribution


def compute_reference_statistics(states, weight, bias, temperature) -> TokenStatistics:
    """Return the statistics by the plain formulas, in the precision of the inputs."""
    x = nn.functional.linear(states, weight, bias) / temperature
    logprobs = x.log_softmax(-1)
    return TokenStatistics(
        logprobs=logprobs[range(N), TOKENS],
        chosen=x[range(N), TOKENS],
        logsumexp=x.logsumexp(-1),
        entropy=-(logprobs.exp() * logprobs).sum(-1),
        mean_logprob=logprobs.mean(-1),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TokenStatistics._fields)
def test_each_statistic_and_its_gradients_equal_those_of_the_plain_formula(name, memory, temperature, bias):
    exact, leaves = make_inputs(bias, torch.float64), make_inputs(bias)
    expected = getattr(compute_reference_statistics(*exact, temperature), name)
    statistic = getattr(compute_head_statistics(*leaves, TOKENS, temperature), name)
    assert statistic.dtype == torch.float32
    torch.testing.assert_close(statistic, expected.float(), rtol=1e-6, atol=2e-6)
    (expected * WEIGHTS).sum().backward()
    (statistic * WEIGHTS).sum().backward()
    for one, other in zip(leaves, exact, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad.float(), rtol=1e-5, atol=5e-6)


def test_the_gradient_of_a_sum_of_statistics_is_that_of_the_plain_formulas(memory):
    gradients = []
    for dtype, compute in (
        (torch.float64, lambda *leaves: compute_reference_statistics(*leaves, 0.7)),
        (torch.float32, lambda *leaves: compute_head_statistics(*leaves, TOKENS, 0.7)),
    ):
        leaves = make_inputs(True, dtype)
        statistics = compute(*leaves)
        sum(factor * (x * WEIGHTS).sum() for factor, x in enumerate(statistics, start=1)).backward()
        gradients.append([leaf.grad.float() for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-5)


def test_statistics_by_hand():
    # logits 0 and 2 log 3 at temperature 2: x = 0, log 3; probabilities 1/4, 3/4
    states, weight = torch.ones(1, 1), torch.tensor([[0.0], [2 * math.log(3)]], requires_grad=True)
    statistics = compute_head_statistics(states, weight, None, torch.tensor([1]), 2.0)
    entropy = math.log(4) - 0.75 * math.log(3)
    by_hand = [math.log(0.75), math.log(3), math.log(4), entropy, (math.log(0.25) + math.log(0.75)) / 2]
    assert [x.item() for x in statistics] == pytest.approx(by_hand, rel=1e-6)
    statistics.entropy.sum().backward()
    # dH/dx of the likelier token: −3/4 (log 3/4 + H) = −3/16 log 3; half of it to the logit, and to the other −1 times
    assert weight.grad.flatten().tolist() == pytest.approx([3 / 32 * math.log(3), -3 / 32 * math.log(3)], rel=1e-6)


@pytest.mark.parametrize("dtype", list(DType))
def test_log_probs_beside_other_statistics_are_bit_identical(dtype, memory):
    leaves = make_inputs(True)
    with autocast_to(torch.device("cpu"), dtype):
        logprobs = compute_head_logprobs(*leaves, TOKENS, 0.7)
        assert torch.equal(compute_head_statistics(*leaves, TOKENS, 0.7).logprobs, logprobs)


def test_statistics_of_zero_tokens_give_zero_gradients():
    states, weight, bias = make_inputs(True)
    statistics = compute_head_statistics(states[:0], weight, bias, TOKENS[:0], 1.0)
    assert [len(x) for x in statistics] == [0] * 5
    sum(x.sum() for x in statistics).backward()
    assert not weight.grad.any() and not states.grad.any() and not bias.grad.any()


def test_statistics_keep_no_logits_for_the_backward_pass():
    leaves, saved = make_inputs(True), []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_head_statistics(*leaves, TOKENS, 1.0)
    assert (N, H) in saved and (N, V) not in saved


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient_from_statistics_and_the_others_the_right_one(frozen):
    exact, leaves = make_inputs(True, torch.float64), make_inputs(True)
    leaves[frozen].requires_grad_(False)
    compute_reference_statistics(*exact, 1.0).entropy.sum().backward()
    compute_head_statistics(*leaves, TOKENS, 1.0).entropy.sum().backward()
    for i in range(3):
        if i == frozen:
            assert leaves[i].grad is None
        else:
            torch.testing.assert_close(leaves[i].grad, exact[i].grad.float(), rtol=1e-5, atol=5e-6)


# In a model

LARGE_WEIGHTS = {"initializer_range": 0.5, "pad_token_id": 0}
USUAL_WEIGHTS = {"initializer_range": 0.02}
LLAMA_LIKE = {
    **LARGE_WEIGHTS, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "gpt_neox": (LARGE_WEIGHTS, True),
    "gpt2": (USUAL_WEIGHTS, True),
    "gptj": (USUAL_WEIGHTS, True),
    "llama": (LLAMA_LIKE, True),
    "gemma2": ({**LLAMA_LIKE, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, False),
    "cohere": ({**LLAMA_LIKE, "logit_scale": 3.0}, False),
    "granite": ({**LLAMA_LIKE, "logits_scaling": 0.25}, False),
}
"""Family → the changes to the tiny configuration, and True if its logits are its head's output."""

BATCH = make_sequences([[3, 1, 4], [5]], [[2, 7], [8, 2, 8, 1]])


def build_policy(kind: str) -> PreTrainedModel:
    return build_tiny_policy(kind, vocab_size=30, **FAMILIES[kind][0]).float()


def compute_plain_logprobs(model, temperature: float = 0.7) -> torch.Tensor:
    """Return the log-probs from the model's own logits."""
    rows = make_padded_inputs(BATCH)
    logprobs = token_logprobs(compute_response_logits(model, rows, temperature), rows.response_ids)
    return logprobs.masked_fill(~BATCH.mask, 0.0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_log_probs_and_gradients_of_each_family_equal_those_from_its_logits(kind):
    model = build_policy(kind)
    assert (find_linear_head(model) is not None) == FAMILIES[kind][1]
    results = []
    for logprobs in (
        compute_plain_logprobs(model),
        TrainingModel(model, {}, 0.7)(BATCH).logprobs,
        compute_response_logprobs(model, BATCH, 0.7),
    ):
        model.zero_grad()
        logprobs.sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 4
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def compute_plain_statistics(model, temperature: float) -> dict[str, torch.Tensor]:
    """Return entropy and mean log-prob from the model's own logits."""
    logprobs = compute_response_logits(model, make_padded_inputs(BATCH), temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    statistics = {"entropy": entropy, "mean_logprob": logprobs.sum(-1) / 30}
    return {name: x.masked_fill(~BATCH.mask, 0.0) for name, x in statistics.items()}


@pytest.mark.parametrize("name", ["entropy", "mean_logprob"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_entropy_and_mean_log_prob_of_each_family_equal_those_from_its_logits(kind, name):
    model = build_policy(kind)
    output = TrainingModel(model, {}, 0.7)(BATCH, **{name: True})
    other = {"entropy": "mean_logprob", "mean_logprob": "entropy"}[name]
    assert getattr(output, other) is None
    torch.testing.assert_close(output.logprobs, compute_plain_logprobs(model), rtol=1e-5, atol=1e-5)
    results = []
    for statistic in (compute_plain_statistics(model, 0.7)[name], getattr(output, name)):
        model.zero_grad()
        (statistic * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        results.append([statistic.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 4 and float(results[0][1].abs().max()) > 1e-4
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_tied_weights_get_the_gradients_of_both_uses():
    model = build_policy("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight
    (expected,) = torch.autograd.grad(compute_plain_logprobs(model).sum(), weight)
    (gradient,) = torch.autograd.grad(compute_response_logprobs(model, BATCH, 0.7).sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(compute_plain_statistics(model, 0.7)["entropy"].sum(), weight)
    entropy = TrainingModel(model, {}, 0.7)(BATCH, entropy=True).entropy
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), weight)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_log_probs_with_an_adapter_and_with_it_disabled(targets):
    model = build_policy("llama")
    add_random_adapter(model, make_lora_settings(alpha=2.0, target_modules=targets))
    assert (find_linear_head(model) is None) == ("lm_head" in targets)
    base = AdapterDisabledModel(model)
    for each in (model, base):
        torch.testing.assert_close(
            compute_response_logprobs(each, BATCH, 0.7), compute_plain_logprobs(each), rtol=1e-5, atol=1e-5
        )
    assert (compute_plain_logprobs(model) - compute_plain_logprobs(base)).abs().max().item() > 0.01


def test_the_head_is_restored_after_a_pass_and_after_a_failed_pass():
    model = build_policy("llama")
    before = compute_plain_logprobs(model).detach()
    compute_response_logprobs(model, BATCH, 0.7)
    assert torch.equal(compute_plain_logprobs(model), before)
    broken = BATCH.replace(response_ids=BATCH.response_ids + 1000)
    with pytest.raises((IndexError, RuntimeError)):
        compute_response_logprobs(model, broken, 0.7)
    assert torch.equal(compute_plain_logprobs(model), before)


@pytest.mark.parametrize("can_save", [False, True])
def test_only_logits_of_true_tokens_are_saved_within_the_limit(can_save, monkeypatch):
    monkeypatch.setattr(lm_head, "LOGITS_PER_CHUNK", 30)
    monkeypatch.setattr(lm_head, "MAX_SAVED_BYTES", 2**28 if can_save else 0)
    model, saved = build_policy("llama"), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TrainingModel(model, {}, 1.0)(BATCH)
    logits = sum(len(x) for x in saved if x.dim() == 2 and x.shape[1] == 30)
    assert logits == (6 if can_save else 0)
    assert not [x for x in saved if x.dim() == 3 and x.shape[2] == 30]
