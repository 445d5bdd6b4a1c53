"""Copies of weights for sampling: the same products, made once, gone afterwards."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import POLICY, WithoutAdapter, add_adapter
from apa_cli.rollout import fast_linear as decoding
from apa_cli.rollout.fast_linear import prepared
from apa_cli.settings import LoraSettings, Matmul

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

CONFIGS = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2,
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2),
}  # fmt: skip
CLASSES = {"gpt_neox": GPTNeoXForCausalLM, "gpt2": GPT2LMHeadModel}
needs_onednn = pytest.mark.skipif(not matmul.has_onednn(), reason="this PyTorch has no oneDNN")


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return CLASSES[kind](copy.deepcopy(CONFIGS[kind])).eval()


@torch.no_grad()
def logits(model, rows: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return model(input_ids=torch.randint(50, (rows, 5))).logits


class Conversions(TorchDispatchMode):
    """Counts weights that are converted to another precision."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._to_copy.default and isinstance(arguments[0], nn.Parameter)
        return function(*arguments, **(keywords or {}))


@needs_onednn
@pytest.mark.parametrize("rows", [3, 29])
@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_products_of_onednn_are_the_same(kind, rows):
    """29 · 5 positions is no number that it is given."""
    model = made(kind)
    expected = logits(model, rows)
    matmul.use(Matmul.onednn)
    with prepared(model):
        changed = [module for module in model.modules() if "forward" in vars(module)]
        close(logits(model, rows), expected)
    assert len(changed) == 2 * 4 + 1
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_onednn_float32_stays_as_it_is(kind):
    model = made(kind)
    with prepared(model):
        assert not any("forward" in vars(module) for module in model.modules())


@needs_onednn
@pytest.mark.parametrize("kind", CONFIGS)
def test_autocast_converts_no_weight_again(kind):
    """As it does with those that are not trained."""
    model = made(kind).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model)
        with Conversions() as conversions:
            logits(model)
        assert conversions.count > 0
        with prepared(model), Conversions() as conversions:
            found = logits(model)
    assert conversions.count == 0
    assert found.dtype is torch.bfloat16
    close(found, expected, rtol=0.02, atol=0.02)


@needs_onednn
def test_another_block_sees_the_weights_of_its_time():
    model = made("gpt_neox")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with prepared(model):
            before = logits(model)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(2)
        with prepared(model):
            close(logits(model), 2 * before)


def test_an_error_in_the_block_leaves_the_model_as_it_was():
    model = made("gpt_neox")
    with (
        pytest.raises(ZeroDivisionError),
        torch.autocast("cpu", dtype=torch.bfloat16),
        prepared(model),
    ):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


@needs_onednn
def test_memory_that_runs_out_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, given = made("gpt_neox"), []

    def product_with(weight):
        given.append(weight)
        if len(given) == 3:
            raise torch.OutOfMemoryError
        return lambda rows, bias: pytest.fail("the layers of before are still there")

    monkeypatch.setattr(matmul, "product_with", product_with)
    with pytest.raises(torch.OutOfMemoryError), prepared(model):
        pass
    logits(model)


def test_adapters_and_the_base_without_them():
    model = made("gpt_neox")
    add_adapter(model, LoraSettings(rank=2, alpha=4.0, target_modules=None), POLICY, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    matmul.use(Matmul.onednn if matmul.has_onednn() else Matmul.torch)
    for asked in (model, WithoutAdapter(model)):
        expected = logits(asked)
        with prepared(model):
            close(logits(asked), expected)


@needs_onednn
def test_a_cpu_holds_no_copy_of_a_large_model(monkeypatch):
    model = made("gpt_neox")
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    for most, changed in ((2 * linear - 1, False), (2 * linear, True)):
        monkeypatch.setattr(decoding, "MOST", most)
        with torch.autocast("cpu", dtype=torch.bfloat16), prepared(model):
            assert any("forward" in vars(module) for module in model.modules()) == changed
