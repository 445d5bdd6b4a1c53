"""reward=model on a LoRA adapter: W + alpha/r · B·A in the adapted layers, and the adapter's score head."""

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
from apa_cli.settings import RewardFormat

RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """Return the folder of an adapter of the tiny model with random factors and head, and without a tokenizer."""
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


def compute_expected_scores(tiny, adapter, texts):
    """Return the scores of the base model with the adapter added to its weights by hand."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        for number, layer in enumerate(model.gpt_neox.layers):
            name = f"base_model.model.gpt_neox.layers.{number}.attention.query_key_value.lora_"
            product = tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
            layer.attention.query_key_value.weight += ALPHA / RANK * product
        model.score.weight.copy_(tensors["base_model.model.score.weight"])
        ids = [tokenizer(p + r, return_tensors="pt")["input_ids"] for p, r, _ in zip(*texts, strict=True)]
        return [float(model(row, attention_mask=torch.ones_like(row)).logits[0, 0]) for row in ids]


def score(path, texts):
    return ModelReward(str(path), 0, 1.0, False, None, 3, 64, RewardFormat.auto).load(Placement("cpu", "float32"))(
        *texts
    )


def copy_adapter(adapter, folder, **changes):
    """Copy the adapter to `folder` with `changes` in its configuration."""
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def get_load_error(path, texts):
    with pytest.raises(UserError) as error:
        score(path, texts)
    assert "\n" not in str(error.value) and str(error.value).startswith("reward.path: ")
    return str(error.value)


def test_the_adapter_is_merged_into_its_base(tiny, adapter, texts):
    values = compute_expected_scores(tiny, adapter, texts)
    assert score(adapter, texts) == pytest.approx(values, rel=0, abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()
    assert len(set(values)) == 4 and plain.config.num_labels == 1


def test_the_adapters_own_tokenizer_is_preferred(tiny, adapter, texts, tmp_path):
    # The base folder has no tokenizer, so only the adapter's own can serve.
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, base / name)
    folder = copy_adapter(adapter, tmp_path / "adapter", base_model_name_or_path=str(base))
    assert get_load_error(folder, texts).endswith(f"{base} contains no tokenizer")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    assert score(folder, texts) == pytest.approx(compute_expected_scores(tiny, adapter, texts), rel=0, abs=1e-5)


def test_an_adapter_of_another_task_is_refused(adapter, texts, tmp_path):
    message = get_load_error(copy_adapter(adapter, tmp_path / "other", task_type="CAUSAL_LM"), texts)
    assert "adapter of task CAUSAL_LM" in message and "SEQ_CLS" in message


def test_an_adapter_without_a_score_head_is_refused(adapter, texts, tmp_path):
    headless = copy_adapter(adapter, tmp_path / "headless")
    tensors = load_file(headless / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "score" not in name}, headless / "adapter_model.safetensors")
    assert "no score head" in get_load_error(headless, texts)


def test_a_missing_base_model_is_named(adapter, texts, tmp_path):
    gone = copy_adapter(adapter, tmp_path / "gone", base_model_name_or_path=str(tmp_path / "nowhere"))
    assert "nowhere" in get_load_error(gone, texts)
