"""Probe of language models for left padding and cached decoding."""

import pytest
import torch
from transformers import AutoConfig

from apa_cli.errors import UserError
from apa_cli.models.loading import load_policy
from apa_cli.models.padding_probe import build_probe_rows, measure_difference, measure_padding_difference
from apa_cli.rollout.sampling_probe import check_sampling
from apa_cli.settings import DType
from tests.builders import build_random_policy, build_tiny_policy

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATE = {"state_size": 8}
ACCEPTED = {
    "gpt2": {}, "gpt_neox": {}, "gptj": {"rotary_dim": 4}, "bloom": {}, "falcon": {"alibi": True}, "llama": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "mistral": {"sliding_window": 2}, "mixtral": MOE, "gemma2": {"head_dim": 8, "sliding_window": 2},
    "llama4_text": {**MOE, "head_dim": 8, "attention_chunk_size": 8, "intermediate_size_mlp": 48}, "mamba": STATE,
    "mamba2": {**STATE, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
}  # fmt: skip
REFUSED = {
    "rwkv": ({"attention_hidden_size": 32, "context_length": 64}, "padding precedes it"),
    "roberta": ({"is_decoder": True}, "padding precedes it"),
    "bert": ({}, "one by one"),
    "recurrent_gemma": ({"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}, "one by one"),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "cannot decode token by token"),
}
"""model_type → sizes, and what the error says."""


def build(kind: str, sizes: dict):
    return build_random_policy(AutoConfig.for_model(kind, **{**SIZES, **sizes}))


@pytest.mark.parametrize("kind", ["gpt_neox", "mamba"])
@pytest.mark.parametrize("dtype", DType)
def test_a_causal_model_is_accepted(kind, dtype):
    check_sampling(build_tiny_policy(kind), dtype, "model.path")


def test_models_are_loaded_without_the_router_logits_that_decoding_with_a_cache_cannot_have(tmp_path, make_config):
    build(kind="mixtral", sizes={**MOE, "output_router_logits": True}).save_pretrained(tmp_path)
    check_sampling(load_policy(make_config().model, str(tmp_path)), DType.float32, "model.path")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCEPTED)
@pytest.mark.parametrize("dtype", DType)
def test_these_families_are_accepted(kind, dtype):
    check_sampling(build(kind, ACCEPTED[kind]), dtype, "model.path")


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_these_families_are_refused_in_one_line(kind):
    sizes, reason = REFUSED[kind]
    with pytest.raises(UserError, match=rf"^guide.path: this {kind} model .*{reason}.*") as error:
        check_sampling(build(kind, sizes), DType.float32, "guide.path")
    assert "\n" not in str(error.value)


def test_a_bidirectional_model_is_refused():
    with pytest.raises(UserError, match=r"^model.path: this bert model .*one by one with a cache"):
        check_sampling(build_tiny_policy("bert"), DType.float32, "model.path")


def test_damaged_weights_are_refused():
    policy = build_tiny_policy()
    with torch.no_grad():
        policy.get_output_embeddings().weight[3, 2] = torch.nan
    with pytest.raises(UserError, match=r"^model.path: the logits of this gpt_neox model are not finite"):
        check_sampling(policy, DType.float32, "model.path")


def test_the_difference_is_relative_and_leaves_hidden_logits_out():
    expected = torch.tensor([3.0, 4.0, -1e30])
    assert measure_difference(torch.tensor([3.0, 4.5, -1e30]), expected) == pytest.approx(0.1)  # 0.5 / |(3, 4)| = 5
    assert measure_difference(expected, expected) == 0


def test_rows_avoid_the_pad_token():
    assert build_probe_rows(33, pad_id=6) == [[3, 9, 12], [15, 18, 21, 24, 27, 30, 3]]  # every third token, 6 left out


@pytest.mark.parametrize(("side", "is_equal"), [("left", False), ("right", True)])
def test_a_score_of_the_first_column_depends_on_padding_on_its_left(side, is_equal):
    def score_first_token(inputs):
        return inputs["input_ids"][:, 0].float()

    difference = measure_padding_difference(score_first_token, 33, 0, torch.device("cpu"), side)
    # The first tokens are 3 and 12; on the left the shorter row begins with padding, 0: 3 / |(3, 12)| = 0.2425.
    assert difference == pytest.approx(0.0 if is_equal else 3 / (9 + 144) ** 0.5)
