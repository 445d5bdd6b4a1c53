"""Packed sequences give the same results as padded ones, in every family that supports packing; others stay padded."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from apa_cli.models import forward
from apa_cli.models.critic import CriticModule
from apa_cli.models.forward import (
    PackedInputs,
    TrainingModel,
    build_padded_inputs,
    compute_head_inputs,
    compute_response_logprobs,
    enable_activation_checkpointing,
    pack_if_faster,
)
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.models.sequence_packing import RESTRICTION_OPTIONS, attend_per_sequence, can_pack
from apa_cli.settings import CriticKind, HeadKind, LoraSettings
from apa_cli.types import Sequences
from tests.builders import (
    add_random_adapter,
    build_tiny_policy,
    build_value_critic,
    make_lora_settings,
    make_padded_inputs,
)

close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-6)

PACKED = ["gpt_neox", "gpt2", "gptj", "llama", "qwen2"]
UNPACKED = {
    "a window": ("mistral", {"sliding_window": 4}),
    "an attention of its own": ("falcon", {}),
    "a loss that reads the mask": ("mixtral", {"num_local_experts": 2, "output_router_logits": True}),
    "positions read off the mask": ("bloom", {}),
}
build_policy = partial(build_tiny_policy, vocab_size=50, num_hidden_layers=2)


def build_random_critic(policy: PreTrainedModel, kind: CriticKind, lora: LoraSettings | None = None) -> CriticModule:
    """Return a critic with an MLP head whose values are not 0."""
    critic = build_value_critic(policy, kind, HeadKind.mlp, seed=3, lora=lora)
    torch.nn.init.normal_(critic.head[2].weight)
    return critic


@pytest.fixture
def rows() -> Sequences:
    """Prompts of 1 to 6 tokens; responses of 0 to 5 tokens, in one of which the first two do not count."""
    torch.manual_seed(1)
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    before = torch.tensor([[0] * (6 - n) + [1] * n for n in (3, 1, 6, 4)]).bool()
    prompt_ids, response_ids = torch.randint(1, 50, before.shape), torch.randint(1, 50, mask.shape)
    return Sequences(prompt_ids=prompt_ids, prompt_mask=before, response_ids=response_ids, mask=mask, on_policy=mask)


@pytest.fixture
def without_packing(monkeypatch):
    """without_packing(compute): return compute() with packing disabled for every model."""

    def run(compute):
        with monkeypatch.context() as patch:
            patch.setattr(forward, "can_pack", lambda model: False)
            return compute()

    return run


def record_input_shapes(model: torch.nn.Module, run) -> list[tuple[int, ...]]:
    """Return the shapes of the embedding's inputs during `run`."""
    shapes = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    run()
    handle.remove()
    return shapes


