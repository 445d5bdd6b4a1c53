"""What a pass costs, against what PyTorch counts of the same pass: to the operation."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from apa_cli.hardware.roofline import Cost, backward_flops, forward_flops
from apa_cli.models.flops import cached_numbers, classifier_cost, policy_cost, training_cost, values_cost
from apa_cli.models.forward import response_logprobs
from apa_cli.training.build import training_model
from apa_cli.types import Tokens

ROWS, PROMPT, RESPONSE = 2, 5, 4
LENGTH = PROMPT + RESPONSE - 1
LENGTHS, OUTPUTS = [LENGTH] * ROWS, ROWS * RESPONSE
UNSEEN = ROWS * (LENGTH**2 - LENGTH * (LENGTH + 1) // 2)
"""Pairs that eager attention computes and then masks."""

NEOX = AutoConfig.for_model(
    "gpt_neox", vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40,
    rotary_pct=0.5, attn_implementation="eager", hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LLAMA = AutoConfig.for_model(
    "llama", vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, intermediate_size=40, attn_implementation="eager",
)  # fmt: skip
GPT2 = AutoConfig.for_model("gpt2", vocab_size=60, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager")


@pytest.fixture(autouse=True)
def plain_head(monkeypatch):
    """The output head as an ordinary layer: PyTorch does not count products that are written into given memory."""
    monkeypatch.setattr("apa_cli.models.forward.linear_head", lambda model: None)


def policy(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens() -> Tokens:
    ids = torch.arange(ROWS * (PROMPT + RESPONSE)).view(ROWS, -1) % 60
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Tokens(ids[:, :PROMPT], mask[:, :PROMPT], ids[:, PROMPT:], mask[:, PROMPT:])


def counted(work: Callable[[], object]) -> int:
    """PyTorch's count, without the angles of rotary embeddings, which some versions of `transformers` multiply out."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts().items()
    angles = sum(sum(found.values()) for name, found in counts if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


def forward(cost: Cost, outputs: int) -> int:
    return forward_flops(cost, LENGTHS, outputs) + UNSEEN * cost.attention


@pytest.mark.parametrize("config", [NEOX, LLAMA, GPT2], ids=lambda config: config.model_type)
def test_log_probs_of_an_architecture(config):
    model = policy(config)
    with torch.no_grad():
        found = counted(lambda: response_logprobs(model, tokens(), 1.0))
    assert found == forward(policy_cost(model), OUTPUTS)


def test_by_hand():
    # A block: 16 · 48 + 16 · 16 + 2 · 16 · 40 = 2304 weights, three of them; the head 16 · 60.
    cost = policy_cost(policy(NEOX))
    assert (cost.linear, cost.head) == (2 * 3 * 2304, 2 * 960)
    # The gradient of weights and of inputs; the first block's input too, for the embedding is trained.
    assert (cost.linear_backward, cost.head_backward) == (2 * cost.linear, 2 * cost.head)
    assert (cost.attention, cost.attention_backward) == (4 * 3 * 16, 8 * 3 * 16)
    assert (cost.weights, cost.cached) == (3 * 2304 + 960, 2 * 3 * 16)


def test_the_cache_holds_the_key_value_heads_only():
    assert cached_numbers(LLAMA) == 2 * 2 * 2 * 6


TRAINED = {
    "everything": [],
    "head": ["critic=head"],
    "top": ["model.trainable_layers=1"],
    "top-head": ["model.trainable_layers=1", "critic=head"],
    "lora": ["lora=default"],
    "lora-adapter": ["lora=default", "critic=adapter"],
    "lora-all": ["lora=default", "critic=adapter", "lora.target_modules=[all-linear]"],
    "mlp-head": ["critic.head=mlp"],
    "no-critic": ["algo.advantage_estimator=group_mean", "samples_per_prompt=2"],
}


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("words", TRAINED.values(), ids=TRAINED)
def test_a_pass_of_the_update(words, recomputed, configured):
    config = configured(*words, f"model.gradient_checkpointing={str(recomputed).lower()}")
    model, reference = training_model(config, policy(copy.deepcopy(NEOX)))
    cost = training_cost(model)

    def both() -> None:
        output = model(tokens())
        (output.logprobs.sum() + sum(values.sum() for values in output.values.values())).backward()

    with set_checkpoint_early_stop(False):
        found = counted(both)
    backward = backward_flops(cost, LENGTHS, OUTPUTS, recomputed)
    masked = UNSEEN * (cost.attention_backward + (cost.attention if recomputed else 0))
    assert found == forward(cost, OUTPUTS) + backward + masked
    with torch.no_grad():
        found = counted(lambda: response_logprobs(reference, tokens(), 1.0))
        assert found == forward(policy_cost(reference), OUTPUTS)


@pytest.mark.parametrize("words", [[], ["lora=default"], ["lora=default", "critic=adapter"]])
def test_the_values_alone(words, configured):
    model, _ = training_model(configured(*words), policy(NEOX))
    with torch.no_grad():
        found = counted(lambda: model(tokens(), with_policy=False))
    assert found == forward(values_cost(model, "value"), OUTPUTS)


def test_a_reward_model():
    config = copy.deepcopy(NEOX)
    config.num_labels, config.pad_token_id = 1, 59
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    with torch.no_grad():
        found = counted(lambda: model(input_ids=ids))
    assert found == forward(classifier_cost(model), 0)


def test_nothing_is_left_behind_on_the_model():
    model = policy(NEOX)
    policy_cost(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
