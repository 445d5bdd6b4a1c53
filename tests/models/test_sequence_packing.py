"""Sequences one behind the other give what each gives alone, in every family that takes them; others stay padded."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from apa_cli.models import forward
from apa_cli.models.critic import build_critic
from apa_cli.models.forward import (
    Packed,
    TrainingModel,
    checkpoint_activations,
    response_logprobs,
    response_states,
    sequences,
    taken,
)
from apa_cli.models.lora import POLICY, WithoutAdapter, add_adapter
from apa_cli.models.sequence_packing import RESTRICTIONS, attention, packs
from apa_cli.settings import CriticInit, CriticKind, CriticSettings, HeadKind, LoraSettings
from apa_cli.types import Tokens

close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-6)

LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
GPT = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
TAKE = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2,
    ),
    "gpt2": GPT2Config(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=4),
    "llama": LlamaConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA),
}  # fmt: skip
LEFT = {
    "a window": MistralConfig(**LLAMA, sliding_window=4),
    "an attention of its own": FalconConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2
    ),
    "a loss that reads the mask": MixtralConfig(**LLAMA, num_local_experts=2, output_router_logits=True),
    "positions read off the mask": BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2),
}


def made(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.fixture
def rows() -> Tokens:
    """Prompts of 1 to 6 tokens; responses of 0, 2 and 4, the last of which begins with two that do not count."""
    torch.manual_seed(1)
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    before = torch.tensor([[0] * (6 - n) + [1] * n for n in (3, 1, 6, 4)]).bool()
    return Tokens(torch.randint(1, 50, before.shape), before, torch.randint(1, 50, mask.shape), mask)


@pytest.fixture
def padded(monkeypatch):
    """padded(compute) → the same with `packs` false of every model."""

    def run(compute):
        with monkeypatch.context() as patch:
            patch.setattr(forward, "packs", lambda model: False)
            return compute()

    return run


def computed(model: torch.nn.Module, run) -> list[tuple[int, ...]]:
    """Shapes of what goes into the model's embedding during `run`."""
    shapes = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    run()
    handle.remove()
    return shapes


@pytest.mark.parametrize("family", TAKE)
def test_log_probs_and_values_are_those_of_padded_rows_and_no_padding_is_computed(family, rows, padded):
    policy = made(TAKE[family])
    kind = CriticSettings(kind=CriticKind.separate, init=CriticInit.policy, head=HeadKind.mlp)
    critic = build_critic(policy, kind, LoraSettings(rank=0, alpha=1.0, target_modules=None), "value", 3, None)
    torch.nn.init.normal_(critic.head[2].weight)
    model = TrainingModel(policy, {"value": critic}, 0.7)
    expected, found = padded(lambda: model(rows)), model(rows)
    close(found.logprobs, expected.logprobs)
    close(found.values["value"], expected.values["value"])
    assert found.logprobs[rows.mask].all() and not found.logprobs[~rows.mask].any()
    # prompts 3 + 1 + 6 + 4, and the responses up to their last token that counts, itself not among them: 0, 1, 3, 4
    for part in (policy, critic.backbone):
        assert computed(part, lambda: model(rows)) == [(1, 14 + 8)]
    assert padded(lambda: computed(policy, lambda: model(rows))) == [(4, 6 + 4)]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
