"""Synthetic inputs of apa-bench: memory by hand, lengths of prompts, and the tokenizer of numbers."""

import pytest
import torch

from apa_cli.bench.synthetic import build_number_tokenizer, check_memory, estimate_memory, spread_lengths
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.errors import UserError
from apa_cli.models.loading import load_model_config

# Two blocks of 32 · 96 + 32 · 32 + 2 · 32 · 64 weights, and a head of 32 · 600.
TRUNK, HEAD = 2 * 8192, 19200


def test_memory_by_hand(make_config, tiny):
    config = make_config("sampling.microbatch_size=4")
    embedding, norms_and_biases = 600 * 32, 2 * (4 * 32 + 96 + 32 + 64 + 32) + 2 * 32
    trunk = TRUNK + embedding + norms_and_biases
    assert estimate_memory(config, load_model_config(config.model, str(tiny))) == {
        "policy": 16 * (trunk + HEAD),
        "critic value": 16 * trunk,
        "reference": 4 * (trunk + HEAD),
        "reward": 4 * (trunk + 32),
        "key-value cache": 4 * (100 + 12) * 2 * 2 * 32 * 4,
    }


def test_memory_of_a_hub_model_without_the_hub():
    config = build_config(compose(["model=pythia_160m", "lora=default", "critic=adapter", "model.dtype=bfloat16"]))
    memory = estimate_memory(config, load_model_config(config.model, config.model.path))
    adapter = 12 * 16 * (768 + 3 * 768)  # rank 16 on query_key_value
    assert memory["policy"] == 2 * 162_322_944 + 16 * adapter
    assert memory["critic value"] == 16 * adapter
    assert "reference" not in memory


def test_models_may_fill_the_memory():
    check_memory({"policy": 6.0, "reward": 4.0}, 10.0, torch.device("cpu"))
    with pytest.raises(UserError, match="most of it for the policy"):
        check_memory({"policy": 6.0, "reward": 4.0}, 9.0, torch.device("cpu"))


def test_lengths_are_spread_evenly():
    assert spread_lengths(8, 16, 100) == [16, 28, 40, 52, 64, 76, 88, 100]
    assert spread_lengths(1, 5, 9) == [5]


def test_the_tokenizer_writes_tokens_as_numbers():
    tokenizer = build_number_tokenizer(50)
    assert tokenizer("7 40 3")["input_ids"] == [7, 40, 3]
    assert tokenizer.decode([7, 49, 3], skip_special_tokens=True) == "7 49 3"
    assert len(tokenizer) == 50 and tokenizer.pad_token_id == tokenizer.eos_token_id == 0
