"""Log-probs of chosen tokens by pieces of the head's logits: numbers, gradients, memory, and which models it is for."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from apa_cli.models import lm_head as heads
from apa_cli.models.forward import TrainingModel, compute_precision, response_logits, response_logprobs, sequences
from apa_cli.models.lm_head import chosen_logprobs, linear_head, pieces
from apa_cli.models.lora import WithoutAdapter, add_adapter
from apa_cli.settings import DType, LoraSettings
from apa_cli.tensor_ops import token_logprobs
from apa_cli.types import Tokens

N, H, V = 7, 5, 40


def inputs(bias: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """States [N, H], weight [V, H], bias [V] or None, with gradients; deviations that make likely and unlikely ones."""
    torch.manual_seed(0)
    made = [2 * torch.randn(N, H), torch.randn(V, H), torch.randn(V)]
    leaves = [x.to(dtype).requires_grad_() for x in made]
    return leaves if bias else [*leaves[:2], None]


TOKENS = torch.tensor([3, 0, 39, 3, 17, 8, 20])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 0.25])


def plain(states, weight, bias, temperature):
    """The formula, in float64: what else is computed here in float32 rounds."""
    logits = nn.functional.linear(states, weight, bias) / temperature
    return logits.log_softmax(-1)[range(N), TOKENS]


@pytest.fixture(params=["kept", "again", "some kept"])
def memory(request, monkeypatch):
    """All logits are kept; none, in pieces of two tokens; two pieces of two tokens are, the rest not."""
    if request.param != "kept":
        monkeypatch.setattr(heads, "PIECE", 2 * V)
        monkeypatch.setattr(heads, "KEPT", 0 if request.param == "again" else 5 * V * 4)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_numbers_and_gradients_are_those_of_the_plain_formula(memory, temperature, bias):
    exact, found = inputs(bias, torch.float64), inputs(bias)
    expected = plain(*exact, temperature)
    logprobs = chosen_logprobs(*found, TOKENS, temperature)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-6, atol=2e-6)
    (expected * WEIGHTS).sum().backward()
    (logprobs * WEIGHTS).sum().backward()
    for one, other in zip(found, exact, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad.float(), rtol=1e-5, atol=2e-6)


def test_without_gradient_the_numbers_are_the_same_bits(memory):
    found = inputs(True)
    with_gradient = chosen_logprobs(*found, TOKENS, 0.7)
    with torch.no_grad():
        assert torch.equal(chosen_logprobs(*found, TOKENS, 0.7), with_gradient)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(memory, frozen):
    states, weight, _ = both = inputs(False)
    plain(states.double(), weight.double(), None, 1.0).sum().backward()
    expected = both[1 - frozen].grad.clone()
    states.grad = weight.grad = None
    both[frozen].requires_grad_(False)
    chosen_logprobs(states, weight, None, TOKENS, 1.0).sum().backward()
    assert both[frozen].grad is None
    torch.testing.assert_close(both[1 - frozen].grad, expected, rtol=1e-5, atol=2e-6)


def test_no_token_at_all_gives_zero_gradients():
    states, weight, _ = inputs(False)
    chosen_logprobs(states[:0], weight, None, TOKENS[:0], 1.0).sum().backward()
    assert not weight.grad.any() and not states.grad.any()


def test_a_token_that_is_nearly_impossible_or_certain_has_its_log_prob_and_gradient():
    # logits 0, 200: log-probs −200 and −e^−200 = 0; the gradient to the first state's logits is (1, −1)
    states, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[0.0], [200.0]])
    logprobs = chosen_logprobs(states, weight, None, torch.tensor([0, 1]), 1.0)
    assert logprobs.tolist() == [-200.0, 0.0]
    logprobs.sum().backward()
    assert states.grad.tolist() == [[-200.0], [0.0]]


def test_bfloat16_keeps_the_gradient_of_a_nearly_certain_token():
    # p = 1 / (1 + e^−8) rounds to 1 in bfloat16; the gradient of its log-prob to its logit is 1 − p = 3.35e-4
    states = torch.ones(1, 1)
    weight = torch.tensor([[8.0], [0.0]], requires_grad=True)
    with compute_precision(torch.device("cpu"), DType.bfloat16):
        logprobs = chosen_logprobs(states, weight, None, torch.tensor([0]), 1.0)
    logprobs.sum().backward()
    assert logprobs.dtype == weight.grad.dtype == torch.float32
    assert logprobs.item() == pytest.approx(-3.354e-4, rel=1e-3)
    # eight bits of mantissa: 2⁻⁸ at most
    assert weight.grad.flatten().tolist() == pytest.approx([3.3535e-4, -3.3535e-4], rel=2**-8)


def test_bfloat16_gradients_are_those_of_the_plain_formula_under_autocast(memory):
    results = []
    for compute in (
        lambda s, w, b: chosen_logprobs(s, w, b, TOKENS, 0.7),
        lambda s, w, b: token_logprobs(nn.functional.linear(s, w, b).float().unsqueeze(0) / 0.7, TOKENS.unsqueeze(0)),
    ):
        leaves = inputs(True)
        with compute_precision(torch.device("cpu"), DType.bfloat16):
            logprobs = compute(*leaves).flatten()
        (logprobs * WEIGHTS).sum().backward()
        results.append([logprobs.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(*(result[1:] for result in results), strict=True):
        # eight bits of mantissa in every term of a sum, of the size of the largest
        assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())


def test_pieces_cover_all_rows_once_and_none_is_too_large(monkeypatch):
    monkeypatch.setattr(heads, "PIECE", 100)
    for rows in (0, 1, 2, 3, 10, 11):
        for vocabulary in (1, 30, 50, 1000):
            parts = pieces(rows, vocabulary)
            assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
            assert all(part.stop - part.start <= parts[0].stop for part in parts)
            assert all((part.stop - part.start) * vocabulary <= max(100, vocabulary) for part in parts)


# In a model

DIMENSIONS = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
LLAMA_LIKE = {**DIMENSIONS, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "gpt_neox": (DIMENSIONS, True),
    "gpt2": ({"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}, True),
    "gptj": ({"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "rotary_dim": 4}, True),
    "llama": (LLAMA_LIKE, True),
    "gemma2": ({**LLAMA_LIKE, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, False),
    "cohere": ({**LLAMA_LIKE, "logit_scale": 3.0}, False),
    "granite": ({**LLAMA_LIKE, "logits_scaling": 0.25}, False),
}
"""Family → its dimensions, and whether its logits are what its head returns."""

GIVEN = Tokens(
    prompt_ids=torch.tensor([[3, 1, 4], [0, 0, 5]]),
    prompt_mask=torch.tensor([[True] * 3, [False, False, True]]),
    response_ids=torch.tensor([[2, 7, 0, 0], [8, 2, 8, 1]]),
    mask=torch.tensor([[True, True, False, False], [True] * 4]),
)


def built(kind: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind][0])).float().eval()


def plainly(model, temperature: float = 0.7) -> torch.Tensor:
    rows = sequences(GIVEN.prompt_ids, GIVEN.prompt_mask, GIVEN.response_ids, GIVEN.mask)
    logprobs = token_logprobs(response_logits(model, rows, temperature), rows.response_ids)
    return logprobs.masked_fill(~GIVEN.mask, 0.0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_log_probs_and_gradients_of_every_family_are_those_of_its_own_logits(kind):
    model = built(kind)
    assert (linear_head(model) is not None) == FAMILIES[kind][1]
    results = []
    for logprobs in (
        plainly(model),
        TrainingModel(model, {}, 0.7)(GIVEN).logprobs,
        response_logprobs(model, GIVEN, 0.7),
    ):
        model.zero_grad()
        logprobs.sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 4
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_tied_weights_get_the_gradients_of_both_their_uses():
    model = built("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight
    (expected,) = torch.autograd.grad(plainly(model).sum(), weight)
    (found,) = torch.autograd.grad(response_logprobs(model, GIVEN, 0.7).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_under_an_adapter_and_without_it(targets):
    model = built("llama")
    add_adapter(model, LoraSettings(rank=2, alpha=2.0, target_modules=targets), "policy", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert (linear_head(model) is None) == ("lm_head" in targets)
    bare = WithoutAdapter(model)
    for tried in (model, bare):
        torch.testing.assert_close(response_logprobs(tried, GIVEN, 0.7), plainly(tried), rtol=1e-5, atol=1e-5)
    assert (plainly(model) - plainly(bare)).abs().max().item() > 0.01


def test_the_head_is_itself_again_after_a_pass_and_after_a_failed_one():
    model = built("llama")
    before = plainly(model).detach()
    response_logprobs(model, GIVEN, 0.7)
    assert torch.equal(plainly(model), before)
    broken = Tokens(GIVEN.prompt_ids, GIVEN.prompt_mask, GIVEN.response_ids + 1000, GIVEN.mask)
    with pytest.raises((IndexError, RuntimeError)):
        response_logprobs(model, broken, 0.7)
    assert torch.equal(plainly(model), before)


@pytest.mark.parametrize("kept", [False, True])
def test_the_backward_pass_keeps_logits_of_true_tokens_only_and_no_more_than_it_may(kept, monkeypatch):
    monkeypatch.setattr(heads, "PIECE", 30)
    monkeypatch.setattr(heads, "KEPT", 2**28 if kept else 0)
    model, saved = built("llama"), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TrainingModel(model, {}, 1.0)(GIVEN)
    logits = sum(len(x) for x in saved if x.dim() == 2 and x.shape[1] == 30)
    assert logits == (6 if kept else 0)
    assert not [x for x in saved if x.dim() == 3 and x.shape[2] == 30]