def test_gradients_are_those_of_padded_rows(again, rows, padded):
    model = TrainingModel(made(TAKE["llama"]), {}, 1.0)
    if again:
        checkpoint_activations(model.policy)

    def gradients():
        model.zero_grad()
        (model(rows).logprobs * torch.arange(1.0, 6.0)).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, found = padded(gradients), gradients()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_and_the_base_without_them(rows, padded):
    policy, lora = made(TAKE["gpt_neox"]), LoraSettings(rank=2, alpha=4.0, target_modules=None)
    add_adapter(policy, lora, POLICY, 0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    kind = CriticSettings(kind=CriticKind.adapter, init=CriticInit.policy, head=HeadKind.mlp)
    critic = build_critic(policy, kind, lora, "value", 3, None)
    torch.nn.init.normal_(critic.head[2].weight)
    model, reference = TrainingModel(policy, {"value": critic}, 1.0), WithoutAdapter(policy)
    expected, found = padded(lambda: model(rows)), model(rows)
    close(found.logprobs, expected.logprobs)
    close(found.values["value"], expected.values["value"])
    base = response_logprobs(reference, rows, 1.0)
    close(base, padded(lambda: response_logprobs(reference, rows, 1.0)))
    assert float((base - found.logprobs).abs().max()) > 0.01


def test_a_critic_on_the_trunk_reads_the_states_of_the_same_rows(rows, padded):
    policy = made(TAKE["qwen2"])
    kind = CriticSettings(kind=CriticKind.head, init=CriticInit.policy, head=HeadKind.mlp)
    critic = build_critic(policy, kind, LoraSettings(rank=0, alpha=1.0, target_modules=None), "value", 3, None)
    torch.nn.init.normal_(critic.head[2].weight)
    model = TrainingModel(policy, {"value": critic}, 1.0)
    close(model(rows).values["value"], padded(lambda: model(rows)).values["value"])


@torch.no_grad()
def test_states_before_the_head_come_in_the_order_of_the_mask(rows, padded):
    policy = made(TAKE["gptj"])
    given = sequences(rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.mask)
    states, _ = response_states(policy, given)
    close(states, padded(lambda: response_states(policy, given)[0]))
    assert len(states) == int(rows.mask.sum())


@pytest.mark.parametrize("why", LEFT)
def test_models_that_look_across_are_left_padded(why, rows):
    model = made(LEFT[why])
    assert not packs(model)
    assert model.config._attn_implementation != "sdpa_by_sequence"
    given = sequences(rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.mask)
    assert taken(model, given) is given


def test_another_attention_is_kept():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TAKE["llama"]), attn_implementation="eager").eval()
    assert not packs(model) and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_a_layer_that_asks_for_more_than_is_known_is_left_padded(name):
    model = made(TAKE["llama"])
    layer = model.model.layers[1].self_attn
    inner = layer.forward
    layer.forward = lambda *given, **options: inner(*given, **options, **{name: 1})
    assert not packs(model) and model.config._attn_implementation == "sdpa"


def test_little_padding_is_computed(rows):
    """Taking four short sequences apart would cost more than three positions each."""
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1] * 5]).bool()
    given = sequences(rows.prompt_ids, torch.ones_like(rows.prompt_mask), rows.response_ids, mask)
    assert taken(made(TAKE["llama"]), given) is given


def test_a_model_whose_positions_mix_outside_of_attention_is_left_padded():
    model = made(TAKE["llama"])
    mixed = model.model.layers[0].mlp
    inner = mixed.forward
    mixed.forward = lambda states: inner(states + 0.1 * states.roll(1, dims=1))
    assert not packs(model)


def test_rows_without_padding_or_without_a_prompt_stay_as_they_are(rows):
    model = made(TAKE["gpt_neox"])
    full = replace(rows, prompt_mask=torch.ones_like(rows.prompt_mask), mask=torch.ones_like(rows.mask))
    none = replace(rows, prompt_mask=rows.prompt_mask & (torch.arange(4) != 1).unsqueeze(1))
    for given in (full, none):
        asked = sequences(given.prompt_ids, given.prompt_mask, given.response_ids, given.mask)
        assert taken(model, asked) is asked
    asked = sequences(rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.mask)
    assert isinstance(taken(model, asked), Packed)


def test_what_is_saved_says_nothing_of_it(rows, tmp_path):
    model = made(TAKE["llama"])
    assert packs(model)
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
        found, _ = attention(module, query, key, value, mask)
    assert found.dtype is torch.bfloat16
    found.sum().backward()
    assert query.grad.dtype is torch.bfloat16 and bool(query.grad.any())
    # computed in float32 it is the nearest number of bfloat16 everywhere
    assert torch.equal(found, exact.bfloat16()) == wide
