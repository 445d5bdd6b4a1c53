"""CPU matrix products: oneDNN's equal PyTorch's up to rounding, and are used only if selected."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from apa_cli.errors import UserError
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.sequence_packing import pack_inputs
from apa_cli.settings import MatmulLibrary
from apa_cli.training.build import set_up_device

ONEDNN = "mkldnn::_linear_pointwise"
onednn = pytest.mark.skipif(not matmul.has_onednn(), reason="this PyTorch has no oneDNN")


def count_onednn_products(work) -> int:
    """Return the number of products that oneDNN computes in `work()`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return [event.name for event in profiler.events()].count(ONEDNN)


def compute_gradients(layer: nn.Linear, inputs: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """Return the layer's output, and the gradients of its weighted sum for input, weight and bias."""
    inputs = inputs.clone().requires_grad_(True)
    output = layer(inputs)
    (output * weights).sum().backward()
    return [output.detach(), inputs.grad, *(parameter.grad for parameter in layer.parameters())]


@onednn
@pytest.mark.parametrize(("positions", "products"), [(10, 3), (96, 3), (100, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients_equal_those_of_float64(positions, products, bias):
    torch.manual_seed(0)
    layer, inputs, weights = nn.Linear(300, 2500, bias=bias), torch.randn(positions, 300), torch.randn(positions, 2500)
    exact = compute_gradients(copy.deepcopy(layer).double(), inputs.double(), weights.double())
    matmul.select_matmul(MatmulLibrary.onednn)
    actual: list[torch.Tensor] = []
    assert count_onednn_products(lambda: actual.extend(compute_gradients(layer, inputs, weights))) == products
    for tensor, expected in zip(actual, exact, strict=True):
        assert tensor.dtype is torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=2e-4)


@onednn
def test_selecting_torch_restores_its_products():
    layer, inputs = nn.Linear(300, 2500), torch.randn(96, 300)
    before = layer(inputs)
    matmul.select_matmul(MatmulLibrary.onednn)
    matmul.select_matmul(MatmulLibrary.torch)
    assert count_onednn_products(lambda: layer(inputs)) == 0
    assert torch.equal(layer(inputs), before)


@onednn
def test_other_products_than_of_large_float32_matrices_stay_with_pytorch():
    matmul.select_matmul(MatmulLibrary.onednn)
    large, other = torch.randn(96, 300), torch.randn(300, 2500)

    def work():
        for dtype in (torch.float64, torch.bfloat16, torch.int64):
            assert torch.mm(large.to(dtype), other.to(dtype)).dtype is dtype
        assert torch.mm(torch.ones(2, 3), torch.ones(3, 4)).tolist() == [[3.0] * 4] * 2
        assert torch.mm(torch.ones(0, 300), other).shape == (0, 2500)
        summed = torch.addmm(torch.ones(96, 2500), large, other, beta=0.5, alpha=2)
        torch.testing.assert_close(summed, 0.5 + 2 * (large.double() @ other.double()).float(), rtol=1e-5, atol=1e-3)
        torch.addmm(torch.ones(1), large, other)
        for first, second in ((large, large), (large, other.double()), (large[0], other)):
            with pytest.raises(RuntimeError):
                torch.mm(first, second)

    assert count_onednn_products(work) == 0


def test_rounded_sizes_are_few_and_close():
    for count in [*range(1, 5000), 10**5 + 1]:
        assert count <= matmul.round_up_size(count) <= max(count + 31, count * 17 / 16)
        assert matmul.round_up_size(matmul.round_up_size(count)) == matmul.round_up_size(count)
    assert len({matmul.round_up_size(count) for count in range(1024, 2049)}) <= 17


@onednn
def test_a_packed_row_is_padded_to_a_rounded_size():
    ids, places = torch.arange(1, 71), torch.arange(70) % 35
    assert pack_inputs(ids, places, [35, 35])["sequence_lengths"] == [35, 35]
    matmul.select_matmul(MatmulLibrary.onednn)
    inputs = pack_inputs(ids, places, [35, 35])
    assert inputs["sequence_lengths"] == [35, 35, 26]
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, 96)
    assert torch.equal(inputs["input_ids"][0, :70], ids)


@onednn
@pytest.mark.parametrize(
    ("vendor", "capability", "is_used"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_auto_selects_onednn_on_amd_processors_with_avx_512(monkeypatch, tmp_path, vendor, capability, is_used):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    matmul.select_matmul(MatmulLibrary.auto)
    layer, inputs = nn.Linear(300, 2500), torch.randn(96, 300)
    assert count_onednn_products(lambda: layer(inputs)) == is_used


def test_selecting_onednn_without_it_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(
        UserError,
        match=r"^launch\.matmul: onednn is set, but this PyTorch was built without oneDNN; use auto or torch$",
    ):
        matmul.select_matmul(MatmulLibrary.onednn)


@onednn
def test_positions_are_rounded_up_only_if_onednn_is_selected_and_they_are_many():
    assert matmul.round_positions(70) == 70
    matmul.select_matmul(MatmulLibrary.onednn)
    assert [matmul.round_positions(count) for count in (0, 1, 64, 70, 1000, 2001)] == [0, 1, 64, 96, 1024, 2048]


@onednn
@pytest.mark.parametrize(("name", "is_used"), [("onednn", True), ("torch", False)])
def test_launch_matmul_selects_the_library(make_config, name, is_used):
    set_up_device(make_config(f"launch.matmul={name}").launch)
    layer, inputs = nn.Linear(300, 2500), torch.randn(96, 300)
    assert count_onednn_products(lambda: layer(inputs)) == is_used
    assert matmul.get_active_matmul() is MatmulLibrary(name)


def test_a_run_records_the_library(run_train):
    run = run_train("iterations=0", "launch.matmul=torch")
    assert json.loads((run / "environment.json").read_text())["matmul"] == "torch"


@onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0,), (2, 3), (5, 33)])
def test_a_prepacked_linear_layer_gives_the_same_products(rows, dtype):
    """With no rows, with few, and with a number of rows that is rounded up."""
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((40, 24), (40,), (*rows, 24)))
    assert dtype is torch.bfloat16 or matmul.prepack_linear(weight) is None
    matmul.select_matmul(MatmulLibrary.onednn)
    multiply = matmul.prepack_linear(weight)
    if multiply is None:
        pytest.skip("this PyTorch has no bfloat16 products by oneDNN")
    for offset in (bias, None):
        expected = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
        actual = multiply(x, offset)
        assert actual.shape == expected.shape and actual.dtype is dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4 if dtype is torch.float32 else 0.1)