@pytest.mark.parametrize("family", PACKED)
def test_log_probs_and_values_equal_those_of_padded_rows_and_no_padding_is_computed(family, rows, without_packing):
    policy = build_policy(family)
    critic = build_random_critic(policy, CriticKind.separate)
    model = TrainingModel(policy, {"value": critic}, 0.7)
    expected, output = without_packing(lambda: model(rows)), model(rows)
    close(output.logprobs, expected.logprobs)
    close(output.values["value"], expected.values["value"])
    assert output.logprobs[rows.mask].all() and not output.logprobs[~rows.mask].any()
    # prompts 3 + 1 + 6 + 4, and the responses up to their last token that counts, itself not among them: 0, 1, 3, 4
    for part in (policy, critic.backbone):
        assert record_input_shapes(part, lambda: model(rows)) == [(1, 14 + 8)]
    assert without_packing(lambda: record_input_shapes(policy, lambda: model(rows))) == [(4, 6 + 4)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
def test_gradients_equal_those_of_padded_rows(checkpointing, rows, without_packing):
    model = TrainingModel(build_policy("llama"), {}, 1.0)
    if checkpointing:
        enable_activation_checkpointing(model.policy)

    def compute_gradients():
        model.zero_grad()
        (model(rows).logprobs * torch.arange(1.0, 6.0)).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, packed = without_packing(compute_gradients), compute_gradients()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_and_the_base_give_the_results_of_padded_rows(rows, without_packing):
    policy, lora = build_policy("gpt_neox"), make_lora_settings()
    add_random_adapter(policy, lora)
    critic = build_random_critic(policy, CriticKind.adapter, lora)
    model, reference = TrainingModel(policy, {"value": critic}, 1.0), AdapterDisabledModel(policy)
    expected, output = without_packing(lambda: model(rows)), model(rows)
    close(output.logprobs, expected.logprobs)
    close(output.values["value"], expected.values["value"])
    base = compute_response_logprobs(reference, rows, 1.0)
    close(base, without_packing(lambda: compute_response_logprobs(reference, rows, 1.0)))
    assert float((base - output.logprobs).detach().abs().max()) > 0.01


def test_values_of_a_head_on_the_trunk_equal_those_of_padded_rows(rows, without_packing):
    policy = build_policy("qwen2")
    critic = build_random_critic(policy, CriticKind.head)
    model = TrainingModel(policy, {"value": critic}, 1.0)
    close(model(rows).values["value"], without_packing(lambda: model(rows)).values["value"])


@torch.no_grad()
def test_head_inputs_are_in_the_order_of_the_mask(rows, without_packing):
    policy = build_policy("gptj")
    padded_inputs = make_padded_inputs(rows)
    states, _ = compute_head_inputs(policy, padded_inputs)
    close(states, without_packing(lambda: compute_head_inputs(policy, padded_inputs)[0]))
    assert len(states) == int(rows.mask.sum())


@pytest.mark.parametrize("reason", UNPACKED)
def test_models_whose_sequences_would_affect_each_other_stay_padded(reason, rows):
    kind, changes = UNPACKED[reason]
    model = build_policy(kind, **changes)
    assert not can_pack(model)
    assert model.config._attn_implementation != "sdpa_by_sequence"
    padded_inputs = make_padded_inputs(rows)
    assert pack_if_faster(model, padded_inputs) is padded_inputs


def test_an_attention_other_than_sdpa_is_not_replaced():
    model = build_policy("llama", attn_implementation="eager")
    assert not can_pack(model) and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", RESTRICTION_OPTIONS)
def test_a_model_with_an_unsupported_attention_option_stays_padded(name):
    model = build_policy("llama")
    layer = model.model.layers[1].self_attn
    inner = layer.forward
    layer.forward = lambda *inputs, **options: inner(*inputs, **options, **{name: 1})
    assert not can_pack(model) and model.config._attn_implementation == "sdpa"


def test_rows_with_little_padding_stay_padded(rows):
    """Separate attention for four short sequences would cost more than three positions each."""
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1] * 5]).bool()
    padded_inputs = build_padded_inputs(rows.prompt_ids, torch.ones_like(rows.prompt_mask), rows.response_ids, mask)
    assert pack_if_faster(build_policy("llama"), padded_inputs) is padded_inputs


def test_a_model_that_mixes_positions_outside_attention_stays_padded():
    model = build_policy("llama")
    mixed = model.model.layers[0].mlp
    inner = mixed.forward
    mixed.forward = lambda states: inner(states + 0.1 * states.roll(1, dims=1))
    assert not can_pack(model)


def test_rows_without_padding_or_without_a_prompt_stay_padded(rows):
    model = build_policy("gpt_neox")
    full = replace(rows, prompt_mask=torch.ones_like(rows.prompt_mask), mask=torch.ones_like(rows.mask))
    none = replace(rows, prompt_mask=rows.prompt_mask & (torch.arange(4) != 1).unsqueeze(1))
    for batch in (full, none):
        padded_inputs = make_padded_inputs(batch)
        assert pack_if_faster(model, padded_inputs) is padded_inputs
    assert isinstance(pack_if_faster(model, make_padded_inputs(rows)), PackedInputs)


def test_a_saved_config_does_not_name_the_packing_attention(rows, tmp_path):
    model = build_policy("llama")
    assert can_pack(model)
    model.save_pretrained(tmp_path)
    assert "sdpa_by_sequence" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("queries", "keys", "wide"), [(1, 300, True), (40, 40, True), (300, 300, False)])
def test_short_attention_of_half_precision_is_computed_in_float32(queries, keys, wide, autocast):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 16).bfloat16() for n in (queries, keys, keys))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask
    ).transpose(1, 2)
    module = torch.nn.Module()
    module.is_causal = False
    query.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result, _ = attend_per_sequence(module, query, key, value, mask)
    assert result.dtype is torch.bfloat16
    result.sum().backward()
    assert query.grad.dtype is torch.bfloat16 and bool(query.grad.any())
    # a result computed in float32 is the nearest bfloat16 number everywhere
    assert torch.equal(result, exact.bfloat16()) == wide
