"""Cost of a pass: equal to PyTorch's count of the same pass, to the operation."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from apa_cli.hardware.roofline import ModelCost, count_backward_flops, count_forward_flops
from apa_cli.models.critic import build_critic
from apa_cli.models.flops import (
    count_kv_cache_numbers,
    measure_classifier_cost,
    measure_critic_cost,
    measure_policy_cost,
    measure_training_cost,
)
from apa_cli.models.forward import TrainingModel, compute_response_logprobs
from apa_cli.training.models import build_training_model
from apa_cli.types import Critic, Sequences
from tests.builders import build_random_policy

ROWS, PROMPT, RESPONSE = 2, 5, 4
LENGTH = PROMPT + RESPONSE - 1
LENGTHS, OUTPUTS = [LENGTH] * ROWS, ROWS * RESPONSE
MASKED_PAIRS = ROWS * (LENGTH**2 - LENGTH * (LENGTH + 1) // 2)
"""Pairs of positions that eager attention computes and then masks."""

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
    """Compute the output head as an ordinary layer, whose matrix products PyTorch counts."""
    monkeypatch.setattr("apa_cli.models.forward.find_linear_head", lambda model: None)


def make_tokens() -> Sequences:
    ids = torch.arange(ROWS * (PROMPT + RESPONSE)).view(ROWS, -1) % 60
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Sequences(
        prompt_ids=ids[:, :PROMPT],
        prompt_mask=mask[:, :PROMPT],
        response_ids=ids[:, PROMPT:],
        mask=mask[:, PROMPT:],
        on_policy=mask[:, PROMPT:],
    )


def count_flops(work: Callable[[], object]) -> int:
    """Return PyTorch's count without rotary angles, which some versions of `transformers` compute by a product."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts().items()
    angles = sum(sum(count.values()) for name, count in counts if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


def compute_forward_flops(cost: ModelCost, outputs: int) -> int:
    return count_forward_flops(cost, LENGTHS, outputs) + MASKED_PAIRS * cost.attention


@pytest.mark.parametrize("config", [NEOX, LLAMA, GPT2], ids=lambda config: config.model_type)
def test_flops_of_log_probs_by_architecture(config):
    model = build_random_policy(config)
    with torch.no_grad():
        flops = count_flops(lambda: compute_response_logprobs(model, make_tokens(), 1.0))
    assert flops == compute_forward_flops(measure_policy_cost(model), OUTPUTS)


def test_cost_by_hand():
    # A block: 16 · 48 + 16 · 16 + 2 · 16 · 40 = 2304 weights, three of them; the head 16 · 60.
    cost = measure_policy_cost(build_random_policy(NEOX))
    assert (cost.linear, cost.head) == (2 * 3 * 2304, 2 * 960)
    # The gradient of weights and of inputs; the first block's input too, for the embedding is trained.
    assert (cost.linear_backward, cost.head_backward) == (2 * cost.linear, 2 * cost.head)
    assert (cost.attention, cost.attention_backward) == (4 * 3 * 16, 8 * 3 * 16)
    assert (cost.weights, cost.kv_cache_numbers) == (3 * 2304 + 960, 2 * 3 * 16)


def test_the_kv_cache_counts_key_value_heads_only():
    assert count_kv_cache_numbers(LLAMA) == 2 * 2 * 2 * 6


OVERRIDES = {
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


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            overrides, id=name, marks=[] if name in ("everything", "top-head", "lora-all") else pytest.mark.slow
        )
        for name, overrides in OVERRIDES.items()
    ],
)
def test_flops_of_an_update_pass(overrides, checkpointing, make_config):
    config = make_config(*overrides, f"model.gradient_checkpointing={str(checkpointing).lower()}")
    model, reference = build_training_model(config, build_random_policy(NEOX))
    cost = measure_training_cost(model)

    def run_pass() -> None:
        output = model(make_tokens())
        (output.logprobs.sum() + sum(values.sum() for values in output.values.values())).backward()

    with set_checkpoint_early_stop(False):
        flops = count_flops(run_pass)
    backward = count_backward_flops(cost, LENGTHS, OUTPUTS, checkpointing)
    masked = MASKED_PAIRS * (cost.attention_backward + (cost.attention if checkpointing else 0))
    assert flops == compute_forward_flops(cost, OUTPUTS) + backward + masked
    with torch.no_grad():
        flops = count_flops(lambda: compute_response_logprobs(reference, make_tokens(), 1.0))
        assert flops == compute_forward_flops(measure_policy_cost(reference), OUTPUTS)


@pytest.mark.parametrize("overrides", [[], ["lora=default"], ["lora=default", "critic=adapter"]])
def test_flops_of_values_alone(overrides, make_config):
    model, _ = build_training_model(make_config(*overrides), build_random_policy(NEOX))
    with torch.no_grad():
        flops = count_flops(lambda: model(make_tokens(), with_policy=False))
    assert flops == compute_forward_flops(measure_critic_cost(model, "value"), OUTPUTS)


def test_flops_of_a_reward_model():
    config = copy.deepcopy(NEOX)
    config.num_labels, config.pad_token_id = 1, 59
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    with torch.no_grad():
        flops = count_flops(lambda: model(input_ids=ids))
    assert flops == compute_forward_flops(measure_classifier_cost(model), 0)


@pytest.mark.parametrize("on", ["trunk", "configured"])
def test_a_polyak_copy_costs_a_forward_pass_and_no_backward_pass(on, make_config):
    policy, spec = build_random_policy(NEOX), Critic("q", kind="action", on=on, head="linear", polyak=0.1)
    config = make_config()
    critic = build_critic(policy, spec, config.critic, config.lora, 0, None)
    alone = measure_training_cost(TrainingModel(policy, {"q": critic}, 1.0))
    model = TrainingModel(policy, {"q": critic}, 1.0, [spec])
    copied = measure_critic_cost(model, "q/target")
    # the head of Q: 16 · 60 weights
    assert (copied.head, copied.head_backward) == (2 * 960, 0)
    extra = replace(copied, linear=0, attention=0, weights=960, kv_cache_numbers=0) if on == "trunk" else copied
    extra = replace(extra, linear_backward=0, attention_backward=0)
    assert measure_training_cost(model) == alone + extra
    if on == "configured":
        assert copied.linear_backward == copied.attention_backward == 0 < copied.linear


def test_measuring_leaves_neither_hooks_nor_gradients():
    model = build_random_policy(NEOX)
    measure_policy_cost(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
