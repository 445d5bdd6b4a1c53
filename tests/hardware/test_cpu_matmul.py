"""oneDNN's products are PyTorch's, but for rounding, and it is used where it is wanted."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from apa_cli.errors import UserError
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.sequence_packing import packed_inputs
from apa_cli.settings import Matmul
from apa_cli.training.build import launch

ONEDNN = "mkldnn::_linear_pointwise"
onednn = pytest.mark.skipif(not matmul.has_onednn(), reason="this PyTorch has no oneDNN")


def products_by_onednn(work) -> int:
    """How many there are in `work()`."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return [event.name for event in seen.events()].count(ONEDNN)


def results(layer: nn.Linear, inputs: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """The layer's output and all gradients of its weighted sum."""
    inputs = inputs.clone().requires_grad_(True)
    output = layer(inputs)
    (output * weights).sum().backward()
    return [output.detach(), inputs.grad, *(parameter.grad for parameter in layer.parameters())]


@onednn
@pytest.mark.parametrize(("positions", "products"), [(10, 3), (96, 3), (100, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients_are_those_of_float64(positions, products, bias):
    torch.manual_seed(0)
    layer, inputs, weights = nn.Linear(300, 2500, bias=bias), torch.randn(positions, 300), torch.randn(positions, 2500)
    exact = results(copy.deepcopy(layer).double(), inputs.double(), weights.double())
    matmul.use(Matmul.onednn)
    found: list[torch.Tensor] = []
    assert products_by_onednn(lambda: found.extend(results(layer, inputs, weights))) == products
    for one, other in zip(found, exact, strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-4)


@onednn
def test_pytorchs_own_products_come_back():
    layer, inputs = nn.Linear(300, 2500), torch.randn(96, 300)
    before = layer(inputs)
    matmul.use(Matmul.onednn)
    matmul.use(Matmul.torch)
    assert products_by_onednn(lambda: layer(inputs)) == 0
    assert torch.equal(layer(inputs), before)


@onednn
def test_what_is_no_product_of_large_float32_matrices_is_pytorchs():
    matmul.use(Matmul.onednn)
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

    assert products_by_onednn(work) == 0


def test_few_shapes_are_given_to_it():
    for count in [*range(1, 5000), 10**5 + 1]:
        assert count <= matmul.next_shape(count) <= max(count + 31, count * 17 / 16)
        assert matmul.next_shape(matmul.next_shape(count)) == matmul.next_shape(count)
    assert len({matmul.next_shape(count) for count in range(1024, 2049)}) <= 17


@onednn
def test_a_packed_row_has_such_a_shape():
    ids, places = torch.arange(1, 71), torch.arange(70) % 35
    assert packed_inputs(ids, places, [35, 35])["sequence_lengths"] == [35, 35]
    matmul.use(Matmul.onednn)
    inputs = packed_inputs(ids, places, [35, 35])
    assert inputs["sequence_lengths"] == [35, 35, 26]
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, 96)
    assert torch.equal(inputs["input_ids"][0, :70], ids)


@onednn
@pytest.mark.parametrize(
    ("vendor", "capability", "wanted"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_auto_is_onednn_on_amds_processors_with_avx_512(monkeypatch, tmp_path, vendor, capability, wanted):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "PROCESSOR", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    matmul.use(Matmul.auto)
    layer, inputs = nn.Linear(300, 2500), torch.randn(96, 300)
    assert products_by_onednn(lambda: layer(inputs)) == wanted


def test_where_there_is_no_onednn_it_cannot_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^launch\.matmul=onednn: this PyTorch was built without oneDNN$"):
        matmul.use(Matmul.onednn)


def test_little_is_not_made_more(monkeypatch):
    assert matmul.rounded(70) == 70
    monkeypatch.setattr(matmul, "_library", object())
    assert [matmul.rounded(count) for count in (0, 1, 64, 70, 1000, 2001)] == [0, 1, 64, 96, 1024, 2048]


@onednn
@pytest.mark.parametrize(("name", "wanted"), [("onednn", True), ("torch", False)])
def test_a_command_computes_as_launch_matmul_says(configured, name, wanted):
    launch(configured(f"launch.matmul={name}").launch)
    layer, inputs = nn.Linear(300, 2500), torch.randn(96, 300)
    assert products_by_onednn(lambda: layer(inputs)) == wanted
    assert matmul.used() is Matmul(name)


def test_a_run_says_who_multiplied(run_train):
    run = run_train("iterations=0", "launch.matmul=torch")
    assert json.loads((run / "environment.json").read_text())["matmul"] == "torch"


@onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0,), (2, 3), (5, 33)])
def test_a_weight_that_stays_is_multiplied_as_any(rows, dtype):
    """Few rows, and a number of them that is rounded up."""
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((40, 24), (40,), (*rows, 24)))
    assert dtype is torch.bfloat16 or matmul.product_with(weight) is None
    matmul.use(Matmul.onednn)
    product = matmul.product_with(weight)
    if product is None:
        pytest.skip("no products of bfloat16 here")
    for offset in (bias, None):
        expected = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
        found = product(x, offset)
        assert found.shape == expected.shape and found.dtype is dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 if dtype is torch.float32 else 0.1)
