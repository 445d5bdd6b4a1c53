"""Trainable top layers: the weights that stay frozen below them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from apa_cli.errors import ConfigError
from apa_cli.models.structure import freeze_all_but_top


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
