"""Structure of models: the trainable top layers, and the context length."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from apa_cli.errors import ConfigError
from apa_cli.models.structure import compute_context_length, freeze_all_but_top, get_context_length
from tests.builders import build_tiny_policy, make_tiny_config


def find_trained_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_only_the_top_layers_are_trained(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    freeze_all_but_top(model, 1)
    names = find_trained_names(model)
    assert all(
        name.startswith(("gpt_neox.layers.1.", "gpt_neox.final_layer_norm.", "lm_head.", "embed_out."))
        for name in names
    )
    everything = [n for n, _ in model.named_parameters()]
    assert {n for n in everything if n.startswith(("gpt_neox.layers.1.", "gpt_neox.final_layer_norm."))} <= set(names)
    assert any("lm_head" in name or "embed_out" in name for name in names)  # GPT-NeoX's output matrix is untied
    freeze_all_but_top(model, 0)
    assert not any("layers." in name for name in find_trained_names(model))


def test_a_tied_output_matrix_is_frozen_with_the_embeddings():
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    freeze_all_but_top(model, 2)
    assert {name.split(".")[2] for name in find_trained_names(model) if "layers" in name} == {"1", "2"}
    assert [name for name in find_trained_names(model) if "layers" not in name] == ["model.norm.weight"]
    with pytest.raises(ConfigError):
        freeze_all_but_top(model, 4)


def test_frozen_layers_do_not_change(run_train, tiny):
    directory = run_train("model.trainable_layers=1", "optimizer.lr=1e-2")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny, directory / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(".layers.0." in name or "embed_in" in name for name in changed)
    assert any(".layers.1." in name for name in changed)


# Context length


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "length"),
    [
        ("gpt_neox", {}, 64),
        ("opt", {}, 64),  # its table has 66 rows, of which the first two are never read
        ("mistral", {"sliding_window": 8}, 64),
        ("bloom", {}, None),
        ("falcon", {}, 64),
        ("falcon", {"alibi": True}, None),
        ("mamba", {}, None),
        ("rwkv", {"context_length": 64}, None),
        ("mpt", {"max_seq_len": 32}, 32),  # its table of biases has this size
        ("xlnet", {}, None),  # its configuration says -1
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 128),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 64),
        ("qwen2", {"rope_parameters": YARN}, 256),  # 4 · 64
        ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 8}}, 64),  # 4 · 8, already 64
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, 16),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            64,
        ),
    ],
)
def test_a_configuration_states_its_context_length(kind, changes, length):
    limit = {} if kind in ("bloom", "mamba", "rwkv", "mpt", "xlnet") else {"max_position_embeddings": 64}
    assert compute_context_length(AutoConfig.for_model(kind, **{**limit, **changes})) == length


def test_rows_of_the_position_table_that_are_for_padding_are_no_positions():
    roberta = AutoModelForSequenceClassification.from_config(make_tiny_config("roberta", pad_token_id=1))
    assert get_context_length(roberta) == 62  # 64 rows; positions start after the padding's, at row 2
    ids = torch.full((1, 62), 3)
    roberta(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 63), 3))
    bert = AutoModelForSequenceClassification.from_config(make_tiny_config("bert"))
    assert get_context_length(bert) == 64
    assert get_context_length(build_tiny_policy("opt", ffn_dim=16, word_embed_proj_dim=16)) == 64


def test_the_last_norm_is_what_runs_after_the_blocks():
    opt = build_tiny_policy("opt", ffn_dim=16, word_embed_proj_dim=16, num_hidden_layers=2)
    freeze_all_but_top(opt, 1)  # OPT's blocks are two levels deep, and its last norm is declared before them
    parts = {name.rpartition("layers.")[2].split(".")[0] for name in find_trained_names(opt)}
    assert parts == {"1", "model"} and "model.decoder.final_layer_norm.weight" in find_trained_names(opt)
    assert not any("project" in name or "embed" in name for name in find_trained_names(opt))
