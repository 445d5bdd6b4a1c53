"""Fast linear layers for decoding: the same products, in a block only."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.rollout import fast_linear
from apa_cli.rollout.fast_linear import use_fast_linears
from apa_cli.settings import MatmulLibrary
from tests.builders import add_random_adapter, build_tiny_policy, make_lora_settings

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

WIDE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
KINDS = {"gpt_neox": {**WIDE, "intermediate_size": 64}, "gpt2": WIDE}
needs_onednn = pytest.mark.skipif(not matmul.has_onednn(), reason="this PyTorch has no oneDNN")


def build_policy(kind: str) -> PreTrainedModel:
    return build_tiny_policy(kind, **KINDS[kind])


@torch.no_grad()
def compute_logits(model, rows: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return model(input_ids=torch.randint(50, (rows, 5))).logits


class WeightConversions(TorchDispatchMode):
    """Counter of weights that are converted to another dtype."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._to_copy.default and isinstance(arguments[0], nn.Parameter)
        return function(*arguments, **(keywords or {}))


@needs_onednn
@pytest.mark.parametrize("rows", [3, 29])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_logits_by_onednn_are_the_same(kind, rows):
    """3 · 5 positions keep their shape; 29 · 5 are padded."""
    model = build_policy(kind)
    expected = compute_logits(model, rows)
    matmul.select_matmul(MatmulLibrary.onednn)
    with use_fast_linears(model):
        replaced = [module for module in model.modules() if "forward" in vars(module)]
        close(compute_logits(model, rows), expected)
    assert len(replaced) == 2 * 4 + 1  # two blocks of four linear layers, and the head
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_without_onednn_float32_layers_are_not_replaced(kind):
    model = build_policy(kind)
    with use_fast_linears(model):
        assert not any("forward" in vars(module) for module in model.modules())


@needs_onednn
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_converts_no_weight_in_the_block(kind):
    """Outside, autocast converts frozen weights in every pass; it caches those of trained weights only."""
    model = build_policy(kind).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = compute_logits(model)
        with WeightConversions() as conversions:
            compute_logits(model)
        assert conversions.count > 0
        with use_fast_linears(model), WeightConversions() as conversions:
            actual = compute_logits(model)
    assert conversions.count == 0
    assert actual.dtype is torch.bfloat16
    close(actual, expected, rtol=0.02, atol=0.02)


@needs_onednn
def test_a_new_block_uses_the_current_weights():
    model = build_policy("gpt_neox")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with use_fast_linears(model):
            before = compute_logits(model)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(2)
        with use_fast_linears(model):
            close(compute_logits(model), 2 * before)


def test_an_error_in_the_block_restores_the_model():
    model = build_policy("gpt_neox")
    with (
        pytest.raises(ZeroDivisionError),
        torch.autocast("cpu", dtype=torch.bfloat16),
        use_fast_linears(model),
    ):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


@needs_onednn
def test_out_of_memory_on_entry_restores_the_model(monkeypatch):
    model, weights = build_policy("gpt_neox"), []

    def prepack_linear(weight):
        weights.append(weight)
        if len(weights) == 3:
            raise torch.OutOfMemoryError
        return lambda rows, bias: pytest.fail("a layer was not restored")

    monkeypatch.setattr(matmul, "prepack_linear", prepack_linear)
    with pytest.raises(torch.OutOfMemoryError), use_fast_linears(model):
        pass
    compute_logits(model)


def test_a_model_with_an_adapter_enabled_and_disabled():
    model = build_policy("gpt_neox")
    add_random_adapter(model, make_lora_settings())
    matmul.select_matmul(MatmulLibrary.onednn if matmul.has_onednn() else MatmulLibrary.torch)
    for variant in (model, AdapterDisabledModel(model)):
        expected = compute_logits(variant)
        with use_fast_linears(model):
            close(compute_logits(variant), expected)


@needs_onednn
def test_a_model_above_the_size_limit_is_not_copied(monkeypatch):
    model = build_policy("gpt_neox")
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    for max_bytes, is_replaced in ((2 * linear - 1, False), (2 * linear, True)):
        monkeypatch.setattr(fast_linear, "MAX_COPY_BYTES", max_bytes)
        with torch.autocast("cpu", dtype=torch.bfloat16), use_fast_linears(model):
            assert any("forward" in vars(module) for module in model.modules()) == is_replaced
