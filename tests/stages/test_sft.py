"""The SFT stage: perplexity by hand, a model that learns, and the errors for data without replies."""

import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.datasets.base import PromptStyle
from apa_cli.datasets.embedded import EmbeddedDataset
from apa_cli.errors import UserError
from apa_cli.models.loading import find_end_token_ids, save_model
from apa_cli.models.prompting import PromptFormat
from apa_cli.stages.sft import compute_perplexity, train_sft_model
from apa_cli.types import Example
from tests.builders import build_tiny_policy, make_stage_context

OVERRIDES = [
    "sft.epochs=2", "sft.batch_size=8", "sft.lr=5e-3", "sft.weight_decay=0", "sft.warmup_ratio=0.1",
    "sft.max_tokens=100", "sft.held_out=20",
]  # fmt: skip
ROWS = EmbeddedDataset(80, 20, 0, [])
PROMPT, REPLY = "\n\nHuman: How long does it take?\n\nAssistant:", " It takes about three hours."


def configure_model(folder):
    """Return a configuration whose stage starts from the model in `folder`."""
    return build_config(compose([*OVERRIDES, "model=local", f"model.path={folder}"]))


def encode_target(tokenizer, prompt, reply, max_tokens):
    return PromptFormat(tokenizer, PromptStyle.hh).encode_target(Example(prompt, reply, None, {}), max_tokens).row


def test_perplexity_by_hand(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    rows = [
        encode_target(tokenizer, PROMPT, REPLY, 100),
        encode_target(tokenizer, PROMPT + " more", " No.", 100),
        encode_target(tokenizer, "x", " Yes, it does.", 100),
    ]
    total, count = 0.0, 0
    for ids, flags in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, token in enumerate(ids):
            if flags[position]:
                total, count = total + float(logprobs[position - 1, token]), count + 1
    expected = math.exp(-total / count)
    for batch in (1, 2, 3):
        assert compute_perplexity(model, rows, tokenizer.pad_token_id, batch) == pytest.approx(expected, rel=1e-4)


def test_sft_lowers_perplexity_and_is_repeatable(tiny, tmp_path):
    train, test = ROWS.load("train"), ROWS.load("test")
    results = []
    for name in ("first", "second"):
        torch.manual_seed(random.randrange(1000))
        results.append(train_sft_model(configure_model(tiny), train, test, 0, make_stage_context(tmp_path / name)))
    first, second = results
    assert first["perplexity_after"] < 0.5 * first["perplexity_before"]
    assert first == second and first["replies"] == 80
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    rows = [encode_target(tokenizer, e.prompt, e.chosen, 100) for e in test]
    assert compute_perplexity(model, rows, tokenizer.pad_token_id, 8) == pytest.approx(
        first["perplexity_after"], rel=1e-4
    )


def test_sft_builds_a_model_without_model_path(tmp_path):
    dimensions = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=16"]
    architecture = [f"model.architecture.{dimension}" for dimension in dimensions]
    config = build_config(compose([*OVERRIDES, *architecture, "model.tokenizer_vocabulary=320", "sft.epochs=1"]))
    train, test = ROWS.load("train"), ROWS.load("test")
    train_sft_model(config, train, test, 0, make_stage_context(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) == 320
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_data_without_replies_is_refused(tiny, tmp_path):
    rows = [Example("a prompt", None, None, {})]
    with pytest.raises(UserError, match=r"^sft: the data set has no") as error:
        train_sft_model(configure_model(tiny), rows, rows, 0, make_stage_context(tmp_path / "x"))
    assert "\n" not in str(error.value)


# Rows that are left out or cut


def save_model_with_context(folder, tiny, positions):
    """Save a GPT-2 with this many positions and the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    save_model(
        build_tiny_policy("gpt2", vocab_size=len(tokenizer), max_position_embeddings=positions), tokenizer, folder
    )
    return tokenizer


def test_rows_are_cut_to_the_models_context_and_counted_and_rows_without_a_reply_are_left_out(tiny, tmp_path):
    tokenizer = save_model_with_context(tmp_path / "gpt2", tiny, 24)
    rows = [
        Example("Short?", " Yes.", None, {}),
        Example("A long prompt. " * 20, " No.", None, {}),
        Example("Why?", " A long reply. " * 20, None, {}),
        Example("None", None, None, {}),
        Example("Empty", "", None, {}),
        Example("Blank", " \n", None, {}),
    ]
    said = []
    context = replace(make_stage_context(tmp_path / "model"), say=said.append)
    result = train_sft_model(configure_model(tmp_path / "gpt2"), rows, rows, 0, context)
    assert result["replies"] == 3 and all(math.isfinite(value) for value in result.values())
    assert said[0] == "sft: 3 of 6 train rows have no chosen reply and are left out"
    assert said[1] == "sft: 3 of 6 held-out rows have no chosen reply and are left out"
    # The long reply leaves one token of its prompt, which has more.
    assert len(tokenizer("Why?")["input_ids"]) > 1
    assert said[2] == (
        "sft: of 3 train rows, 2 lose text of their prompt and 1 the end of their reply, because sft.max_tokens and "
        "the model's context allow 24 tokens"
    )
    count = len(tokenizer("Short?")["input_ids"]), len(tokenizer(" Yes.")["input_ids"]) + 1
    assert said[3] == f"sft: first row, {count[0]} + {count[1]} tokens: 'Short?' → ' Yes.<|endoftext|>'"
    assert said[4].startswith("sft: of 3 held-out rows, 2 lose")


def test_the_saved_model_ends_a_reply_as_the_chat_template_does(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = build_tiny_policy(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    save_model(model, tokenizer, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    assert find_end_token_ids(saved, tokenizer) == {tokenizer.eos_token_id, end}
