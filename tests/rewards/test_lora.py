"""reward=model on a LoRA adapter: W + alpha/r · B·A in the adapted layers, and the adapter's own score head."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apa_cli.errors import UserError
from apa_cli.rewards.base import Placement
from apa_cli.rewards.model import ModelReward

RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter on the tiny model, every factor of it and its head random; no tokenizer in its folder."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    config = LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=["query_key_value"], modules_to_save=["score"]
    )
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1.0 if "score" in name else 0.2)
    model.save_pretrained(folder)
    return folder


def expected(tiny, adapter, texts):
    """The scores of a base model whose weights are changed by hand."""
    learnt = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        for number, layer in enumerate(model.gpt_neox.layers):
            name = f"base_model.model.gpt_neox.layers.{number}.attention.query_key_value.lora_"
            product = learnt[f"{name}B.weight"] @ learnt[f"{name}A.weight"]
            layer.attention.query_key_value.weight += ALPHA / RANK * product
        model.score.weight.copy_(learnt["base_model.model.score.weight"])
        ids = [tokenizer(p + r, return_tensors="pt")["input_ids"] for p, r, _ in zip(*texts, strict=True)]
        return [float(model(row, attention_mask=torch.ones_like(row)).logits[0, 0]) for row in ids]


def score(path, texts):
    return ModelReward(str(path), 0, 1.0, False, None, 3, 64).load(Placement("cpu", "float32"))(*texts)


def copied(adapter, folder, **changes):
    """A copy of the adapter with its configuration changed."""
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def refused(path, texts):
    with pytest.raises(UserError) as error:
        score(path, texts)
    assert "\n" not in str(error.value) and str(error.value).startswith("reward.path: ")
    return str(error.value)


def test_the_adapter_is_merged_into_its_base(tiny, adapter, texts):
    values = expected(tiny, adapter, texts)
    assert score(adapter, texts) == pytest.approx(values, rel=0, abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()
    assert len(set(values)) == 4 and plain.config.num_labels == 1


def test_the_tokenizer_is_the_adapters_where_it_has_one(tiny, adapter, texts, tmp_path):
    # A base folder without a tokenizer: the adapter's own must do.
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, base / name)
    own = copied(adapter, tmp_path / "own", base_model_name_or_path=str(base))
    assert refused(own, texts).endswith(f"{base} holds no tokenizer")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(own)
    assert score(own, texts) == pytest.approx(expected(tiny, adapter, texts), rel=0, abs=1e-5)


def test_an_adapter_of_another_task(adapter, texts, tmp_path):
    message = refused(copied(adapter, tmp_path / "other", task_type="CAUSAL_LM"), texts)
    assert "adapter of task CAUSAL_LM" in message and "SEQ_CLS" in message


def test_an_adapter_without_a_head_is_refused_because_the_head_would_be_random(adapter, texts, tmp_path):
    headless = copied(adapter, tmp_path / "headless")
    tensors = load_file(headless / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "score" not in name}, headless / "adapter_model.safetensors")
    assert "no score head" in refused(headless, texts)


def test_a_base_that_is_not_there(adapter, texts, tmp_path):
    gone = copied(adapter, tmp_path / "gone", base_model_name_or_path=str(tmp_path / "nowhere"))
    assert "nowhere" in refused(gone, texts)
